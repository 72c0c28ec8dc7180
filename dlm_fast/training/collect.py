"""Prompts in, scored groups of rollouts out: the first half of an iteration, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.algorithms.contract import ResampleRequest, SamplingPlan
from dlm_fast.ops.philox import mix64
from dlm_fast.rollout.replay import cache_gaps
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory, trajectories_of
from dlm_fast.tasks import Score
from dlm_fast.training.metrics import MetricSums, Row
from dlm_fast.training.scored_rollouts import sample_scored


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of an iteration."""

    example: dict[str, Any]
    task_id: int
    """position of the example in its data set"""
    index: int
    """position of the prompt in the iteration, over all ranks"""


@dataclass(kw_only=True)
class _Row:
    """One rollout to be made."""

    group: Group
    group_id: int
    member: int
    sequence_id: int
    sampler: SamplerConfig
    fixed_ids: Tensor | None
    is_special: bool
    """hints and other samplers go through ``dlm_fast.sample``, not the plan's own rollout"""


class Collector:
    """Makes the groups of one iteration; remembers how many rollouts each prompt had."""

    def __init__(
        self,
        policy: Any,
        task: Any,
        plan: SamplingPlan,
        *,
        rollout: SamplerConfig,
        iteration: int,
        seed: int,
        policy_version: int,
        max_batch: int,
        threads: int = 0,
        encode: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """``encode``: prompt of an example as ids; by default the task's, in full."""
        self._policy, self._task, self._plan = policy, task, plan
        self._rollout = rollout
        self._iteration, self._seed = iteration, seed
        self._policy_version = policy_version
        self._max_batch, self._threads = max_batch, threads
        self._encode = encode or (lambda example: policy.encode(task.prompt(example)))
        self._index: dict[int, int] = {}  # id of a group -> index of its prompt
        self._members: dict[int, int] = {}  # index of a prompt -> rollouts so far
        self.resampled = 0
        self.scores: list[Score] = []
        """of every rollout so far, those that were asked for on top included"""
        self.waited_s = 0.0
        """seconds that scoring added to decoding"""
        self.cache_gaps: list[float] = []
        """of one rollout in each call of the sampler with an approximate cache: distances of its
        tokens' log-probabilities from exact ones"""

    def collect(self, prompts: Sequence[Prompt]) -> list[Group]:
        """The groups of this rank's prompts."""
        groups = []
        for prompt in prompts:
            group = Group(
                task_id=prompt.task_id,
                prompt_ids=self._encode(prompt.example),
                trajectories=[],
                example=prompt.example,
                trace=self._trace(prompt.example) if self._plan.traces else "",
            )
            self._index[id(group)] = prompt.index
            groups.append(group)
        if self._plan.sampler is None:
            for group in groups:
                group.trajectories = [self._demonstration(group)]
            return groups
        rows = [row for group in groups for row in self._rows(group, self._plan.group_size)]
        for row, trajectory in zip(rows, self._sample(rows), strict=True):
            row.group.trajectories.append(trajectory)
        return groups

    def resample(self, requests: Sequence[ResampleRequest]) -> list[list[Trajectory]]:
        """More scored rollouts, for ``Algorithm.refine``; one list per request."""
        rows_of = []
        for request in requests:
            fixed = request.fixed_ids
            if fixed is not None and len(fixed) != request.count:
                raise ValueError(
                    f"ResampleRequest: {len(fixed)} fixed_ids for count={request.count} rollouts"
                )
            rows_of.append(self._rows(request.group, request.count, request.sampler, fixed))
        made = iter(self._sample([row for rows in rows_of for row in rows]))
        lists = [[next(made) for _ in rows] for rows in rows_of]
        self.resampled += sum(map(len, lists))
        return lists

    def _trace(self, example: dict[str, Any]) -> str:
        try:
            return str(getattr(self._task, "trace", self._task.demonstration)(example))
        except ValueError:  # the example has no solution
            return ""

    def _rows(
        self,
        group: Group,
        count: int,
        sampler: SamplerConfig | None = None,
        fixed: Sequence[Tensor] | None = None,
    ) -> list[_Row]:
        if id(group) not in self._index:
            raise ValueError("ResampleRequest.group must be one of the groups given to refine")
        index = self._index[id(group)]
        first = self._members.get(index, 0)
        self._members[index] = first + count
        return [
            _Row(
                group=group,
                group_id=self._iteration * self._plan.num_prompts + index,
                member=member,
                # names the draws: the same in any layout of ranks and batches
                sequence_id=mix64(self._iteration, index, member),
                sampler=sampler or self._plan.sampler or self._rollout,
                fixed_ids=None if fixed is None else fixed[member - first],
                is_special=sampler is not None or fixed is not None,
            )
            for member in range(first, first + count)
        ]

    def _sample(self, rows: list[_Row]) -> list[Trajectory]:
        """Rolls out and scores; rows of one sampler are decoded together."""
        made: dict[int, tuple[Trajectory, Score]] = {}
        for sampler, is_special in dict.fromkeys((row.sampler, row.is_special) for row in rows):
            mine = [r for r in rows if (r.sampler, r.is_special) == (sampler, is_special)]
            prompts = [row.group.prompt_ids for row in mine]
            ids = [row.sequence_id for row in mine]
            fixed = [row.fixed_ids for row in mine]
            found = sample_scored(
                self._policy,
                self._task,
                prompts,
                [row.group.example for row in mine],
                sampler,
                seed=self._seed,
                sequence_ids=ids,
                fixed_ids=fixed if any(f is not None for f in fixed) else None,
                max_batch=self._max_batch,
                threads=self._threads,
                rollout=None if is_special else self._plan.rollout,
            )
            self.waited_s += found.waited_s
            if sampler.cache in ("prefix", "dual") and (is_special or self._plan.rollout is None):
                self.cache_gaps += cache_gaps(self._policy, found.trajectories[0], sampler).tolist()
            pairs = zip(found.trajectories, found.scores, strict=True)
            made |= dict(zip(map(id, mine), pairs, strict=True))
        trajectories = []
        for row in rows:
            trajectory, score = made[id(row)]
            trajectory.task_id, trajectory.group_id = row.group.task_id, row.group_id
            trajectory.member, trajectory.sequence_id = row.member, row.sequence_id
            trajectory.policy_version, trajectory.seed = self._policy_version, self._seed
            trajectories.append(trajectory)
            self.scores.append(score)
        return trajectories

    def _demonstration(self, group: Group) -> Trajectory:
        """The task's own answer, as the model would have to write it."""
        text = self._task.demonstration(group.example)
        ids = self._policy.encode(text, chat=False)
        window, eos_ids = self._rollout.max_new_tokens, self._policy.family.eos_ids
        if ids.numel() > window:
            raise ValueError(
                f"the demonstration of example {group.task_id} has {ids.numel()} tokens; raise "
                f"rollout.max_new_tokens (now {window}) or leave the example out"
            )
        missing = max(0, self._plan.fill_to - ids.numel()) or int(ids.numel() < window)
        if missing and eos_ids:
            ids = torch.cat([ids, ids.new_full((missing,), eos_ids[0])])
        index = self._index[id(group)]
        return Trajectory(
            prompt_ids=group.prompt_ids,
            response_ids=ids,
            task_id=group.task_id,
            group_id=self._iteration * self._plan.num_prompts + index,
            sequence_id=mix64(self._iteration, index, 0),
            policy_version=self._policy_version,
            seed=self._seed,
            block_size=self._rollout.block_size,
            finish_reason="data",
            text=text,
        )


def add_rollout_metrics(
    sums: MetricSums, groups: Sequence[Group], scores: Sequence[Score], task: Any
) -> None:
    """What the rollouts of an iteration were like, before ``refine``."""
    rollouts = trajectories_of(groups)
    rewards = [t.reward for t in rollouts]
    sums.add_values("reward/mean", rewards)
    sums.add_values("reward/squared", [r * r for r in rewards])
    sums.add_values("reward/correct", [t.correct for t in rollouts])
    sums.add_values("groups/zero_variance", [len(set(g.rewards.tolist())) == 1 for g in groups])
    lengths = [t.response_length for t in rollouts]
    sums.add_values("rollout/length", lengths)
    sums.add_values("rollout/nfe", [t.num_forwards for t in rollouts])
    forwards = sum(t.num_forwards for t in rollouts)
    sums.add_reported({"rollout/tokens_per_step": (float(sum(lengths)), float(forwards))})
    if hasattr(task, "metrics") and scores:
        for name, value in task.metrics(list(scores)).items():
            sums.add(f"task/{name}", value, len(scores))


def add_scoring_metrics(sums: MetricSums, scores: Sequence[Score], waited_s: float) -> None:
    """How the checker did on these rollouts; ``waited_s`` is the iteration's so far."""
    failures = sum("checker_error" in score.detail for score in scores)
    sums.add_count("reward/checker_failures", failures)
    sums.add_max("time/score_wait_s", waited_s)


def finish_rollout_metrics(row: Row) -> Row:
    """Turns the global mean square into a standard deviation."""
    squared = row.pop("reward/squared", None)
    if squared is not None:
        row["reward/std"] = max(0.0, squared - row["reward/mean"] ** 2) ** 0.5
    return row
