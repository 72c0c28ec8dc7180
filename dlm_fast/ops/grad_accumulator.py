"""Main gradients over many samples, with the samples' norms, clipping, variance and noise scale.

With samples k = 1..K, gradients g_k, scales c_k and clip factors f_k = min(1, clip / ||g_k||):

    h_k       = f_k g_k                                           what a sample counts for
    main      = sum_k c_k h_k
    mean      = main / V1                                          V1 = sum c_k,  V2 = sum c_k^2
    variance  = (sum_k c_k ||h_k||^2 - ||main||^2 / V1) / (V1 - V2 / V1)
    mean_square = ||mean||^2 - variance * V2 / V1^2                unbiased for ||E h||^2
    noise_scale = variance / ||mean||^2

Equal scales give the usual (sum ||h_k||^2 - K ||mean||^2) / (K - 1). All of it follows from two
numbers per sample, ||g_k||^2 and <g_k, main before>: ||main||^2 grows by 2 c f <g, main> + c^2 f^2
||g||^2. Nothing but the main gradients is ever as large as the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_fast.ops.axpy_multi import axpy_multi
from dlm_fast.ops.philox import Stream, mix64


@dataclass(frozen=True, kw_only=True)
class GradStatistics:
    """What the samples since the last ``zero()`` tell; see the module's text."""

    norms: Tensor
    """float64 [K], norm of each sample before clipping and scaling"""
    cosines: Tensor
    """float64 [K], cosine between a sample and the sum of those before it, over the parameters
    whose ``.grad`` was read; NaN for the first"""
    clip_factors: Tensor
    """float64 [K], 1 where nothing was clipped"""
    mean_norm: float
    """norm of the mean gradient"""
    variance: float
    """trace of the covariance of one sample; NaN for less than two samples"""
    mean_square: float
    """squared norm of the expected gradient without the bias of ||mean||^2; may be negative"""
    noise_scale: float
    """samples after which noise and signal are equal: variance / mean_norm^2"""

    @property
    def count(self) -> int:
        """K."""
        return self.norms.numel()

    @property
    def clip_fraction(self) -> float:
        """Share of samples that were clipped."""
        return float((self.clip_factors < 1).double().mean()) if self.count else 0.0


