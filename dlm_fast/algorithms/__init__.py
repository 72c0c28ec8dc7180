"""The algorithms, each in a file that reads like its paper."""

from __future__ import annotations

from dlm_fast.algorithms import bgpo, coupled_grpo, diffu_grpo, grpo, igpo, sft, tracerl, treepo
from dlm_fast.algorithms.contract import Algorithm

ALGORITHMS: dict[str, tuple[type, type[Algorithm]]] = {
    "bgpo": (bgpo.Config, bgpo.BGPO),
    "coupled-grpo": (coupled_grpo.Config, coupled_grpo.CoupledGRPO),
    "diffu-grpo": (diffu_grpo.Config, diffu_grpo.DiffuGRPO),
    "igpo": (igpo.Config, igpo.IGPO),
    "tracerl": (tracerl.Config, tracerl.TraceRL),
    "treepo": (treepo.Config, treepo.TreePO),
    "grpo": (grpo.Config, treepo.TreePO),
    "sft": (sft.Config, sft.SFT),
}
"""name -> (configuration, algorithm); ``Config.build(...)`` makes one for a run"""

__all__ = ["ALGORITHMS", "Algorithm"]
