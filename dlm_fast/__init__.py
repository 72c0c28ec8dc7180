"""dlm_fast: reinforcement learning of diffusion language models on fused kernels."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. Resolved on first use, so that ``import dlm_fast.ops`` needs torch
# and numpy alone.
_PUBLIC = {
    "load": "dlm_fast.models.load",
    "LoraOptions": "dlm_fast.models.lora_options",
    "Policy": "dlm_fast.models.policy",
    "ScoreRequest": "dlm_fast.models.requests",
    "Visibility": "dlm_fast.ops.visibility",
    "sample": "dlm_fast.rollout",
    "SamplerConfig": "dlm_fast.rollout",
    "Trajectory": "dlm_fast.rollout",
    "train": "dlm_fast.training",
    "Trainer": "dlm_fast.training",
}
_LAYERS = ("ops", "models", "rollout", "algorithms", "training", "tasks", "config")

__all__ = [*_PUBLIC, *_LAYERS]


def __getattr__(name: str) -> Any:
    if name in _LAYERS:
        return importlib.import_module(f"dlm_fast.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dlm_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
