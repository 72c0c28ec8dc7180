"""Pieces of a reference solution that a rollout is given: how they are cut, chosen and placed.

A trace of ``a`` tokens is cut into chunks of random length; a share eta of them is kept, and placed
in a window of L tokens whose last ``tail`` stay free for the answer. What is not given is masked.
Source: IGPO, arXiv 2509.10396, section 3 (in place), and its released code (stretched).

Letters: ``L`` tokens of the window, ``a`` tokens of the trace.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Span = tuple[int, int]
"""first token, and the one behind the last"""

ANSWER_MARKS = ("The answer is", "####", "\\boxed{", "<answer>")
"""what a final answer begins with"""

MAX_STRETCH = 1.5
MAX_SPACING = 100
_HALF_ULP = 1e-9
"""products such as 5 * 0.4 may come out just below the integer that they are"""


@dataclass(frozen=True, kw_only=True)
class HintRules:
    """How hints are made of a trace."""

    window: int
    """L, tokens of a response"""
    tail: int
    """tokens at the window's end that no hint covers"""
    chunk_min: int
    """shortest chunk, in tokens"""
    chunk_max: int
    """longest chunk, in tokens"""
    placement: Literal["stretch", "inplace"]
    """inplace: tokens keep their index. stretch: a trace shorter than the room is spread over it"""
    count_round: Literal["floor", "ceil"]
    """of eta times the number of chunks"""
    reveal_last_chunk: bool
    """the trace's last chunk is always given"""

    @property
    def room(self) -> int:
        """Tokens that hints may cover."""
        return self.window - self.tail


@dataclass(frozen=True, kw_only=True, eq=False)
class Hint:
    """A rollout's start."""

    fixed_ids: Tensor
    """int64 [L], the mask id where free"""
    mask: Tensor
    """bool [L], True where a token is given"""

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def without_answer(text: str) -> tuple[str, bool]:
    """The trace up to its final answer, and whether there was one to cut."""
    found = re.search("|".join(map(re.escape, ANSWER_MARKS)), text)
    return (text[: found.start()], True) if found else (text, False)


def chunks(length: int, low: int, high: int, draw: Callable[[], float]) -> list[Span]:
    """Contiguous chunks from the left, lengths uniform in ``low``..``high``; what is left over is a
    chunk if it has ``low`` tokens. ``draw`` gives uniform numbers in (0, 1)."""
    made: list[Span] = []
    begin = 0
    while begin < length:
        size = min(low + int(draw() * (high - low + 1)), length - begin)
        if size < low:
            break
        made.append((begin, begin + size))
        begin += size
    return made


def num_chosen(chunks: int, eta: float, rounding: Literal["floor", "ceil"]) -> int:
    """How many of the chunks are given."""
    if rounding == "floor":
        return math.floor(eta * chunks + _HALF_ULP)
    return chunks - math.floor((1 - eta) * chunks + _HALF_ULP)


def choose(
    made: Sequence[Span], eta: float, rules: HintRules, draw: Callable[[], float]
) -> list[Span]:
    """A uniform random subset, in the order of the trace."""
    count = num_chosen(len(made), eta, rules.count_round)
    order = sorted(range(len(made)), key=[draw() for _ in made].__getitem__)
    chosen = set(order[:count])
    if rules.reveal_last_chunk and made and eta > 0:
        chosen.add(len(made) - 1)
    return [made[i] for i in sorted(chosen)]


def placed(chosen: Sequence[Span], length: int, rules: HintRules) -> list[Span]:
    """Where each chunk lies in the window, those that fit; the last one may be cut."""
    room = rules.room
    if rules.placement == "inplace":
        spans = list(chosen)
    else:
        stretch = min(max(room / max(1, length), 1.0), MAX_STRETCH)
        spans = []
        before = 0
        for begin, end in chosen:
            if spans:
                first = spans[-1][1] + min(math.floor((begin - before) * stretch), MAX_SPACING)
            else:
                first = math.floor(begin * stretch)
            spans.append((first, first + end - begin))
            before = end
    return [(begin, min(end, room)) for begin, end in spans if begin < room]


def hint(
    trace_ids: Tensor,
    eta: float,
    rules: HintRules,
    mask_id: int,
    draw: Callable[[], float],
    cut: Sequence[Span] | None = None,
) -> Hint:
    """The start of one rollout from a trace int64 [a]; no trace, no hint.

    ``cut``: its chunks, where all rollouts of a prompt share them.
    """
    trace_ids = trace_ids[: rules.room]
    length = trace_ids.numel()
    if cut is None:
        cut = chunks(length, rules.chunk_min, rules.chunk_max, draw)
    chosen = choose(cut, eta, rules, draw)
    fixed_ids = torch.full((rules.window,), mask_id, dtype=torch.int64)
    mask = torch.zeros(rules.window, dtype=torch.bool)
    for (source, _), (begin, end) in zip(chosen, placed(chosen, length, rules), strict=False):
        fixed_ids[begin:end] = trace_ids[source : source + end - begin]
        mask[begin:end] = True
    return Hint(fixed_ids=fixed_ids, mask=mask)
