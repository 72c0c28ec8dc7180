"""Completions are scored while others are decoded, with the rewards of scoring afterwards."""

import threading
import time

import pytest
import torch
from fake_training import ROLLOUT, Config, DigitsTask, tiny_policy

from dlm_fast.rollout import SamplerConfig, sample
from dlm_fast.training import TrainConfig, Trainer, scored_rollouts
from dlm_fast.training.scored_rollouts import sample_scored

PATIENCE_S = 120


class Watched(DigitsTask):
    """Notes which thread scored, and waits for a gate."""

    thread_safe = True

    def __init__(self, gate=None, **options):
        super().__init__(**options)
        self.gate, self.started, self.threads = gate, threading.Event(), set()

    def score(self, completion, example):
        self.threads.add(threading.current_thread().name)
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        return super().score(completion, example)


def rolled(task, threads, policy=None, max_batch=2, sampler=ROLLOUT, **more):
    policy = policy or tiny_policy()
    examples = task.load(None, "train")[:6]
    prompts = [policy.encode(task.prompt(example)) for example in examples]
    return sample_scored(
        policy, task, prompts, examples, sampler,
        seed=3, sequence_ids=list(range(6)), max_batch=max_batch, threads=threads, **more,
    )  # fmt: skip


def test_scoring_starts_before_decoding_ends():
    """The last forward does not return before a verdict was begun: were scoring left for the end,
    this would wait in vain. Six rows, two at a time, four steps each: twelve forwards."""
    policy, task, forwards = tiny_policy(), Watched(), []
    stats = policy.stats

    def counted(*args, **options):
        forwards.append(task.started.is_set())
        if len(forwards) == 12:
            assert task.started.wait(PATIENCE_S), "no completion was scored beside the decoding"
            forwards[-1] = True
        return stats(*args, **options)

    policy.stats = counted
    rolled(task, 2, policy)
    assert len(forwards) == 12
    assert not any(forwards[:4]) and forwards[-1], "rows are scored when done, not before"
    assert all(name.startswith("dlm_fast-score") for name in task.threads)


def test_verdicts_are_those_of_serial_scoring_whatever_comes_first():
    """The gate keeps every verdict back until all rows are decoded."""
    serial = rolled(DigitsTask(fails_on="7"), 0)
    gate = threading.Event()
    told, policy = [], tiny_policy()
    stats, count = policy.stats, []

    def counted(*args, **options):
        count.append(1)
        if len(count) == 12:
            gate.set()
        return stats(*args, **options)

    policy.stats = counted
    beside = rolled(
        Watched(gate, fails_on="7"), 3, policy, on_scored=lambda n, t: told.append((n, t.reward))
    )
    for found in (serial, beside):
        assert [t.text for t in found.trajectories] == [t.text for t in serial.trajectories]
        assert [t.reward for t in found.trajectories] == [s.reward for s in serial.scores]
        assert [t.detail for t in found.trajectories] == [s.detail for s in serial.scores]
        assert found.scores == serial.scores
    assert sorted(told) == [(n, score.reward) for n, score in enumerate(serial.scores)]
    assert sum("checker_error" in score.detail for score in beside.scores) == 1
    assert beside.waited_s >= 0


def test_verdicts_are_told_while_decoding_goes_on(monkeypatch):
    """The second pair of rows is not done before the first verdicts are there; so these are
    told when the second pair is handed over, with four forwards to come."""
    streams, told, policy = [], [], tiny_policy()

    class Recorded(scored_rollouts.ScoreStream):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            streams.append(self)

    monkeypatch.setattr(scored_rollouts, "ScoreStream", Recorded)
    stats, told_at = policy.stats, []

    def counted(*args, **options):
        told_at.append(len(told))
        if len(told_at) == 8:
            end = time.monotonic() + PATIENCE_S
            while not all(future.done() for future in streams[0]._running):
                assert time.monotonic() < end, "the verdicts do not come"
                time.sleep(0.001)
        return stats(*args, **options)

    policy.stats = counted
    rolled(Watched(), 2, policy, on_scored=lambda n, t: told.append(n))
    assert told_at[:4] == [0] * 4 and told_at[8] >= 2 and len(told) == 6


def test_rows_are_reported_as_they_finish():
    """Early stops and batches: each row once, as the call returns it, the short ones first."""
    policy = tiny_policy()
    prompts = [policy.encode(f"{n}=") for n in range(7)]
    told = []

    def note(numbers, trajectories):
        told.extend(zip(numbers, trajectories, strict=True))

    eos = policy.family.eos_ids[0]
    fixed = [None] * 6 + [torch.full((8,), eos)]
    config = SamplerConfig(max_new_tokens=8, block_size=4, steps=8, temperature=1.0)
    made = sample(policy, prompts, config, seed=1, max_batch=3, fixed_ids=fixed, on_done=note)
    assert sorted(number for number, _ in told) == list(range(7))
    assert all(made[number] is trajectory for number, trajectory in told)
    assert told[0][0] == 6 and told[0][1].num_forwards == 0, "a row of hints alone is done at once"
    alone = sample(policy, prompts, config, seed=1, fixed_ids=fixed)
    for one, other in zip(made, alone, strict=True):
        for name in ("response_ids", "step_map", "logp_rollout"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_rollout_of_the_algorithms_own_is_scored_when_it_is_done():
    task = Watched()
    plain = rolled(DigitsTask(), 0)
    own = rolled(task, 2, rollout=lambda policy, *args, **keys: sample(policy, *args, **keys))
    assert own.scores == plain.scores
    with pytest.raises(ValueError, match="rollout made 5 trajectories for 6 prompts"):
        rolled(task, 2, rollout=lambda policy, *args, **keys: sample(policy, *args, **keys)[1:])


@pytest.mark.parametrize("threads", [0, 3])
def test_training_is_the_same_with_and_without_threads(threads):
    def run(task, threads):
        config = TrainConfig(
            max_steps=2, prompts_per_step=4, lr=1e-2, rollout_batch=3, score_threads=threads,
            eval_every=1, eval_examples=5,
        )  # fmt: skip
        return Trainer(tiny_policy(), task, Config(), config, rollout=ROLLOUT, seed=5).run().history

    unsteady = ("time/", "memory/")
    found, expected = run(Watched(), threads), run(DigitsTask(), 0)
    for row, twin in zip(found, expected, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(unsteady)} == {
            k: v for k, v in twin.items() if not k.startswith(unsteady)
        }
    assert found[1]["time/score_wait_s"] >= 0
