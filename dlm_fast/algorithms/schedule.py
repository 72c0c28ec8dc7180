"""Phases of a run: block sizes of decoding and training, and the length of responses.

Enlarging blocks: first train on blocks that hold several of the blocks that are decoded, then
decode in the larger ones (TraceRL, arXiv 2509.06949, section 5.8: 60 iterations decoded in blocks
of 4 and trained in blocks of 8, then 40 decoded and trained in blocks of 8). A length curriculum:
short responses first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from dlm_fast.rollout.sampler_config import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some iterations with a setting of their own; what is left out is as in ``rollout``."""

    iterations: int | None = None
    """how many; the last phase needs none and goes on to the end"""
    block_size: int | None = None
    """blocks that are decoded"""
    train_block_size: int | None = None
    """blocks that are trained, a multiple of those decoded; by default the same"""
    steps: int | None = None
    """denoising steps of the window; by default as many per token as ``rollout`` has"""
    max_new_tokens: int | None = None
    """length of the window, at most that of ``rollout``"""

    @staticmethod
    def parse(text: str) -> Phase:
        """From ``"iterations=60,train_block_size=8"``."""
        known = [field.name for field in fields(Phase)]
        found: dict[str, int] = {}
        for part in str(text).split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            if name not in known or not equals or name in found:
                raise ValueError(
                    f"algorithm.schedule: {part.strip()!r} in {text!r} must be NAME=NUMBER, each "
                    f"name once, one of {', '.join(known)}"
                )
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise ValueError(
                    f"algorithm.schedule: {name} in {text!r} must be a positive integer, got "
                    f"{value!r}"
                )
            found[name] = int(value)
        return Phase(**found)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What holds in an iteration."""

    rollout: SamplerConfig
    train_block_size: int


def parse_schedule(texts: Sequence[str]) -> tuple[Phase, ...]:
    """The phases of ``algorithm.schedule``; all but the last say how long they are."""
    phases = tuple(Phase.parse(text) for text in texts)
    for text, phase in list(zip(texts, phases, strict=True))[:-1]:
        if phase.iterations is None:
            raise ValueError(
                f"algorithm.schedule: {text!r} is not the last phase, so it needs iterations=N"
            )
    return phases


class Schedule:
    """The stage of every iteration."""

    def __init__(self, texts: Sequence[str], rollout: SamplerConfig) -> None:
        """ValueError where a phase and ``rollout`` do not fit."""
        self._phases = parse_schedule(texts) or (Phase(),)
        self._stages = [_stage(phase, rollout) for phase in self._phases]

    def at(self, iteration: int) -> Stage:
        """Of iteration ``iteration``, from 0; the last phase goes on."""
        for phase, stage in zip(self._phases, self._stages, strict=True):
            if phase.iterations is None or iteration < phase.iterations:
                return stage
            iteration -= phase.iterations
        return self._stages[-1]

    @property
    def block_sizes(self) -> set[int]:
        """Of decoding and training, in all phases."""
        return {size for s in self._stages for size in (s.rollout.block_size, s.train_block_size)}


def _stage(phase: Phase, rollout: SamplerConfig) -> Stage:
    window = phase.max_new_tokens or rollout.max_new_tokens
    if window > rollout.max_new_tokens:
        raise ValueError(
            f"algorithm.schedule: max_new_tokens={window} is above rollout.max_new_tokens="
            f"{rollout.max_new_tokens}, which must hold the longest phase"
        )
    block_size = phase.block_size or rollout.block_size
    in_proportion = -(-rollout.steps * window // rollout.max_new_tokens)
    sampler = replace(
        rollout,
        max_new_tokens=window,
        block_size=block_size,
        steps=phase.steps or max(in_proportion, -(-window // block_size)),
    )
    train_block_size = phase.train_block_size or block_size
    if train_block_size % block_size:
        raise ValueError(
            f"algorithm.schedule: train_block_size={train_block_size} must be a multiple of the "
            f"blocks that are decoded, {block_size} tokens each"
        )
    return Stage(rollout=sampler, train_block_size=train_block_size)
