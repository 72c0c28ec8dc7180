"""GRPO and RLOO: the plain objective, training in the loop, options that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_training import DigitsTask
from trace_toys import context, tiny
from tree_toys import group, leaf

from dlm_fast.algorithms import grpo
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.training import TrainConfig, Trainer

ROLLOUT = SamplerConfig(max_new_tokens=16, block_size=4, steps=16, temperature=1.0)


@pytest.fixture(scope="module")
def policy():
    return tiny("causal")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 0}, "algorithm.group_size"),
        ({"group_size": 8, "mini_batch": 12}, "multiple of algorithm.group_size=8"),
        ({"estimator": "median"}, "algorithm.estimator"),
        ({"clip_low": -0.1}, "algorithm.clip_low"),
    ],
)
def test_options_of_grpo_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        grpo.Config(**options)


def test_grpo_is_the_plain_objective(policy):
    """Against the formula, rollout by rollout."""
    config = grpo.Config(group_size=4, loss_agg="seq_mean_len")
    algorithm = config.build(rollout=ROLLOUT, num_prompts=1, mask_id=-1, seed=0)
    made, _ = context(algorithm, policy)
    assert algorithm.sampling(0).rollout is None and algorithm.sampling(0).group_size == 4
    lengths, rewards = (2, 5, 3, 4), (1.0, 0.0, 0.0, 1.0)
    members = [
        leaf((), (), [10 + k + i for i in range(n)], reward=r)
        for k, (n, r) in enumerate(zip(lengths, rewards, strict=True))
    ]
    ((micro,),) = algorithm.prepare([group(members)], made)
    net = ((micro.plus - micro.minus) / micro.divisor).split(list(lengths))
    scale = torch.tensor(rewards).std().item() + 1e-6
    for own, n, r in zip(net, lengths, rewards, strict=True):
        assert own.tolist() == pytest.approx([(r - 0.5) / scale / n / 4] * n)
    assert len(micro.rows.input_ids) == 3 + sum(lengths)  # the prompt once


@pytest.mark.parametrize("kind", ["causal", "block"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_grpo_trains_in_the_loop(kind, estimator):
    """Even digits are rewarded; the same numbers with small passes."""
    rows = []
    for budget in (8192, 40):
        trainer = Trainer(
            tiny(kind).float(),
            DigitsTask(),
            grpo.Config(
                group_size=4, estimator=estimator, reject="reward", rows_per_forward=budget
            ),
            TrainConfig(
                max_steps=2, prompts_per_step=3, lr=3e-3, eval_every=0, device="cpu", save_every=0
            ),
            rollout=replace(ROLLOUT, max_new_tokens=8, steps=8),
            seed=3,
        )
        rows.append(trainer.run().metrics)
    for name in ("loss", "policy/logprob", "tree/unique_tokens", "policy/grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4)
    assert rows[0]["tree/sharing"] > 1 and rows[0]["tree/mismatch"] < 1e-4
    assert rows[1]["tree/rows"] >= rows[0]["tree/rows"]
