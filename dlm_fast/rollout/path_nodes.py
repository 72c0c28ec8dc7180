"""The nodes of a tree of token paths while it grows: own tokens, a parent, the key of the draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dlm_fast.ops.philox import mix64


@dataclass(kw_only=True, eq=False, repr=False)
class PathNode:
    """A stretch of tokens that continues its parent's path; a root holds the prompt."""

    parent: PathNode | None = None
    key: int
    """sequence id of the random numbers of its tokens"""
    start: int = 0
    """tokens of the path before the node"""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """of each token as drawn (temperature 1, full vocabulary); empty for a root"""
    confidences: list[float] = field(default_factory=list)
    """of each token as drawn; empty for a root"""
    steps: list[int] = field(default_factory=list)
    """``step`` with which each token was drawn; empty for a root"""
    tail: list[int] = field(default_factory=list)
    """tokens of the last block behind the end of text (block models)"""
    tail_logprobs: list[float] = field(default_factory=list)
    tail_confidences: list[float] = field(default_factory=list)
    tail_steps: list[int] = field(default_factory=list)
    children: list[PathNode] = field(default_factory=list)
    step: int = 0
    """forwards that drew tokens of the path so far"""
    room: int = 0
    """most tokens the node may have"""
    is_stopped: bool = False
    """an end-of-text token was drawn"""
    births: int = 0
    """children ever made, dropped ones included"""
    handle: int = -1
    """of the node in a pool of keys; -1: it has none"""
    kept: int = 0
    """tokens whose keys are in the pool"""
    is_pinned: bool = False

    @property
    def stop(self) -> int:
        """Tokens of the path up to the end of the node."""
        return self.start + len(self.tokens)

    def path(self) -> list[PathNode]:
        """The nodes from the root to this one."""
        nodes: list[PathNode] = []
        node: PathNode | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def path_tokens(self) -> list[int]:
        """Token ids of the whole path."""
        return [token for node in self.path() for token in node.tokens]

    @property
    def is_open(self) -> bool:
        """More tokens will be drawn."""
        return not self.is_stopped and len(self.tokens) < self.room

    def grow(self, room: int) -> PathNode:
        """A new child without tokens, with room for so many.

        The first child goes on with its parent's random numbers; so a path that never forks draws
        what a flat rollout draws. Every other one has a key made of where and when it was born.
        """
        key = self.key if self.births == 0 else mix64(self.key, self.stop, self.births)
        child = PathNode(parent=self, key=key, start=self.stop, step=self.step, room=room)
        self.births += 1
        self.children.append(child)
        return child

    def split(self, count: int) -> PathNode:
        """Cuts the node after ``count`` of its tokens; returns the new node above the cut. What the
        pool holds is for its owner to split first."""
        if not 0 < count < len(self.tokens):
            raise ValueError(
                f"a node of {len(self.tokens)} tokens cannot be cut after {count}; both parts need "
                "a token"
            )
        upper = PathNode(parent=self.parent, key=self.key, start=self.start, children=[self])
        upper.births, upper.room = 1, count
        for name in ("tokens", "logprobs", "confidences", "steps"):
            values = getattr(self, name)
            setattr(upper, name, values[:count])
            setattr(self, name, values[count:])
        self.room -= count
        upper.step = upper.steps[-1] if upper.steps else 0
        upper.kept, self.kept = min(self.kept, count), max(self.kept - count, 0)
        if self.parent is not None:
            siblings = self.parent.children
            siblings[siblings.index(self)] = upper
        self.parent, self.start = upper, self.start + count
        return upper

    def below(self) -> Iterator[PathNode]:
        """Itself and all below it, parents first, children in the order of their birth."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


def root_of(prompt_ids: Sequence[int], key: int) -> PathNode:
    """A prompt."""
    return PathNode(key=key, tokens=list(prompt_ids))
