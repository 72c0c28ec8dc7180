"""A sampler of trees in miniature, without fallback, over a softmax table: for statistics."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence

import torch

from dlm_fast.rollout.tree import PackedTree

STOP = 0


def tree_of(parents: Sequence[int], tokens: Sequence[int], leaves: Sequence[int]) -> PackedTree:
    """Of nodes of one token each, in order of creation (0 is the prompt)."""
    children: dict[int, list[int]] = {}
    for node in range(len(parents) - 1, 0, -1):
        children.setdefault(parents[node], []).append(node)
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack += children.get(order[-1], [])
    row = {node: n for n, node in enumerate(order)}
    return PackedTree(
        tokens=torch.tensor([tokens[node] for node in order]),
        tok_off=torch.arange(len(order) + 1),
        parent=torch.tensor([row.get(parents[node], -1) for node in order]),
        node_id=torch.tensor([node - 1 for node in order]),
        logp=torch.zeros(len(order)),
        leaf_node=torch.tensor([row[node] for node in leaves]),
    )


def grow(
    draw: Callable[[tuple[int, ...]], int], *, width: int, first: int, branch: int, depth: int
) -> PackedTree:
    """One token per segment; ``draw(prefix)`` is the next one, ``STOP`` ends a path.

    Copies: T = max(a, min(w - F, b (a + f))), shared evenly, the remainder to the first ones.
    """
    parents, tokens, leaves = [-1], [0], []
    active: list[tuple[int, tuple[int, ...]]] = [(0, ())] * first
    while active:
        survivors = []
        for parent, prefix in active:
            token = draw(prefix)
            parents.append(parent)
            tokens.append(token)
            node = len(parents) - 1
            if token == STOP or len(prefix) + 1 == depth:
                leaves.append(node)
            else:
                survivors.append((node, (*prefix, token)))
        alive = len(survivors)
        total = max(alive, min(width - len(leaves), branch * len(active))) if alive else 0
        active = [
            one
            for k, one in enumerate(survivors)
            for _ in range(total // alive + (k < total % alive))
        ]
    return tree_of(parents, tokens, leaves)


def uniform_numbers(seed: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(4096, generator=generator, dtype=torch.float64).tolist()


class SoftmaxTable:
    """pi(token | prefix) = softmax of a row of logits for each prefix; rewards by text."""

    def __init__(self, vocab: int, depth: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.vocab, self.depth = vocab, depth
        self.prefixes: list[tuple[int, ...]] = [()]
        for prefix in self.prefixes:
            if len(prefix) < depth - 1:
                self.prefixes += [(*prefix, token) for token in range(1, vocab)]
        self.row = {prefix: n for n, prefix in enumerate(self.prefixes)}
        shape = (len(self.prefixes), vocab)
        self.logits = 0.7 * torch.randn(shape, generator=draw, dtype=torch.float64)
        self.probs = self.logits.softmax(-1)
        self.reward: dict[tuple[int, ...], float] = {}
        for prefix in self.prefixes:
            for token in range(vocab):
                if token == STOP or len(prefix) + 1 == depth:
                    self.reward[(*prefix, token)] = float(torch.randn((), generator=draw))

    def sampler(self, seed: int) -> Callable[[tuple[int, ...]], int]:
        numbers = uniform_numbers(seed)
        bounds = self.probs.cumsum(-1)[:, :-1].tolist()
        return lambda prefix: bisect.bisect(bounds[self.row[prefix]], next(numbers))

    def probability(self, text: tuple[int, ...]) -> torch.Tensor:
        """Differentiable in ``logits``."""
        probs = self.logits.softmax(-1)
        steps = [probs[self.row[text[:k]], token] for k, token in enumerate(text)]
        return torch.stack(steps).prod()

    def expected(self, value: Callable[[tuple[int, ...]], float]) -> float:
        return sum(float(self.probability(text)) * value(text) for text in self.reward)

    def gradient(self) -> torch.Tensor:
        """Of the expected reward, by enumeration: [prefixes, vocab]."""
        self.logits.requires_grad_(True)
        total = torch.stack([self.probability(text) * r for text, r in self.reward.items()]).sum()
        (gradient,) = torch.autograd.grad(total, self.logits)
        self.logits.requires_grad_(False)
        return gradient
