"""Trees of rollouts: many trees step in one batch, each branches when its own segments end.

Source: TreePO, arXiv 2508.17445.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops.tree_kv_pool import TreePoolExhausted
from dlm_fast.rollout.growing_tree import GrowingTree, Growth
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import PathNetwork
from dlm_fast.rollout.path_networks import path_network
from dlm_fast.rollout.path_nodes import root_of
from dlm_fast.rollout.requests import (
    check_family,
    check_max_batch,
    check_prompts,
    check_sequence_ids,
)
from dlm_fast.rollout.rollout_tree import RolloutTree
from dlm_fast.rollout.sampler import evaluating
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory
from dlm_fast.rollout.tree_config import TreeConfig


def sample_trees(
    policy: Any,
    prompts: Sequence[Tensor | str],
    sampler: SamplerConfig,
    tree: TreeConfig,
    seed: int = 0,
    *,
    sequence_ids: Sequence[int] | Tensor | None = None,
    leaves: Sequence[int] | None = None,
    progress: float = 0.0,
    max_batch: int | None = None,
    forward: Forward | None = None,
    on_done: Callable[[int, RolloutTree], None] | None = None,
) -> list[RolloutTree]:
    """One tree of responses per prompt.

    ``sampler``: how tokens are drawn, the longest response (with ``tree.segment`` times
    ``tree.max_depth``) and the pages of keys; ``cache`` is none (whole paths go through the network
    for every token: the definition) or tree. ``leaves``: of each tree, in place of ``tree.leaves``.
    ``progress``: part of the training that is done, for ``tree.share_temperature_end``.
    ``max_batch``: most paths in one forward; trees wait where there are more. ``on_done``: called
    with the number of a prompt and its finished tree. The others are as in ``sample``.
    """
    check_family(policy, sampler, for_trees=True)
    check_max_batch(max_batch)
    _check_tree(policy, sampler, tree)
    prompt_ids = _prompts(policy, prompts, sampler, tree)
    ids = check_sequence_ids(sequence_ids, len(prompt_ids))
    widths = _check_leaves(leaves, len(prompt_ids), tree)
    with torch.no_grad(), evaluating(policy):
        network = path_network(policy, sampler, seed, forward)
        growth = Growth(
            config=tree,
            max_new_tokens=_longest(sampler, tree),
            decode=policy.decode,
            finish=network.finish,
            split=network.split,
            forget=network.forget,
            num_trees=sum(prompt is not None for prompt in prompt_ids),
            seed=seed,
            progress=progress,
            grid=policy.family.block_size or 1,
        )
        growing = {
            number: GrowingTree(prompt, sequence_id=ids[number], leaves=width, growth=growth)
            for number, (prompt, width) in enumerate(zip(prompt_ids, widths, strict=True))
            if prompt is not None
        }
        _Batch(network, growing, tree.sync, max_batch, sampler.cache_pages).run(on_done)
        for one in growing.values():
            one.tree.pages_peak = network.pages_peak
    return [_tree(policy, growing.get(n), prompts[n]) for n in range(len(prompts))]


def rollout_trees(
    policy: Any,
    prompts: Sequence[Tensor],
    sampler: SamplerConfig,
    *,
    tree: TreeConfig,
    seed: int,
    sequence_ids: Sequence[int],
    progress: float = 0.0,
    max_batch: int | None = None,
) -> list[Trajectory]:
    """One rollout per entry, as ``SamplingPlan.rollout`` wants them: entries of one prompt that
    follow each other become the leaves of one tree, or of several with at most ``tree.leaves``
    each, whose nodes are numbered on. Bind ``tree`` with ``functools.partial``."""
    for name, value, wrong in (
        ("budget", tree.budget, "response_tokens"),
        ("fallback", tree.fallback, "none"),
        ("long_prompt", tree.long_prompt, "drop"),
    ):
        if value == wrong:
            raise ValueError(
                f"tree.{name}={wrong} gives trees with any number of leaves, but every group of "
                "rollouts has its size; choose another one"
            )
    groups = _groups(prompts)
    chunks = [
        (group, first, min(tree.leaves, group.stop - first))
        for group in groups
        for first in range(group.start, group.stop, tree.leaves)
    ]
    trees = sample_trees(
        policy,
        [prompts[first] for _, first, _ in chunks],
        sampler,
        tree,
        seed,
        sequence_ids=[sequence_ids[first] for _, first, _ in chunks],
        leaves=[count for _, _, count in chunks],
        progress=progress,
        max_batch=max_batch,
    )
    made: list[Trajectory] = []
    number = 0
    for (group, first, _), one in zip(chunks, trees, strict=True):
        number = 0 if first == group.start else number
        leaves = one.trajectories(
            seed=seed,
            block_size=policy.family.block_size or 1,
            record_confidence=sampler.record_confidence,
            first_number=number,
        )
        for leaf in leaves:
            leaf.detail["tree"]["pages_peak"] = one.pages_peak
        made += leaves
        number += len(one.numbers())
    return made


class _Batch:
    """The loop over all trees of a call."""

    def __init__(
        self,
        network: PathNetwork,
        growing: dict[int, GrowingTree],
        sync: str,
        max_batch: int | None,
        pages: int | None,
    ) -> None:
        self._network, self._growing, self._pages = network, growing, pages
        self._waits_for_all, self._max_batch = sync == "global", max_batch
        self._waiting = list(growing)[::-1]
        self._awake: list[int] = []
        self._may_enter = True

    def run(self, on_done: Callable[[int, RolloutTree], None] | None) -> None:
        while self._enter():
            self._step()
            # with sync=global trees that wait for pages take part too
            numbers = self._awake + (self._waiting if self._waits_for_all else [])
            live = [self._growing[number] for number in numbers]
            if self._waits_for_all and any(tree.open_nodes for tree in live):
                continue
            for tree in live:
                tree.advance(len(live))
            for number in numbers:
                if self._growing[number].is_done:
                    (self._awake if number in self._awake else self._waiting).remove(number)
                    self._may_enter = True
                    if on_done is not None:
                        on_done(number, self._growing[number].tree)

    def _enter(self) -> bool:
        """Lets trees in while their paths fit ``max_batch``, at least one."""
        if self._waits_for_all and not any(self._growing[n].open_nodes for n in self._awake):
            # those inside wait at the ends of their segments for those outside
            for number in self._awake:
                self._rest(number)
            self._waiting, self._awake = [*self._awake[::-1], *self._waiting], []
        while self._waiting and (self._may_enter or not self._awake):
            width = sum(self._growing[n].width for n in [*self._awake, self._waiting[-1]])
            too_many = self._max_batch is not None and width > self._max_batch
            if self._awake and too_many and not self._waits_for_all:
                break
            self._awake.append(self._waiting.pop())
        return bool(self._awake)

    def _step(self) -> None:
        """One forward for every open path, in batches of ``max_batch``; where pages run out, trees
        that came last wait until another one is finished."""
        stepped: set[int] = set()
        while True:
            open_nodes = (node for n in self._awake for node in self._growing[n].open_nodes)
            nodes = list(
                itertools.islice((n for n in open_nodes if id(n) not in stepped), self._max_batch)
            )
            if not nodes:
                return
            try:
                self._network.step(nodes)
            except TreePoolExhausted as error:
                if len(self._awake) == 1:
                    raise TreePoolExhausted(
                        f"one tree alone needs more pages than rollout.cache_pages={self._pages}; "
                        f"raise it or make the tree smaller ({error})"
                    ) from None
                self._put_back()
                continue
            stepped.update(map(id, nodes))
            if self._max_batch is None:
                return

    def _put_back(self) -> None:
        number = self._awake.pop()
        self._rest(number)
        self._waiting.append(number)
        self._may_enter = False

    def _rest(self, number: int) -> None:
        for node in self._growing[number].tree.root.below():
            self._network.finish(node)


def _longest(sampler: SamplerConfig, tree: TreeConfig) -> int:
    return min(sampler.max_new_tokens, tree.segment * tree.max_depth)


def _check_tree(policy: Any, sampler: SamplerConfig, tree: TreeConfig) -> None:
    family = policy.family
    if family.kind == "block" and tree.segment % family.block_size:
        raise ValueError(
            f"tree.segment={tree.segment} does not end on the blocks of {family.block_size} tokens "
            f"of model family {family.model_type!r}; set it to a multiple"
        )
    if not family.eos_ids:
        raise ValueError(
            f"model family {family.model_type!r} has no end-of-text token, so no path of a tree "
            "ends by itself; give one when loading the model (eos_ids=...)"
        )


def _prompts(
    policy: Any, prompts: Sequence[Tensor | str], sampler: SamplerConfig, tree: TreeConfig
) -> list[Tensor | None]:
    """Checked ids of each prompt; None: it is dropped."""
    given = check_prompts(policy, prompts, None)
    made: list[Tensor | None] = []
    for index, ids_P in enumerate(given):
        length = ids_P.numel()
        if length > tree.max_prompt:
            if tree.long_prompt == "error":
                raise ValueError(
                    f"prompt {index} has {length} tokens, more than tree.max_prompt="
                    f"{tree.max_prompt}; raise it, or set tree.long_prompt to truncate_left or drop"
                )
            if tree.long_prompt == "drop":
                made.append(None)
                continue
            ids_P = ids_P[-tree.max_prompt :]
        limit, longest = policy.family.max_length, _longest(sampler, tree)
        if limit is not None and ids_P.numel() + longest > limit:
            raise ValueError(
                f"prompt {index} of {ids_P.numel()} tokens plus tree.segment={tree.segment} times "
                f"tree.max_depth={tree.max_depth} tokens (at most rollout.max_new_tokens="
                f"{sampler.max_new_tokens}) exceeds the model's {limit}; make one of them smaller"
            )
        made.append(ids_P)
    return made


def _check_leaves(leaves: Sequence[int] | None, count: int, tree: TreeConfig) -> list[int]:
    if leaves is None:
        return [tree.leaves] * count
    if len(leaves) != count or any(number < 1 for number in leaves):
        raise ValueError(
            f"leaves must hold a number from 1 on for each of {count} prompts, got {list(leaves)}"
        )
    return list(leaves)


def _groups(prompts: Sequence[Tensor]) -> list[range]:
    """Runs of equal prompts."""
    groups: list[range] = []
    for index, prompt in enumerate(prompts):
        if groups and torch.equal(prompts[groups[-1].start], prompt):
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
    return groups


def _tree(policy: Any, growing: GrowingTree | None, prompt: Tensor | str) -> RolloutTree:
    if growing is not None:
        return growing.tree
    ids_P = policy.encode(prompt) if isinstance(prompt, str) else prompt
    return RolloutTree(prompt_ids=ids_P, root=root_of(ids_P.tolist(), 0))
