"""Stands in for hypothesis where it is not installed: its tests are skipped, the others still run.

benches/gpu_check.sh puts this folder on the path of machines without it; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class _Anything:
    """Answers to every name and every call with itself."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __or__(self, _: Any) -> _Anything:
        return self


strategies = _Anything()
assume = note = event = target = _Anything()
HealthCheck = Phase = Verbosity = _Anything()


def given(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """The test is skipped before anybody asks for the arguments that would be drawn."""
    return pytest.mark.skip(reason="hypothesis is not installed")


def _unchanged(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda test: test


settings = example = seed = reproduce_failure = _unchanged
