"""One loop carries any algorithm: several modules, resampling, frozen policies, demonstrations."""

import dataclasses
import math

import pytest
import torch
from fake_training import (
    ROLLOUT,
    Config,
    DigitsTask,
    FrozenConfig,
    ImitationConfig,
    packed,
    tiny_policy,
)

from dlm_fast.models.requests import ScoreRequest
from dlm_fast.rollout import SamplerConfig, trajectories_of
from dlm_fast.tasks import CheckerError
from dlm_fast.training import TrainConfig, Trainer
from dlm_fast.training.metrics import read_metrics

UNSTEADY = ("time/", "memory/")


def trainer_of(algorithm, *, task=None, policy=None, rollout=ROLLOUT, **options):
    defaults = {
        "max_steps": 2,
        "prompts_per_step": 4,
        "micro_batch": 2,
        "lr": 1e-2,
        "eval_every": 0,
    }
    return Trainer(
        policy or tiny_policy(),
        task or DigitsTask(),
        algorithm,
        TrainConfig(**{**defaults, **options}),
        rollout=rollout,
        seed=5,
    )


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def steady(history):
    return [{k: v for k, v in row.items() if not k.startswith(UNSTEADY)} for row in history]


def assert_close(one, other, tolerance):
    for row, twin in zip(steady(one), steady(other), strict=True):
        assert row == pytest.approx(twin, abs=tolerance, rel=tolerance)


def test_two_modules_and_resampling():
    """The contract's hardest case: value model, hints, old values, two kinds of losses."""
    trainer = trainer_of(Config(updates=2))
    before = {name: weights(t.module) for name, t in trainer.trainees.items()}
    result = trainer.run()
    assert result.step == 2 and result.stopped_by is None
    for name, trainee in trainer.trainees.items():
        changed = [not torch.equal(p, before[name][n]) for n, p in weights(trainee.module).items()]
        assert all(changed), name
    assert {n: t.updates for n, t in trainer.trainees.items()} == {"policy": 4, "value": 2}
    # the value head learns at its own rate
    lrs = [t.optimizer.param_groups[0]["lr"] for t in trainer.trainees.values()]
    assert lrs == pytest.approx([1e-2, 1e-1])
    row = result.metrics
    assert {"policy/grad_norm", "value/grad_norm", "loss", "value/loss", "value/error"} <= set(row)
    # context.score ran on the weights before the updates, the loss after them
    assert row["fake/drift"] != 0 and row["train/updates"] == 3


def test_resampling_scores_hints_and_new_draws():
    trainer = trainer_of(Config(), max_steps=1)
    row = trainer.run().metrics
    resampled = [t for made in trainer.algorithm.resampled for t in made]
    assert len(resampled) == row["rollout/resampled"] == 4 * row["groups/zero_variance"] > 0
    for trajectory in resampled:
        assert trajectory.member == 3, "members go on counting after the group's own"
        assert trajectory.response_ids[0] == 2 and bool(trajectory.hint_mask[0])
        assert trajectory.reward > 0 and trajectory.text.startswith("2")
    assert len({t.sequence_id for t in resampled}) == len(resampled)


def test_trajectories_are_named():
    trainer = trainer_of(ImitationConfig(), max_steps=3, prompts_per_step=3)
    trainer.run()
    rollouts = trajectories_of(trainer.algorithm.groups)
    assert [t.group_id for t in rollouts] == [6, 7, 8]
    assert {t.policy_version for t in rollouts} == {2}
    assert all(t.finish_reason == "data" and math.isnan(t.reward) for t in rollouts)


def test_frozen_policy():
    """An unmasking policy trains while the diffusion model stays as it is."""
    trainer = trainer_of(FrozenConfig())
    before = weights(trainer.policy)
    result = trainer.run()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer.policy).items())
    assert list(trainer.trainees) == ["unmasking"] and trainer.policy_version == 0
    assert trainer.algorithm.called == 2, "the plan's own rollout function"
    assert {"unmasking/grad_norm", "loss"} <= set(result.metrics)
    assert "policy/grad_norm" not in result.metrics


@pytest.mark.parametrize(("fill_to", "lengths"), [(0, {2, 3, 4, 5}), (6, {6}), (3, {3, 4, 5})])
def test_demonstrations_end_with_eos(fill_to, lengths):
    """One EOS by default, or EOS up to fill_to; 1 to 4 tokens of answer in a window of 8."""
    trainer = trainer_of(ImitationConfig(fill_to=fill_to), prompts_per_step=24, max_steps=1)
    row = trainer.run().metrics
    eos = trainer.policy.family.eos_ids[0]
    for trajectory in trajectories_of(trainer.algorithm.groups):
        answer = trainer.policy.encode(trajectory.text, chat=False)
        filled = trajectory.response_ids[len(answer) :]
        assert torch.equal(trajectory.response_ids[: len(answer)], answer)
        assert (filled == eos).all() and len(filled) >= 1
    found = {t.response_length for t in trajectories_of(trainer.algorithm.groups)}
    assert found == lengths
    assert not any(name.startswith(("reward/", "rollout/l")) for name in row)


