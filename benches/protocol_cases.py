"""The cases of the protocol: which task, on which head or layer, in which type, by whom.

T1 log-probabilities, T1+ with all statistics, T2 a step whose weights are known (T2B: with fresh
gradients in the types of the inputs), T3 a step whose
weights come later, T4 many samples into one gradient, T5 shares of masked positions, T6 decoding,
T7 gradients of a linear layer over samples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from dlm_fast.benchmark.problem import HeadSize

GATHERING = "eager, gather first"
EVERYWHERE = "eager, all positions"


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """A work on a language-model head."""

    task: str
    work: str
    size: HeadSize
    dtype: str
    data: str = "lm"
    """lm: like a language model's; flat: nearly equal probabilities"""
    variant: str = ""
    samples: int = 1
    """micro-steps that share one main gradient"""
    temperature: float = 0.0
    providers: tuple[str, ...] | None = None
    """names; None: everybody"""
    memory: bool = False
    """measure the memory of each provider too"""


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """Gradients of one linear layer over samples of equal length."""

    task: str
    work: str
    """sum: from the samples' rows; clipped: the same, each scaled by min(1, bound / norm); given:
    samples' gradients that exist already, and their norms"""
    samples: int
    rows: int
    """of each sample"""
    width_in: int
    width_out: int
    dtype: str


Case = HeadCase | LinearCase

WORK_OF = {"T1": "score", "T1+": "statistics", "T2": "weighted_step", "T3": "step"}
KEY_PROVIDERS = ("dlm_fast", GATHERING, EVERYWHERE)
REFERENCE = HeadSize(512, 254, 1024, 32000)
LARGE = HeadSize(512, 256, 1024, 126464)


def cpu_cases(threads: int) -> list[Case]:
    """The reference head with everybody and the large one with those that count; the rest, on one
    thread alone. Of providers that use autograd T2 and T3 are the same call."""
    dtypes = ("float32", "bfloat16")
    cases: list[Case] = [
        HeadCase(
            task=task,
            work=WORK_OF[task],
            size=REFERENCE,
            dtype=dtype,
            providers=KEY_PROVIDERS if task == "T3" else None,
            memory=task in ("T1", "T2"),
        )
        for dtype, task in itertools.product(dtypes, ("T1", "T1+", "T2", "T3"))
    ]
    cases += [
        HeadCase(
            task=task,
            work=WORK_OF[task],
            size=LARGE,
            dtype=dtype,
            providers=KEY_PROVIDERS,
            memory=True,
        )
        for dtype, task in itertools.product(dtypes, ("T1", "T2"))
    ]
    if threads > 1:
        return cases
    cases += [
        HeadCase(
            task="T2B",
            work="gradients",
            size=REFERENCE,
            dtype=dtype,
            providers=(*KEY_PROVIDERS, "dlm_fast, token_logprob"),
        )
        for dtype in dtypes
    ]
    cases += _decoding(REFERENCE, dtypes)
    cases += _masking(512, REFERENCE, dtypes, ("dlm_fast", "dLLM-style", GATHERING, EVERYWHERE))
    # a quarter of the widths and lengths of a 7B model's layer, and of its head
    cases += _linear(8, 128, 1024, 2752, dtypes) + _linear(8, 128, 1024, 32000, ("float32",))
    cases += [
        _many_samples(HeadSize(512, 256, 1024, 32000), 16, dtype, ("dlm_fast", GATHERING))
        for dtype in dtypes
    ]
    cases += [_flat("T2", REFERENCE, dtype, KEY_PROVIDERS) for dtype in dtypes]
    return cases


_SAMPLE_PROVIDERS = (
    "dlm_fast",
    "dlm_fast, CuPy kernels",
    GATHERING,
    "cut-cross-entropy, unfiltered",
    "liger-kernel",
    "liger-kernel scaled, gather first",
    "quack-kernels",
)
_MASK_PROVIDERS = (
    "dlm_fast",
    "dlm_fast, CuPy kernels",
    "dLLM-style",
    GATHERING,
    EVERYWHERE,
    "cut-cross-entropy",
    "cut-cross-entropy, unfiltered",
    "liger-kernel scaled, all positions",
    "liger-kernel scaled, gather first",
)
# (D, V) of the sizes on a GPU
_HEADS = ((2048, 32000), (2048, 157184), (3584, 152064), (4096, 126464), (4096, 151936))


