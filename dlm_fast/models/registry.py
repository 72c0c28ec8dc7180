"""The model families that can be loaded. A new one is its own file and a line here."""

from __future__ import annotations

from typing import Any

from dlm_fast.models import causal, dream, llada, sdar, tiny
from dlm_fast.models.family import FamilyFormat

FORMATS: dict[str, FamilyFormat] = {
    family_format.model_type: family_format
    for family_format in (
        llada.FORMAT,
        dream.FORMAT,
        sdar.FORMAT,
        causal.QWEN2,
        causal.QWEN3,
        causal.LLAMA,
        tiny.FORMAT,
    )
}


def format_of(config: dict[str, Any]) -> FamilyFormat:
    """The family that config.json names."""
    model_type = config.get("model_type")
    if model_type not in FORMATS:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; supported are "
            f"{', '.join(map(repr, FORMATS))}"
        )
    return FORMATS[model_type]
