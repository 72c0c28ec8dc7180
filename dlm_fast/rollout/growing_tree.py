"""One tree while it grows: which paths decode, what happens at the ends of segments.

Source: TreePO, arXiv 2508.17445. Random decisions are keyed by (seed, tree, event), so a tree does
not depend on its company.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dlm_fast.ops.philox import Rng, Stream, philox_uniform
from dlm_fast.rollout.path_nodes import PathNode, root_of
from dlm_fast.rollout.rollout_tree import Leaf, RolloutTree
from dlm_fast.rollout.tree_branching import (
    draw_between,
    first_copies,
    logprob_weights,
    share_by_weight,
    share_evenly,
    step_limit,
    temperature_at,
    total_copies,
    width_for_tokens,
)
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_fallback import Candidate, order_of, tokens_to_keep
from dlm_fast.rollout.tree_rules import Reason, SegmentEnd, classify

_PATIENCE = 4
"""fallbacks without a new leaf before short paths are kept"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What is the same for all trees of a call."""

    config: TreeConfig
    max_new_tokens: int
    """most tokens of a response"""
    decode: Callable[[Sequence[int]], str]
    """tokens to text"""
    finish: Callable[[PathNode], None]
    """a path is not continued, at least not now"""
    split: Callable[[PathNode, int], PathNode]
    """cuts a node"""
    forget: Callable[[Sequence[PathNode]], None]
    """nothing of these nodes is needed any more"""
    num_trees: int
    seed: int
    progress: float = 0.0
    """part of the training that is done, for temperatures that change"""
    grid: int = 1
    """segments end on multiples of the segment, counted from the last multiple of this at or
    before the end of the prompt"""


@dataclass(kw_only=True, eq=False)
class _Path:
    """A path that decodes, or waits at the end of its segment."""

    node: PathNode
    depth: int
    is_fallback: bool = False