def cuda_cases() -> list[Case]:
    """The shapes of published models, bfloat16; the shape of the targets first."""
    target = HeadSize(8192, 4096, 4096, 126464)
    sizes = [
        HeadSize(2 * n, n, d, v) for (d, v), n in itertools.product(_HEADS, (4096, 1024, 16384))
    ]
    sizes = [target, *(size for size in sizes if size != target)]
    tasks = ("T1", "T1+", "T2", "T3")
    cases: list[Case] = [
        HeadCase(task=task, work=WORK_OF[task], size=target, dtype="bfloat16", memory=True)
        for task in tasks
    ]
    cases += [
        _many_samples(HeadSize(2048, n, 4096, 126464), 16, "bfloat16", _SAMPLE_PROVIDERS)
        for n in (256, 1024)
    ]
    cases += _decoding(HeadSize(64, 64, 4096, 126464), ("bfloat16",))
    cases += _masking(8192, target, ("bfloat16",), _MASK_PROVIDERS)
    cases += _linear(32, 512, 4096, 11008, ("bfloat16",))
    cases += _linear(32, 512, 4096, 126464, ("bfloat16",))
    cases += [_flat("T2", target, "bfloat16", None)]
    cases += [
        HeadCase(task=task, work=WORK_OF[task], size=size, dtype="bfloat16", memory=True)
        for size, task in itertools.product(sizes[1:], tasks)
    ]
    return cases


def _flat(task: str, size: HeadSize, dtype: str, providers: tuple[str, ...] | None) -> HeadCase:
    return HeadCase(
        task=task,
        work=WORK_OF[task],
        size=size,
        dtype=dtype,
        data="flat",
        variant="flat data",
        providers=providers,
    )


def _many_samples(size: HeadSize, samples: int, dtype: str, providers: tuple[str, ...]) -> HeadCase:
    """``size`` is that of one sample."""
    return HeadCase(
        task="T4",
        work="weighted_step",
        size=size,
        dtype=dtype,
        samples=samples,
        variant=f"{samples} samples",
        providers=providers,
    )


def _masking(
    t: int, size: HeadSize, dtypes: Iterable[str], providers: tuple[str, ...]
) -> list[Case]:
    return [
        HeadCase(
            task="T5",
            work="weighted_step",
            size=dataclasses.replace(size, t=t, n=t * percent // 100),
            dtype=dtype,
            variant=f"{percent} % selected",
            providers=providers,
        )
        for dtype, percent in itertools.product(dtypes, (15, 50, 90))
    ]


def _decoding(size: HeadSize, dtypes: Iterable[str]) -> list[Case]:
    """A few rows of one block of 64 positions: the most likely token, then a draw."""
    return [
        HeadCase(
            task="T6",
            work="decode",
            size=dataclasses.replace(size, t=64, n=n),
            dtype=dtype,
            variant="draw" if temperature else "argmax",
            temperature=temperature,
            providers=("dlm_fast", "dlm_fast, CuPy kernels", GATHERING, EVERYWHERE, "dLLM-style"),
        )
        for dtype, temperature, n in itertools.product(dtypes, (0.0, 1.0), (1, 8, 32, 64))
    ]


def _linear(samples: int, rows: int, d_in: int, d_out: int, dtypes: Iterable[str]) -> list[Case]:
    return [
        LinearCase(
            task="T7",
            work=work,
            samples=samples,
            rows=rows,
            width_in=d_in,
            width_out=d_out,
            dtype=dtype,
        )
        for dtype, work in itertools.product(dtypes, ("sum", "clipped", "given"))
    ]


def shrunk(case: Case) -> Case:
    """The same case on a handful of numbers, to try its path anywhere."""
    if isinstance(case, LinearCase):
        return dataclasses.replace(case, samples=3, rows=8, width_in=12, width_out=20)
    size = case.size
    n = max(1, min(24, 48 * size.n // size.t))
    return dataclasses.replace(case, size=HeadSize(48, n, 32, 100), samples=min(3, case.samples))
