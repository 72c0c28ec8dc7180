"""Language-model heads to measure on: sizes of real models, data like a language model's.

Letters: ``T`` rows of hidden states, ``N`` of them selected, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadSize:
    """Rows of hidden states, of them selected, width, vocabulary."""

    t: int
    n: int
    d: int
    v: int

    @property
    def ndv(self) -> int:
        """Products of one pass: a matrix product of the selected rows is 2 NDV flop."""
        return self.n * self.d * self.v


@dataclass
class Head:
    """Inputs of the head ops; hidden states and head are leaves that take gradients."""

    size: HeadSize
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor
    row_weight: Tensor

    def all_targets(self) -> Tensor:
        """int64 [T], -100 where a row is not selected."""
        labels = torch.full((len(self.hidden),), -100, device=self.hidden.device)
        labels[self.rows.long()] = self.targets
        return labels

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_head(
    size: HeadSize,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: str = "cpu",
    flat: bool = False,
) -> Head:
    """Rows of the head of norm 1, hidden states that lean to their targets.

    The median negative log-likelihood is about 1.6 at V = 32000 and 2.9 at 126464, as a language
    model's. ``flat``: small hidden states without a target, all probabilities nearly equal.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    weight = normal(size.v, size.d)
    weight /= weight.norm(dim=1, keepdim=True)
    targets = torch.randint(0, size.v, (size.n,), generator=generator, device=device)
    order = torch.randperm(size.t, generator=generator, device=device)
    rows = order[: size.n].sort().values
    hidden = (0.3 if flat else 2.0) * normal(size.t, size.d)
    if not flat:
        hidden[rows] += (5 + 12 * uniform(size.n, 1)) * weight[targets]
    row_weight = 0.1 + 9.9 * uniform(size.n)
    return Head(
        size,
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
        rows.to(torch.int32),
        row_weight,
    )
