"""TreePO and GRPO in the training loop: a tiny model learns to write even digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_training import DigitsTask

import dlm_fast
from dlm_fast.algorithms import grpo, treepo
from dlm_fast.rollout import SamplerConfig, TreeConfig
from dlm_fast.training import TrainConfig, Trainer
from dlm_fast.training.dry_run import dry_run

TREE = TreeConfig(leaves=16, segment=2, max_depth=4, answer="none", repetition="none")
CONFIGS = {
    "mean": treepo.Config(tree=TREE, reject="reward"),
    "progress": treepo.Config(tree=TREE, reject="reward", estimator="progress"),
    "two epochs": treepo.Config(tree=TREE, reject="reward", epochs=2, mini_batch=32),
    "grpo": grpo.Config(reject="reward"),
}


def trainer_of(config, kind="causal", max_steps=12):
    torch.set_num_threads(1)
    return Trainer(
        dlm_fast.load("tiny", kind=kind, width=32, layers=1, heads=2),
        DigitsTask(),
        config,
        TrainConfig(
            max_steps=max_steps,
            prompts_per_step=4,
            lr=1e-2,
            eval_every=0,
            device="cpu",
            save_every=0,
        ),
        rollout=SamplerConfig(max_new_tokens=8, block_size=4, steps=8, temperature=1.0),
        seed=1,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reward_rises(name):
    """From what a random model gets, about 0.07, towards 1."""
    history = trainer_of(CONFIGS[name]).run().history
    rewards = [row["reward/mean"] for row in history]
    assert rewards[0] < 0.15 and sum(rewards[-2:]) / 2 > 0.6


@pytest.mark.parametrize("rollouts", ["tree", "flat"])
def test_a_block_model_learns(rollouts):
    """Trees of blocks: what decoding recorded is what training scores, also in small parts."""
    tree = replace(TREE, segment=4)
    histories = []
    for budget, max_steps in ((8192, 12), (60, 2)):
        config = treepo.Config(
            tree=tree, rollouts=rollouts, reject="reward", rows_per_forward=budget
        )
        histories.append(trainer_of(config, "block", max_steps).run().history)
    whole, parts = histories
    rewards = [row["reward/mean"] for row in whole]
    assert rewards[0] < 0.15 and sum(rewards[-2:]) / 2 > 0.4
    assert all(row["tree/mismatch_largest"] < 1e-4 for row in parts)
    for name in ("loss", "policy/grad_norm", "reward/mean"):
        assert parts[1][name] == pytest.approx(whole[1][name], abs=1e-4)


def test_a_dry_run_measures_a_tree():
    """Verdicts are made up so that no tree is rejected."""
    report = dry_run(trainer_of(treepo.Config(tree=TREE)))
    assert report.activations > 0
