"""Checks that the configurations of algorithms share; each error names the dotted option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dlm_fast.algorithms.elbo import PAIRED


def check_choices(config: Any) -> None:
    """Options whose type lists their values have one of them."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            names = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"algorithm.{field.name} must be one of {names}, got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Counts are integers from 1 on."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"algorithm.{name} must be a positive integer, got {value!r}")


def check_range(config: Any, low: float, high: float, *names: str) -> None:
    """Numbers from ``low`` to ``high``, both included; an infinite bound excludes infinity."""
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and abs(value) != float("inf")):
            raise ValueError(f"algorithm.{name} must lie in {low:g}..{high:g}, got {value!r}")


def check_mini_batch(size: int | None, group_size: int) -> None:
    """Optimizer steps hold whole groups."""
    if size is not None and (size < 1 or size % group_size):
        raise ValueError(
            "algorithm.mini_batch counts rollouts and must be a positive multiple of "
            f"algorithm.group_size={group_size}, got {size}"
        )


def check_pairs(sampler: str, num_samples: int) -> None:
    """Complementary samples come in pairs."""
    if sampler in PAIRED and num_samples % 2:
        raise ValueError(
            f"algorithm.sampler={sampler} draws pairs, so algorithm.num_samples must be even; got "
            f"{num_samples}"
        )