class GradAccumulator:
    """Takes ``.grad`` of one sample after the other and keeps their sum in main gradients.

    A parameter whose gradient another op adds in place (``weighted_logprob_`` with
    ``weight_grad=accumulator.buffer(weight)``) is announced by ``accumulated``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        per_sample_clip: float | None = None,
        statistics: bool = True,
        main_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """``main_dtype`` bfloat16 halves the memory and rounds stochastically, by random numbers
        that ``seed`` names; float64 parameters have float64 main gradients."""
        self.params = list({id(p): p for p in params}.values())
        for index, param in enumerate(self.params):
            _check_param(index, param)
        if per_sample_clip is not None and not 0 < per_sample_clip < math.inf:
            raise ValueError(
                f"GradAccumulator: per_sample_clip must be a positive number or None, "
                f"got {per_sample_clip}"
            )
        if main_dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"GradAccumulator: main_dtype must be float32 or bfloat16, got {main_dtype}"
            )
        self.per_sample_clip = per_sample_clip
        self.main_grads = [
            torch.zeros_like(
                p,
                dtype=torch.float64 if p.dtype == torch.float64 else main_dtype,
                requires_grad=False,
            )
            for p in self.params
        ]
        """in the order of the parameters"""
        self._keys = [mix64(seed, Stream.ROUNDING, i) for i in range(len(self.params))]
        self._place = {id(p): i for i, p in enumerate(self.params)}
        self._with_statistics = statistics
        self._adds = 0
        self._elsewhere: set[int] = set()  # parameters whose gradients come in place
        self._present: set[int] = set()  # those of the present sample
        self._reached: set[int] = set()  # parameters with a gradient since zero()
        self._square_elsewhere = 0.0
        self._clear()

    @property
    def count(self) -> int:
        """Samples since the last ``zero()``."""
        return self._count

    def buffer(self, param: Tensor) -> Tensor:
        """The main gradient of a parameter, for an op that adds to it in place."""
        if id(param) not in self._place:
            raise ValueError(
                f"GradAccumulator: a parameter of shape {tuple(param.shape)} is not among those "
                "that were given; pass it to GradAccumulator(params)"
            )
        return self.main_grads[self._place[id(param)]]

    def accumulated(self, param: Tensor, square_norm: Tensor | float | None = None) -> None:
        """The present sample's gradient of ``param`` lies in its buffer already, scaled.

        ``square_norm``: of that gradient before clipping and scaling; needed with
        ``per_sample_clip`` or statistics (``head_sample_grad_norm`` computes that of a head).
        """
        self.buffer(param)
        place = self._place[id(param)]
        if not self._needs_norms:
            self._present.add(place)
            return
        if square_norm is None:
            raise ValueError(
                "GradAccumulator: accumulated() needs square_norm, because norms, clipping and "
                "statistics are of whole samples; pass it, or GradAccumulator(statistics=False) "
                "without per_sample_clip"
            )
        if self._count and place not in self._elsewhere:
            raise ValueError(
                "GradAccumulator: this parameter came as .grad in earlier samples and in place in "
                "this one, so the inner products do not fit together; choose one way per zero()"
            )
        self._present.add(place)
        self._elsewhere.add(place)
        self._square_elsewhere += float(square_norm)

    def clip_factor(self, square_elsewhere: Tensor | float = 0.0) -> float:
        """What ``add`` will multiply the present sample by, given the squared norm of the part
        that is about to be added in place: the in-place op must be scaled by it too."""
        if self.per_sample_clip is None:
            return 1.0
        grads = [p.grad for p in self.params if p.grad is not None]
        square = sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in grads)
        norm = math.sqrt(square + float(square_elsewhere))
        return 1.0 if norm <= self.per_sample_clip else self.per_sample_clip / norm

    def add(self, scale: float = 1.0) -> None:
        """Adds ``scale`` times the parameters' ``.grad``, clipped as one sample, and frees it."""
        found = [i for i, p in enumerate(self.params) if p.grad is not None]
        if not found and not self._present:
            raise ValueError(
                "GradAccumulator: no parameter has a gradient; call backward() before add()"
            )
        for i in found:
            self._check_grad(i)
        if found or self._needs_norms:
            result = axpy_multi(
                [self.main_grads[i] for i in found],
                [self.params[i].grad for i in found],  # type: ignore[misc]
                scale,
                max_norm=math.inf if self.per_sample_clip is None else self.per_sample_clip,
                square_elsewhere=self._square_elsewhere,
                keys=[self._keys[i] for i in found],
                step=self._adds % (1 << 32),
            )
            if self._with_statistics:
                self._results.append(result)
                self._scales.append(float(scale))
                self._squares_elsewhere.append(self._square_elsewhere)
        for i in found:
            self.params[i].grad = None
        self._reached |= self._present | set(found)
        self._count += 1
        self._adds += 1
        self._present, self._square_elsewhere = set(), 0.0

    def statistics(self) -> GradStatistics:
        """Of the samples since the last ``zero()``; waits for a device."""
        if not self._with_statistics:
            raise ValueError("GradAccumulator: made with statistics=False, so none were collected")
        scale_K = torch.tensor(self._scales, dtype=torch.float64)
        if bool((scale_K > 0).any()) and bool((scale_K < 0).any()):
            raise ValueError(
                "GradAccumulator: scales of both signs: such samples have no common mean; put the "
                "sign into the loss and pass its size as scale"
            )
        result_K3 = torch.stack(self._results).cpu() if self._results else torch.zeros(0, 3)
        own_square_K, inner_K, factor_K = result_K3.double().unbind(1)
        square_K = own_square_K + torch.tensor(self._squares_elsewhere, dtype=torch.float64)
        step_K = scale_K * factor_K
        own_main_K = (2 * step_K * inner_K + step_K.square() * own_square_K).cumsum(0)
        before_K = torch.cat([own_main_K.new_zeros(1), own_main_K])[:-1]
        cosine_K = inner_K / (own_square_K * before_K.clamp(min=0)).sqrt()
        cosine_K[(own_square_K == 0) | (before_K <= 0)] = math.nan
        main_square = float(own_main_K[-1].clamp(min=0)) if self._results else 0.0
        for i in self._elsewhere:
            norm = torch.linalg.vector_norm(self.main_grads[i], dtype=torch.float64)
            main_square += float(norm) ** 2
        clipped_square_K = factor_K.square() * square_K
        mean_norm, variance, mean_square = gradient_moments(scale_K, clipped_square_K, main_square)
        return GradStatistics(
            norms=square_K.sqrt(),
            cosines=cosine_K,
            clip_factors=factor_K,
            mean_norm=mean_norm,
            variance=variance,
            mean_square=mean_square,
            noise_scale=variance / mean_norm**2 if mean_norm > 0 else math.nan,
        )

    def assign_grads(self, *, everywhere: bool = False) -> None:
        """Gives the parameters that any sample reached their main gradients as ``.grad``, for an
        optimizer: the same memory where the types are equal, else rounded once. Call ``zero()``
        after the step. ``everywhere``: all parameters, for sums over processes, which samples
        elsewhere may have reached."""
        for place in range(len(self.params)) if everywhere else sorted(self._reached):
            self.params[place].grad = self.main_grads[place].to(self.params[place].dtype)

    def zero(self) -> None:
        """Forgets all samples; frees ``.grad`` where it is a main gradient."""
        for param, main in zip(self.params, self.main_grads, strict=True):
            if param.grad is not None and param.grad.data_ptr() == main.data_ptr():
                param.grad = None
            main.zero_()
        self._clear()

    @property
    def _needs_norms(self) -> bool:
        return self._with_statistics or self.per_sample_clip is not None

    def _clear(self) -> None:
        self._count = 0
        self._results: list[Tensor] = []
        self._scales: list[float] = []
        self._squares_elsewhere: list[float] = []
        self._elsewhere, self._present, self._reached = set(), set(), set()
        self._square_elsewhere = 0.0

    def _check_grad(self, place: int) -> None:
        grad = self.params[place].grad
        assert grad is not None
        if grad.data_ptr() == self.main_grads[place].data_ptr() and grad.numel():
            raise ValueError(
                "GradAccumulator: .grad is the main gradient itself, left by assign_grads(); call "
                "zero() after the optimizer's step"
            )
        if self._needs_norms and place in self._present | self._elsewhere:
            raise ValueError(
                f"GradAccumulator: a parameter of shape {tuple(grad.shape)} has a gradient of its "
                "own beside the part that was added in place, as an embedding tied to the head "
                "has; the norm of the sum needs their inner product, which nobody computed. Let "
                "autograd make the head's gradient too (weighted_logprob), or use "
                "statistics=False without per_sample_clip"
            )


