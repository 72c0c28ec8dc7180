"""T7: gradients of one linear layer over samples, with and without norms and clipping.

Letters: ``K`` samples of ``S`` rows, ``I`` width in, ``O`` width out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlm_fast.benchmark.providers import NOT_ITS_WORK, OURS, Delivered
from dlm_fast.ops import GradAccumulator, sample_grad_norm
from providers.availability import missing


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the layer keeps of its forward pass and gets in its backward pass."""

    grad_output: Tensor
    """[K, S, O]"""
    input: Tensor
    """[K, S, I]"""
    layer: nn.Linear
    bound: float
    """norms above are clipped to it; half of the samples' are"""
    given: Tensor
    """[O, I], the first sample's gradient in the type of the layer"""

    def gradient(self, k: int) -> Tensor:
        return self.grad_output[k].T @ self.input[k]


Work = Callable[[Samples, Tensor], Delivered]


@dataclass(frozen=True, kw_only=True)
class LinearProvider:
    """Adds to a float32 main gradient [O, I]; ``clipped`` and ``given`` deliver norms [K] too."""

    name: str
    what: str
    sum: Work | None = None
    clipped: Work | None = None
    given: Work | None = None
    unavailable: str | None = None

    def why_not(self, work: str) -> str | None:
        if self.unavailable is not None:
            return self.unavailable
        return None if getattr(self, work) is not None else NOT_ITS_WORK


def all_linear_providers() -> list[LinearProvider]:
    return [
        LinearProvider(
            name=OURS,
            what="`GradAccumulator`; clipped: `sample_grad_norm`, then one product of scaled rows",
            sum=_accumulator(math.inf),
            clipped=_norms_first(_our_norms),
            given=_given_to_accumulator,
        ),
        LinearProvider(
            name=f"{OURS}, one sample at a time",
            what="`GradAccumulator(per_sample_clip=...)` on each sample's `.grad`",
            clipped=lambda samples, main: _accumulator(samples.bound)(samples, main),
        ),
        LinearProvider(
            name="torch, .grad",
            what="each sample's `.grad`, its norm, `main.add_`",
            sum=_torch_sum,
            clipped=_torch_clipped,
            given=_torch_given,
        ),
        LinearProvider(
            name="addmm",
            what="`torch.addmm(main, dY.T, X, out=main)`: the sum without `.grad`",
            sum=_addmm,
        ),
        LinearProvider(
            name="opacus ghost clipping",
            what="`compute_linear_norm_sample`, then one product of scaled rows",
            clipped=_norms_first(_opacus_norms),
            unavailable=missing("opacus.grad_sample.linear"),
        ),
    ]


# --- ours


def _accumulator(bound: float) -> Work:
    clip = None if bound == math.inf else bound

    def work(samples: Samples, main_OI: Tensor) -> Delivered:
        weight = samples.layer.weight
        accumulator = GradAccumulator([weight], per_sample_clip=clip, statistics=clip is not None)
        accumulator.main_grads[0] = main_OI
        for k in range(len(samples.input)):
            weight.grad = samples.gradient(k)
            accumulator.add()
        return {} if clip is None else {"norms": accumulator.statistics().norms}

    return work


def _given_to_accumulator(samples: Samples, main_OI: Tensor) -> Delivered:
    weight = samples.layer.weight
    accumulator = GradAccumulator([weight])
    accumulator.main_grads[0] = main_OI
    for _ in range(len(samples.input)):
        weight.grad = samples.given
        accumulator.add()
    return {"norms": accumulator.statistics().norms}


def _our_norms(samples: Samples) -> Tensor:
    k, s = samples.input.shape[:2]
    starts = torch.arange(0, k * s + 1, s)
    rows = samples.grad_output.flatten(0, 1), samples.input.flatten(0, 1)
    return sample_grad_norm(*rows, starts).sqrt()


# --- others


def _norms_first(norms_of: Callable[[Samples], Tensor]) -> Work:
    """Norms without gradients, then the sum of all samples in one product."""

    def work(samples: Samples, main_OI: Tensor) -> Delivered:
        norm_K = norms_of(samples)
        factor_K = (samples.bound / norm_K).clamp(max=1).to(samples.grad_output)
        scaled = samples.grad_output * factor_K[:, None, None]
        _add_product(main_OI, scaled.flatten(0, 1), samples.input.flatten(0, 1))
        return {"norms": norm_K}

    return work


def _add_product(main_OI: Tensor, grad_output: Tensor, input: Tensor) -> None:
    """main += grad_outputᵀ input; torch's product on a CPU has no float32 sum of 16-bit numbers."""
    if grad_output.dtype == main_OI.dtype:
        torch.addmm(main_OI, grad_output.T, input, out=main_OI)
    elif main_OI.is_cuda:
        torch.addmm(main_OI, grad_output.T, input, out_dtype=main_OI.dtype, out=main_OI)
    else:
        main_OI.add_(grad_output.T @ input)


def _addmm(samples: Samples, main_OI: Tensor) -> Delivered:
    for k in range(len(samples.input)):
        _add_product(main_OI, samples.grad_output[k], samples.input[k])
    return {}


def _torch_sum(samples: Samples, main_OI: Tensor) -> Delivered:
    for k in range(len(samples.input)):
        main_OI.add_(samples.gradient(k))
    return {}


def _torch_clipped(samples: Samples, main_OI: Tensor) -> Delivered:
    norms = []
    for k in range(len(samples.input)):
        gradient = samples.gradient(k)
        norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        main_OI.add_(gradient * (samples.bound / norms[-1]).clamp(max=1))
    return {"norms": torch.stack(norms)}


def _torch_given(samples: Samples, main_OI: Tensor) -> Delivered:
    norms = []
    for _ in range(len(samples.input)):
        norms.append(torch.linalg.vector_norm(samples.given, dtype=torch.float32))
        main_OI.add_(samples.given)
    return {"norms": torch.stack(norms)}


def _opacus_norms(samples: Samples) -> Tensor:
    from opacus.grad_sample.linear import compute_linear_norm_sample

    found = compute_linear_norm_sample(samples.layer, [samples.input], samples.grad_output)
    return found[samples.layer.weight]
