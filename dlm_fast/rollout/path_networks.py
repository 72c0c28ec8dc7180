"""Which network draws the tokens of paths: by the kind of the model and ``rollout.cache``."""

from __future__ import annotations

from typing import Any

from dlm_fast.rollout.block_paths import BlockPaths
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import Drawing, PathNetwork, WholePaths
from dlm_fast.rollout.pooled_blocks import PooledBlocks
from dlm_fast.rollout.pooled_paths import PooledPaths
from dlm_fast.rollout.sampler_config import SamplerConfig


def path_network(
    policy: Any, sampler: SamplerConfig, seed: int, forward: Forward | None
) -> PathNetwork:
    """Whole paths in every forward (cache none), or kept keys (tree)."""
    drawing = Drawing(
        sampler=sampler,
        forbid_ids=sampler.never_drawn(policy.family),
        eos_ids=frozenset(policy.family.eos_ids),
        seed=seed,
        device=getattr(policy, "device", "cpu"),
    )
    forward = forward or policy.stats
    is_kept = sampler.cache == "tree"
    if policy.family.kind == "block":
        return (PooledBlocks if is_kept else BlockPaths)(policy, forward, drawing)
    return (PooledPaths if is_kept else WholePaths)(policy, forward, drawing)
