"""Rows whose tokens the kernels choose, and where their outputs go, for tests of those kernels."""

from __future__ import annotations

import contextvars
import functools
from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops import Rng, Stream, TokenStats, token_stats
from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops.philox import philox_uniform

NUMBERS = ("confidence", "lse", "entropy", "margin", "logprob", "row_max", "log_sum")
TOLERANCE = {"confidence": 1e-5, "lse": 1e-4, "entropy": 2e-4, "margin": 1e-5, "logprob": 1e-4}


class Rows:
    """What the extension's ``TokenRows`` refers to; outputs start as NaN, tokens as -7."""

    def __init__(
        self,
        count: int,
        vocabulary: int,
        *,
        temperature: float = 1.0,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        skip_ignored: bool = False,
        forbid_ids: list[int] | None = None,
        rng: Rng | None = None,
        draw_temperature: float = 1.0,
    ) -> None:
        forbidden = torch.tensor(forbid_ids or [], dtype=torch.int64)
        self.alive = (bias, rows, targets, forbidden, rng)
        self.out = {name: torch.full((count,), torch.nan) for name in NUMBERS}
        self.out["token"] = torch.full((count,), -7)
        counters = (0, 0, 0) if rng is None else addresses(rng.keys, rng.position, rng.step)
        self.count, self.vocabulary = count, vocabulary
        self.bound = extension().TokenRows(
            (count, vocabulary),
            temperature,
            addresses(bias, rows, targets),
            skip_ignored,
            (*addresses(forbidden), len(forbidden)),
            counters,
            0 if rng is None else rng.draw,
            draw_temperature,
            addresses(self.out["token"], *(self.out[name] for name in NUMBERS)),
        )


def same_numbers(ours: dict[str, Tensor], truth: Any, names: Any = TOLERANCE) -> None:
    """Within the tolerances of the head ops, of a ``TokenStats`` in float64; NaN equals NaN."""
    for name in names:
        torch.testing.assert_close(
            ours[name].double(),
            getattr(truth, name).double(),
            atol=TOLERANCE[name],
            rtol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def on_cpu(hidden: Tensor, weight: Tensor, **options: Any) -> TokenStats:
    """What the op says on the CPU, outside of the emulator that the test runs in."""
    return contextvars.Context().run(functools.partial(token_stats, hidden, weight, **options))


def equal_noise(vocabulary: int, count: int) -> tuple[Rng, Tensor]:
    """Rows of which two columns have the same noise, and logits that let these two win."""
    rng = Rng.of(0, Stream.TOKEN, list(range(3000)))
    sorted_RV, order_RV = philox_uniform(rng, vocabulary).sort(dim=-1)
    row, place = (sorted_RV[:, 1:] == sorted_RV[:, :-1]).nonzero()[:count].unbind(1)
    assert len(row) == count and len(set(row.tolist())) == count
    logits_NV = torch.zeros(count, vocabulary)
    for column in (order_RV[row, place], order_RV[row, place + 1]):
        logits_NV[torch.arange(count), column] = 50.0
    return rng.take(row.tolist()), logits_NV