class GrowingTree:
    """Decides; tokens come from a network. ``open_nodes`` are to be drawn for until they are not
    open any more, then ``advance`` goes on."""

    def __init__(
        self, prompt_ids: Tensor, *, sequence_id: int, leaves: int, growth: Growth
    ) -> None:
        self._growth, self._config = growth, growth.config
        root = root_of(prompt_ids.tolist(), sequence_id)
        self.tree = RolloutTree(prompt_ids=prompt_ids, root=root, sequence_id=sequence_id)
        self.leaves = leaves
        """finished paths it will have"""
        self._offset = root.stop % growth.grid
        self._paths: list[_Path] = []
        self._events = self._steps = 0
        self._idle_rounds, self._keeps_short = 0, False
        if self._config.budget == "response_tokens":
            self.leaves = self._config.max_width
        copies = first_copies(
            self._config,
            leaves=self.leaves,
            num_trees=growth.num_trees,
            uniform=self._uniforms(1)[0],
        )
        self._fork(root, 0, copies, is_fallback=False)

    @property
    def is_done(self) -> bool:
        return not self._paths

    @property
    def width(self) -> int:
        """Most paths that decode at once."""
        return self.leaves

    @property
    def open_nodes(self) -> list[PathNode]:
        return [path.node for path in self._paths if path.node.is_open]

    def advance(self, num_live_trees: int) -> None:
        """Looks at the paths whose segments have ended. With ``sync=path`` they fork one by one,
        else when all have ended."""
        if self._config.sync == "path":
            while (ended := next((p for p in self._paths if not p.node.is_open), None)) is not None:
                self._advance([ended], num_live_trees)
        elif self._paths and not self.open_nodes:
            self._advance(list(self._paths), num_live_trees)
        if not self._paths:
            self._fall_back()
        if not self._paths:
            self._growth.forget(list(self.tree.root.below()))

    def _advance(self, ended: list[_Path], num_live_trees: int) -> None:
        """Finishes some of these paths and forks the others; other paths stay as they are."""
        self._steps += 1
        reasons = [
            classify(self._segment_end(path), self._config, self._growth.decode) for path in ended
        ]
        gone = {id(path) for path in ended}
        place = next(i for i, path in enumerate(self._paths) if id(path) in gone)
        others = [path for path in self._paths if id(path) not in gone]
        for path, reason in zip(ended, reasons, strict=True):
            if reason is not None:
                self._finish(path, reason)
        self._paths = others
        surviving = [path for path, reason in zip(ended, reasons, strict=True) if reason is None]
        if surviving:
            num_finished = len(ended) - len(surviving)
            shares = self._shares(surviving, num_finished, len(others), num_live_trees)
            made = [
                child
                for path, share in zip(surviving, shares, strict=True)
                for child in self._children(path.node, path.depth, share, path.is_fallback)
            ]
            self._paths[place:place] = made  # copies stay where their path was: depth first

    def _segment_end(self, path: _Path) -> SegmentEnd:
        node, prompt_length = path.node, self.tree.root.stop
        return SegmentEnd(
            segment_ids=node.tokens,
            response_ids=node.path_tokens()[prompt_length:],
            depth=path.depth,
            is_stopped=node.is_stopped,
            max_tokens=self._growth.max_new_tokens,
        )

    def _shares(
        self, paths: list[_Path], just_finished: int, others: int, num_live_trees: int
    ) -> list[int]:
        config, finished = self._config, len(self.tree.leaves)
        branch = draw_between(config.branch, config.branch_max, self._uniforms(1)[0])
        if config.budget == "response_tokens":
            lengths = [path.node.stop - self.tree.root.stop for path in paths]
            self._set_width(sum(lengths) / len(lengths))
        limit = step_limit(
            config, leaves=self.leaves, finished=finished, num_live_trees=num_live_trees
        )
        if config.sync == "path":
            return [max(1, min(branch, limit - others))]
        total = total_copies(
            limit=limit, branch=branch, active=len(paths), just_finished=just_finished
        )
        if config.share == "even":
            return share_evenly(total, len(paths), last_takes_rest=config.compat)
        weights = logprob_weights(
            [self._score(path.node) for path in paths],
            prefer=config.share_prefer,
            temperature=temperature_at(config, self._growth.progress),
        )
        return share_by_weight(total, weights)

    def _score(self, node: PathNode) -> float:
        nodes = [node] if self._config.share_score == "segment" else node.path()[1:]
        # tokens of a block are drawn together: their confidence ranks the paths
        name = "confidences" if self._growth.grid > 1 else "logprobs"
        values = [value for one in nodes for value in getattr(one, name)]
        return sum(values) if self._config.share_score == "sum" else sum(values) / len(values)

    def _finish(self, path: _Path, reason: Reason) -> None:
        node, tree = path.node, self.tree
        is_short = node.stop - tree.root.stop < self._config.min_finished_tokens
        self._growth.finish(node)
        if is_short and not self._keeps_short:
            self._drop(node)
            return
        leaf = Leaf(node=node, reason=reason, is_fallback=path.is_fallback, step=self._steps)
        tree.leaves.append(leaf)
        self._idle_rounds = 0

    def _drop(self, node: PathNode) -> None:
        """Takes a path away, up to where another one needs it."""
        self.tree.dropped += 1
        ends = {id(leaf.node) for leaf in self.tree.leaves} | {id(p.node) for p in self._paths}
        ends.discard(id(node))
        while node.parent is not None and not node.children and id(node) not in ends:
            self._growth.forget([node])
            node.parent.children.remove(node)
            node = node.parent

    def _fall_back(self) -> None:
        """All paths are finished: goes on from some of them until the tree is full."""
        config, tree = self._config, self.tree
        if config.budget == "response_tokens" and tree.leaves:
            self._set_width(tree.flat_tokens / len(tree.leaves))
        missing = self.leaves - len(tree.leaves)
        if missing <= 0 or (config.fallback == "none" and tree.leaves):
            return
        tree.fallbacks += 1
        self._idle_rounds += 1
        if self._idle_rounds > _PATIENCE and not self._keeps_short:
            self._keeps_short = True
            _log.warning(
                "tree %d: %d paths in a row ended before tree.min_finished_tokens=%d tokens; short "
                "ones are kept from now on",
                tree.sequence_id,
                tree.dropped,
                config.min_finished_tokens,
            )
        found = [
            Candidate(reason=leaf.reason, length=tree.response_length(leaf)) for leaf in tree.leaves
        ]
        order = order_of(found, config, self._uniforms(len(found)))
        if config.cut == "from_start":
            order = order[:1]
        cut_at = self._uniforms(len(order))
        for leaf, uniform in zip([tree.leaves[i] for i in order], cut_at, strict=True):
            copies = min(config.branch, missing)
            if copies == 0:
                break
            node = self._cut(leaf, uniform)
            self._fork(node, len(node.path()) - 1, copies, is_fallback=True)
            missing -= copies
        if not order:
            self._fork(tree.root, 0, min(config.branch, missing), is_fallback=True)

    def _cut(self, leaf: Leaf, uniform: float) -> PathNode:
        """The node that ends where the leaf's path is cut."""
        path = leaf.node.path()[1:]
        logprobs = [value for node in path for value in node.logprobs]
        # segments count from the grid, so what the prompt holds of its last block counts
        length = len(logprobs) + self._offset
        padded = [0.0] * self._offset + logprobs
        keep = tokens_to_keep(length, self._config, uniform, padded)
        keep = keep // self._growth.grid * self._growth.grid - self._offset
        node, depth = self.tree.root, 0
        for depth, step in enumerate(path, 1):
            inside = keep - (step.start - self.tree.root.stop)
            if inside <= 0 or depth >= self._config.max_depth:
                break
            if inside < len(step.tokens):
                return self._growth.split(step, inside) if self._config.allow_split else node
            node = step
        return node

    def _fork(self, node: PathNode, depth: int, copies: int, *, is_fallback: bool) -> None:
        self._paths += self._children(node, depth, copies, is_fallback)

    def _children(self, node: PathNode, depth: int, copies: int, is_fallback: bool) -> list[_Path]:
        prompt_length, segment = self.tree.root.stop, self._config.segment
        used = node.stop - prompt_length
        # the first segment ends on the grid too
        room = segment - self._offset if node is self.tree.root else segment
        room = min(room, self._growth.max_new_tokens - used)
        return [
            _Path(node=node.grow(room), depth=depth + 1, is_fallback=is_fallback)
            for _ in range(copies)
        ]

    def _set_width(self, mean_length: float) -> None:
        tree = self.tree
        self.leaves = max(
            len(tree.leaves),
            width_for_tokens(
                self._config,
                finished=len(tree.leaves),
                finished_tokens=tree.flat_tokens,
                mean_length=mean_length,
            ),
        )

    def _uniforms(self, count: int) -> list[float]:
        """Numbers strictly between 0 and 1 for the next decision."""
        self._events += 1
        rng = Rng.of(self._growth.seed, Stream.TREE, [self.tree.sequence_id])
        return philox_uniform(rng.at(position=self._events), count)[0].tolist()
