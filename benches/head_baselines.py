"""Sizes and rivals of the language-model-head benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from providers import torch_forms
from torch import Tensor

from dlm_fast.benchmark.problem import Head, HeadSize
from dlm_fast.benchmark.rivals import all_positions, gather_first

SIZES = {
    # LLaDA-8B with every length divided by four: half of a response of 512 tokens is masked
    "llada-quarter": HeadSize(512, 254, 1024, 32000),
    # one block of 32 tokens of eight sequences, width of Qwen3-0.6B, a quarter of its vocabulary
    "qwen3-block": HeadSize(512, 256, 1024, 37984),
    # one denoising step of one sequence
    "decode": HeadSize(64, 8, 1024, 32000),
    # the built-in model: a mini-batch of its demonstration
    "tiny": HeadSize(16384, 8000, 96, 100),
}


BASELINES: dict[str, Callable[[Head], Tensor]] = {
    "eager_gather_first": gather_first,
    "eager_all_positions": all_positions,
}
if torch_forms.HAS_CHUNKED:
    BASELINES["torch_chunked"] = torch_forms.chunked_logprob


def describe(benchmark, size: HeadSize, dtype: torch.dtype, flop_per_logit: int) -> None:
    """What turns a time into a rate: arithmetic, bytes that must move, threads."""
    benchmark.extra_info["flop"] = flop_per_logit * size.n * size.d * size.v
    benchmark.extra_info["bytes"] = dtype.itemsize * (size.v + size.n) * size.d
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__
