"""Evaluation on held-out examples, split over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dlm_fast.ops.philox import mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.metrics import MetricSums, Row
from dlm_fast.training.scored_rollouts import sample_scored

# keeps the draws of evaluations apart from those of training rollouts
_EVALUATION = 0x6576616C


@dataclass(kw_only=True)
class Evaluation:
    """What an evaluation found."""

    metrics: Row
    """``eval/correct``, ``eval/reward``, ...: global"""
    trajectories: list[Trajectory]
    """of this rank, scored"""


def evaluate(
    policy: Any,
    task: Any,
    examples: Sequence[dict[str, Any]],
    sampler: SamplerConfig,
    *,
    seed: int = 0,
    max_batch: int | None = None,
    threads: int = 0,
    encode: Callable[[dict[str, Any]], Tensor] | None = None,
    runtime: Runtime | None = None,
) -> Evaluation:
    """One completion per example, scored.

    The draws depend on the seed and the position of the example alone, so evaluations of one run
    differ by the weights, not by luck. ``threads`` score beside the decoding; ``encode`` makes
    the ids of an example's prompt. With a ``runtime`` each rank takes its share and the metrics are
    global; weights must be whole (``Runtime.unsharded``).
    """
    if not examples:
        raise ValueError("no examples to evaluate on: the file or the task gave an empty list")
    rank, world = (runtime.rank, runtime.world) if runtime else (0, 1)
    mine = range(rank, len(examples), world)
    # a rank without an example of its own still takes part in the reduction below
    own = [examples[i] for i in mine]
    encode = encode or (lambda example: policy.encode(task.prompt(example)))
    trajectories, scores = [], []
    if own:
        found = sample_scored(
            policy,
            task,
            [encode(example) for example in own],
            own,
            sampler,
            seed=seed,
            sequence_ids=[evaluation_id(i) for i in mine],
            max_batch=max_batch,
            threads=threads,
        )
        trajectories, scores = found.trajectories, found.scores
    for i, trajectory in zip(mine, trajectories, strict=True):
        trajectory.task_id = i
    sums = MetricSums()
    sums.add_values("eval/correct", [t.correct for t in trajectories])
    sums.add_values("eval/reward", [t.reward for t in trajectories])
    sums.add_values("eval/length", [t.response_length for t in trajectories])
    sums.add_values("eval/nfe", [t.num_forwards for t in trajectories])
    failures = sum("checker_error" in t.detail for t in trajectories)
    sums.add_count("eval/checker_failures", failures)
    for name, value in task.metrics(scores).items() if hasattr(task, "metrics") and scores else ():
        sums.add(f"eval/{name}", value, len(scores))
    return Evaluation(metrics=sums.reduce(runtime), trajectories=trajectories)


def evaluation_id(example: int, number: int = 0) -> int:
    """Name of the draws of an example's completion ``number``."""
    return mix64(_EVALUATION, example, number) if number else mix64(_EVALUATION, example)


def evaluation_sampler(rollout: SamplerConfig, temperature: float | None) -> SamplerConfig:
    """The rollouts' own setting, but for the temperature if one is given."""
    return rollout if temperature is None else replace(rollout, temperature=temperature)