def test_a_demonstration_that_fills_the_window_has_no_eos():
    trainer = trainer_of(ImitationConfig(), prompts_per_step=24, max_steps=1)
    trainer.rollout = SamplerConfig(max_new_tokens=4, block_size=4, steps=4)
    trainer.run()
    full = [t for t in trajectories_of(trainer.algorithm.groups) if len(t.text) == 4]
    assert full and {t.response_length for t in full} == {4}


def test_a_demonstration_longer_than_the_window_is_an_error():
    trainer = trainer_of(ImitationConfig(), prompts_per_step=24)
    trainer.rollout = SamplerConfig(max_new_tokens=3, block_size=3, steps=3)
    with pytest.raises(ValueError, match=r"has 4 tokens; raise rollout\.max_new_tokens"):
        trainer.run()


def test_batch_sizes_change_nothing():
    """Losses are sums over global counts: 1 x 8 equals 8 x 1."""
    one = trainer_of(Config(), micro_batch=1, rollout_batch=3).run()
    other = trainer_of(Config(), micro_batch=64, rollout_batch=64).run()
    assert_close(one.history, other.history, 2e-5)


def test_steps_equal_a_plain_training_loop():
    """Three steps, clipping included, against ten lines of torch."""
    options = {"max_steps": 3, "lr": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    trainer = trainer_of(ImitationConfig(), **options, warmup_steps=2)
    policy = tiny_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(3):
        trainer.step = step  # groups of this iteration
        groups = _groups(trainer)
        optimizer.param_groups[0]["lr"] = [0.005, 0.01, 0.01][step]
        total = sum(len(t.response_ids) for t in groups)
        ids, visibility, (rows, targets) = packed(groups, policy.family.mask_id)
        loss = -policy(ids, visibility, score=ScoreRequest(rows, targets)).logprob.sum() / total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    trainer = trainer_of(ImitationConfig(), **options, warmup_steps=2)
    row = trainer.run().metrics
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5, "the clip must bind for this test to mean something"
    for name, parameter in weights(policy).items():
        # packs of other sizes round otherwise, and AdamW divides small gradients by their own size
        torch.testing.assert_close(parameter, weights(trainer.policy)[name], rtol=0, atol=1e-4)


def _groups(trainer):
    from dlm_fast.training.metrics import MetricSums

    trainer._stream.position = 4 * trainer.step
    trainer._collect(MetricSums())
    return trajectories_of(trainer.algorithm.groups)


def test_no_micro_batch_no_step():
    """Groups without differences leave weights and moments alone."""

    class Constant(DigitsTask):
        def score(self, completion, example):
            return super().score("", example)

    class NoValue(Config):
        def build(self, **setting):
            algorithm = super().build(**setting)
            algorithm.prepare = lambda groups, context: []
            return algorithm

    trainer = trainer_of(NoValue(), task=Constant())
    before = weights(trainer.policy)
    row = trainer.run().metrics
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer.policy).items())
    assert row["train/empty_updates"] == 3 and "loss" not in row
    assert row["groups/zero_variance"] == 1.0 and row["reward/std"] == 0.0


def test_rollout_metrics_are_right():
    trainer = trainer_of(Config(group_size=5), max_steps=1)
    seen = []
    refine = trainer.algorithm.refine

    def spy(groups, resample):
        seen.extend(t for g in groups for t in g.trajectories)
        return refine(groups, resample)

    trainer.algorithm.refine = spy
    row = trainer.run().metrics
    rewards = torch.tensor([t.reward for t in seen], dtype=torch.float64)
    assert len(seen) == 20
    assert row["reward/mean"] == pytest.approx(rewards.mean().item())
    assert row["reward/std"] == pytest.approx(rewards.std(correction=0).item())
    assert row["reward/correct"] == sum(t.correct for t in seen) / 20
    assert row["rollout/nfe"] == sum(t.num_forwards for t in seen) / 20
    assert row["task/characters"] == pytest.approx(sum(len(t.text) for t in seen) / 20)
    tokens = sum(t.response_length for t in seen) / sum(t.num_forwards for t in seen)
    assert row["rollout/tokens_per_step"] == pytest.approx(tokens)


@pytest.mark.parametrize(("cache", "is_off"), [("none", None), ("prefix", True), ("dual", True)])
def test_the_gap_of_an_approximate_cache_is_logged(cache, is_off):
    rollout = dataclasses.replace(ROLLOUT, cache=cache)
    metrics = trainer_of(Config(), rollout=rollout, max_steps=1).run().metrics
    gap = metrics.get("rollout/cache_gap")
    assert gap is None if is_off is None else 1e-6 < gap < 1.0


def test_a_failing_checker_is_counted(caplog):
    trainer = trainer_of(Config(), task=DigitsTask(fails_on="7"), prompts_per_step=24, max_steps=1)
    row = trainer.run().metrics
    numbers = [7 * i * i for i in range(24)]
    more = [t for made in trainer.algorithm.resampled for t in made]
    failed = sum("checker_error" in t.detail for t in more)
    assert row["reward/checker_failures"] == 3 * sum(n % 10 == 7 for n in numbers) + failed > failed
    assert "the checker is broken" in caplog.text


