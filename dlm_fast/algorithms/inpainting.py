"""Rollouts for prompts that none solved: decoded again around hints; right ones replace members.

Source: IGPO, arXiv 2509.10396, section 3 and its released code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dlm_fast.algorithms.contract import Metrics, Resample, ResampleRequest
from dlm_fast.algorithms.hints import Hint, HintRules, chunks, hint, without_answer
from dlm_fast.algorithms.igpo_options import IgpoOptions
from dlm_fast.ops import Rng, Stream, mix64, philox_uniform
from dlm_fast.rollout.trajectory import Group, Trajectory


class Inpainting:
    """What ``refine`` does, and counts."""

    def __init__(self, options: IgpoOptions, *, window: int, mask_id: int, seed: int) -> None:
        if options.guidance == "inpaint" and options.tail >= window:
            raise ValueError(
                f"algorithm.tail={options.tail} leaves no room for hints in a window of "
                f"rollout.max_new_tokens={window}; lower it"
            )
        self.options, self.window, self.mask_id, self.seed = options, window, mask_id, seed
        self.never_drawn: tuple[int, ...] = ()
        """ids that no rollout may hold"""
        self.rules = HintRules(
            window=window,
            tail=options.tail,
            chunk_min=options.chunk_min,
            chunk_max=options.chunk_max,
            placement=options.placement,
            count_round=options.count_round,
            reveal_last_chunk=options.reveal_last_chunk,
        )

    def refine(self, groups: list[Group], resample: Resample, policy: Any) -> Metrics:
        """Replaces members of the groups that no rollout solved; one decode for all of them."""
        metrics = _shares(groups, "before")
        failed = [group for group in groups if not any(t.correct for t in group.trajectories)]
        if self.options.guidance == "none":
            return metrics
        asked, requests, counts = [], [], dict.fromkeys(("eta", "tokens", "rows", "plain"), 0.0)
        no_trace = dropped = cut = 0
        for group in failed:
            count = len(group.trajectories)
            fixed = None
            if self.options.guidance == "inpaint":
                ids, lost, was_cut = self._trace(group, policy)
                dropped += lost
                cut += was_cut
                made = self._hints(group, ids, count, counts) if ids is not None else None
                if made is None:
                    no_trace += 1
                    continue
                fixed = [one.fixed_ids for one in made]
            asked.append(group)
            requests.append(ResampleRequest(group=group, count=count, fixed_ids=fixed))
        found = resample(requests) if requests else []
        replaced = rescued = right = rows = 0
        for group, rollouts in zip(asked, found, strict=True):
            members = self._replace(group, rollouts)
            replaced += members
            rescued += members > 0
            right += sum(t.correct for t in rollouts)
            rows += len(rollouts)
        metrics |= _shares(groups, "after")
        metrics |= {
            "igpo/rescued": (float(rescued), float(len(failed))),
            "igpo/right_again": (float(right), float(rows)),
            "igpo/replaced": (float(replaced), float(sum(len(g.trajectories) for g in groups))),
            "igpo/no_trace": (float(no_trace), float(len(failed))),
            "igpo/answers_cut": (float(cut), float(len(failed))),
            "igpo/special_tokens_dropped": (float(dropped), float(len(failed))),
            "igpo/eta": (counts["eta"], counts["rows"]),
            "igpo/hint_tokens": (counts["tokens"], counts["rows"]),
            "igpo/without_hint": (counts["plain"], counts["rows"]),
        }
        return metrics

    def _trace(self, group: Group, policy: Any) -> tuple[torch.Tensor | None, int, bool]:
        """Token ids of the solution, how many special ones it had, whether its answer was cut."""
        text, was_cut = group.trace, False
        if self.options.cut_answer:
            text, was_cut = without_answer(text)
        if not text.strip():
            return None, 0, was_cut
        ids = policy.encode(text, chat=False)
        family = policy.family
        special = {family.mask_id, family.pad_id, *family.eos_ids, *self.never_drawn} - {None}
        plain = ids[~torch.isin(ids, torch.tensor(sorted(special)))]
        return (plain if plain.numel() else None), ids.numel() - plain.numel(), was_cut

    def _hints(
        self, group: Group, ids: torch.Tensor, count: int, counts: dict[str, float]
    ) -> list[Hint] | None:
        """One for each rollout; None where the solution is too short for a chunk."""
        options, rules = self.options, self.rules
        name = group.trajectories[0].group_id
        shared = None
        if options.segment_per == "prompt":
            length = min(ids.numel(), rules.room)
            draw = self._draw(name, count)
            shared = chunks(length, rules.chunk_min, rules.chunk_max, draw)
        if ids.numel() < rules.chunk_min:
            return None
        made = []
        for member in range(count):
            draw = self._draw(name, member)
            eta = options.eta_low + (options.eta_high - options.eta_low) * draw()
            made.append(hint(ids, eta, rules, self.mask_id, draw, shared))
            counts["eta"] += eta
            counts["tokens"] += made[-1].num_tokens
            counts["plain"] += made[-1].num_tokens == 0
            counts["rows"] += 1
        return made

    def _replace(self, group: Group, rollouts: Sequence[Trajectory]) -> int:
        """Right rollouts in the places of members; how many."""
        right = [t for t in rollouts if t.correct]
        count = min(len(right), self.options.most_replaced)
        if len(right) > count:
            draw = self._draw(group.trajectories[0].group_id, len(rollouts) + 1)
            keys = [draw() for _ in right]
            chosen = sorted(sorted(range(len(right)), key=keys.__getitem__)[:count])
            right = [right[i] for i in chosen]
        places = list(range(len(group.trajectories)))
        if self.options.replace == "lowest":
            places.sort(key=lambda i: group.trajectories[i].reward)
        for place, trajectory in zip(places, right, strict=False):
            group.trajectories[place] = trajectory
        return count

    def _draw(self, group_id: int, number: int) -> Callable[[], float]:
        """Uniform numbers that belong to a group and a member, on whichever rank."""
        rng = Rng.of(mix64(self.seed, group_id, number), Stream.MASK, [0])
        numbers: Iterator[float] = iter(philox_uniform(rng, 2 * self.window + 8)[0].tolist())
        return lambda: next(numbers)


def _shares(groups: Sequence[Group], when: str) -> Metrics:
    """Groups that no rollout solved, that some did and that all did."""
    right = [(sum(t.correct for t in g.trajectories), len(g.trajectories)) for g in groups]
    count = float(len(groups))
    return {
        f"groups/all_wrong_{when}": (float(sum(r == 0 for r, _ in right)), count),
        f"groups/mixed_{when}": (float(sum(0 < r < n for r, n in right)), count),
        f"groups/all_right_{when}": (float(sum(r == n for r, n in right)), count),
    }
