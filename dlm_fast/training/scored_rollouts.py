"""Rollouts with their verdicts: a completion is scored while others are still being decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory
from dlm_fast.tasks import Score, ScoreStream


@dataclass(kw_only=True)
class ScoredRollouts:
    """What came out, in the order of the prompts."""

    trajectories: list[Trajectory]
    """with text, reward and verdict"""
    scores: list[Score]
    waited_s: float
    """seconds between the last token and the last verdict"""


def sample_scored(
    policy: Any,
    task: Any,
    prompts: Sequence[Tensor],
    examples: Sequence[dict[str, Any]],
    sampler: SamplerConfig,
    *,
    seed: int,
    sequence_ids: Sequence[int],
    fixed_ids: Sequence[Tensor | None] | None = None,
    max_batch: int | None = None,
    threads: int = 0,
    rollout: Callable[..., list[Trajectory]] | None = None,
    on_scored: Callable[[int, Trajectory], None] | None = None,
) -> ScoredRollouts:
    """One scored rollout per prompt.

    ``threads``: how many score beside the decoding, for tasks that allow it; 0: none. The verdicts
    are the same. ``rollout`` replaces ``dlm_fast.sample`` as in ``SamplingPlan``; its trajectories
    are scored when all of them are there. ``on_scored`` is called with the number of a prompt and
    its scored trajectory, each once and in no certain order, as verdicts come in.
    """
    done: dict[int, Trajectory] = {}
    with ScoreStream(task, threads=threads) as stream:

        def take(numbers: Sequence[int], trajectories: Sequence[Trajectory]) -> None:
            for number, trajectory in zip(numbers, trajectories, strict=True):
                trajectory.text = policy.decode(trajectory.response_ids)
                done[number] = trajectory
            texts = [trajectory.text for trajectory in trajectories]
            stream.add(numbers, texts, [examples[number] for number in numbers])
            tell(stream.ready())

        def tell(verdicts: dict[int, Score]) -> None:
            for number, score in verdicts.items():
                trajectory = done[number]
                trajectory.reward, trajectory.correct = float(score.reward), bool(score.correct)
                trajectory.detail = {**trajectory.detail, **score.detail}  # trees say theirs
                told.add(number)
                if on_scored is not None:
                    on_scored(number, trajectory)

        told: set[int] = set()
        if rollout is not None:
            keys = {"seed": seed, "sequence_ids": list(sequence_ids), "max_batch": max_batch}
            made = rollout(policy, prompts, sampler, **keys)
            if len(made) != len(prompts):
                raise ValueError(
                    f"rollout made {len(made)} trajectories for {len(prompts)} prompts"
                )
            take(range(len(made)), made)
        else:
            sample(
                policy,
                prompts,
                sampler,
                seed=seed,
                sequence_ids=sequence_ids,
                fixed_ids=fixed_ids,
                max_batch=max_batch,
                on_done=take,
            )
        scores = stream.finish()
        tell({n: score for n, score in enumerate(scores) if n not in told})
    trajectories = [done[number] for number in range(len(prompts))]
    return ScoredRollouts(trajectories=trajectories, scores=scores, waited_s=stream.waited_s)