def gradient_moments(
    scale_K: Tensor, square_K: Tensor, main_square: float
) -> tuple[float, float, float]:
    """Norm of the mean, variance, and the unbiased square of the mean, of samples with norms
    ``square_K`` squared whose sum, times the scales, has the squared norm ``main_square``."""
    v1, v2 = float(scale_K.sum()), float(scale_K.square().sum())
    if v1 == 0:
        return math.nan, math.nan, math.nan
    mean_square = main_square / v1**2
    rest = v1 - v2 / v1
    if abs(rest) <= 1e-12 * abs(v1):  # one sample, or one that has all the weight
        return math.sqrt(mean_square), math.nan, math.nan
    variance = (float((scale_K * square_K).sum()) - main_square / v1) / rest
    return math.sqrt(mean_square), variance, mean_square - variance * v2 / v1**2


def _check_param(index: int, param: Tensor) -> None:
    if not isinstance(param, Tensor) or not param.is_floating_point():
        what = param.dtype if isinstance(param, Tensor) else type(param).__name__
        raise TypeError(f"GradAccumulator: parameter {index} must be a real tensor, got {what}")
    if type(param).__name__ == "DTensor":
        raise TypeError(
            f"GradAccumulator: parameter {index} is sharded over processes; sharding wrappers own "
            "the sum of its gradients"
        )
    if not param.is_leaf:
        raise ValueError(
            f"GradAccumulator: parameter {index} is not a leaf, so it has no .grad; pass what the "
            "optimizer gets"
        )