@pytest.mark.parametrize(
    ("limit", "message"), [(0.2, "failed on 15 of 72 completions"), (0.21, None), (1.0, None)]
)
def test_a_checker_that_fails_too_often_stops_the_run(limit, message, tmp_path):
    """15 of 72 are 0.2083; the state is saved, and the run goes on where the checker is mended."""
    folder = tmp_path / "run"

    def trainer(task, **options):
        train = TrainConfig(
            max_steps=2, prompts_per_step=24, eval_every=0, lr=1e-2, max_checker_failures=limit
        )
        return Trainer(
            tiny_policy(), task, Config(), train, rollout=ROLLOUT, seed=5, run_dir=folder, **options
        )

    if message is None:
        assert trainer(DigitsTask(fails_on="7")).run().step == 2
        return
    with pytest.raises(CheckerError, match=f"{message}.*the checker is broken(.|\n)*continue"):
        trainer(DigitsTask(fails_on="7")).run()
    [row] = read_metrics(folder / "metrics.jsonl")
    assert (row["step"], row["reward/checker_failures"]) == (1, 15)
    resumed = trainer(DigitsTask(), resume=True).run()
    straight = trainer_of(Config(), prompts_per_step=24, max_steps=2, micro_batch=16).run()
    assert steady(resumed.history) == steady(straight.history)


def test_a_run_with_a_broken_checker_keeps_the_steps_before(tmp_path):
    """It breaks after the 72 rollouts of the first step and those asked for on top; no checkpoint
    is due before step 50, so that of step 1 is the one written on the way out."""
    folder = tmp_path / "run"

    class Breaking(DigitsTask):
        left = 72 + 24

        def score(self, completion, example):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("worn out")
            return super().score(completion, example)

    def trainer(task, **options):
        train = TrainConfig(max_steps=3, prompts_per_step=24, eval_every=0, lr=1e-2)
        return Trainer(
            tiny_policy(), task, Config(), train, rollout=ROLLOUT, seed=5, run_dir=folder, **options
        )

    broken = trainer(Breaking())
    with pytest.raises(CheckerError, match="worn out"):
        broken.run()
    assert broken.step == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    resumed = trainer(DigitsTask(), resume=True).run()
    assert [row["step"] for row in resumed.history] == [2, 3]
    straight = trainer_of(Config(), prompts_per_step=24, max_steps=3, micro_batch=16).run()
    assert steady(resumed.history) == steady(straight.history)[1:]


def test_a_checker_that_always_fails_stops_the_run():
    class Broken(DigitsTask):
        def score(self, completion, example):
            raise RuntimeError("no such key")

    for options in ({}, {"max_checker_failures": 1.0}, {"eval_every": 1, "eval_examples": 9}):
        trainer = trainer_of(Config(), task=Broken(), **options)
        with pytest.raises(CheckerError, match=r"failed on all \d+ completions"):
            trainer.run()
        assert trainer.step == 0


def test_bf16_parameters_are_refused_at_small_rates():
    policy = tiny_policy(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"16 bits moves .*train\.precision=bf16"):
        trainer_of(ImitationConfig(), policy=policy, lr=9e-5)
    trainer_of(ImitationConfig(), policy=policy, lr=1e-4)


def test_bf16_arithmetic_keeps_float32_weights():
    trainer = trainer_of(Config(), precision="bf16")
    exact = trainer_of(Config(), precision="fp32")
    rounded_row, exact_row = trainer.run().history[0], exact.run().history[0]
    for trainee in trainer.trainees.values():
        assert {p.dtype for p in trainee.module.parameters()} == {torch.float32}
        states = trainee.optimizer.state.values()
        assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    assert rounded_row["policy/grad_norm"] != exact_row["policy/grad_norm"]
    assert rounded_row["loss"] == pytest.approx(exact_row["loss"], abs=0.2)


def test_gradient_checkpointing_changes_nothing():
    one = trainer_of(Config(), gradient_checkpointing=True).run()
    assert_close(one.history, trainer_of(Config()).run().history, 1e-6)


def test_evaluation_at_start_and_end():
    result = trainer_of(Config(), max_steps=3, eval_every=2, eval_examples=7).run()
    evaluated = [row["step"] for row in result.history if "eval/correct" in row]
    assert evaluated == [0, 2, 3]
    assert result.best["eval/correct"] == max(r.get("eval/correct", 0) for r in result.history)


def test_updates_must_name_a_trained_module():
    trainer = trainer_of(FrozenConfig())
    trainer.trainees["other"] = trainer.trainees.pop("unmasking")
    with pytest.raises(
        ValueError, match=r"update of 'unmasking', but modules\(\) trains \['other'\]"
    ):
        trainer.run()


def test_no_data():
    with pytest.raises(ValueError, match="no training examples"):
        trainer_of(Config(), task=DigitsTask(num_examples=0))
    with pytest.raises(ValueError, match="no held-out examples"):
        Trainer(tiny_policy(), DigitsTask(), Config(), TrainConfig(), rollout=ROLLOUT, eval_data=[])
