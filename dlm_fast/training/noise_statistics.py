"""Standard errors and slopes of measured noise: arithmetic on scalars, no gradients.

    noise   = sqrt(tr Cov(g))                      of a gradient g over its masks
    slope   = d log noise / d log n                -1/2 where the n samples are independent
    ratio   = mean over n of log(noise / noise of another sampler), as a factor

A variance has the standard error of the infinitesimal jackknife over repetitions (Jaeckel 1972):
repetition r moves the estimate by (|g_r - E g|^2 - variance)/R, so that error is the spread of the
squared distances over sqrt(R). Intervals are normal ones, 95 %, on the logarithm of a noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96
"""quantile of the normal distribution for two-sided 95 %"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its standard error."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.value - Z * self.error, self.value + Z * self.error

    def exp(self) -> tuple[float, float, float]:
        """The exponential of the value and of both ends of the interval."""
        low, high = self.interval
        return math.exp(self.value), math.exp(low), math.exp(high)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The noise of one sampler at one number of samples."""

    sampler: str
    num_samples: int
    repetitions: int
    """fresh sets of masks"""
    variance: float
    """trace of the gradient's covariance over masks"""
    variance_error: float
    """its standard error"""
    bias_squared: float
    """squared distance of the mean gradient from the reference, less what noise adds to it; its
    expectation is the truth, so it may fall below 0"""
    unseen: float
    """what noise adds to that distance: variance / repetitions + variance of the reference"""

    @property
    def log_noise(self) -> Estimate:
        """log sqrt(variance)"""
        if not self.variance > 0:
            raise ValueError(
                f"the gradient of {self.sampler} at n={self.num_samples} does not change with the "
                "masks, so its noise has no logarithm; take other samples or another model"
            )
        error = 0.5 * self.variance_error / self.variance
        return Estimate(value=0.5 * math.log(self.variance), error=error)

    @property
    def distance(self) -> float:
        """Root mean square distance from the true gradient: noise and bias."""
        return math.sqrt(max(0.0, self.variance + self.bias_squared))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of independent estimates."""
    count = len(estimates)
    if count == 0:
        raise ValueError("no estimates to average")
    return Estimate(
        value=math.fsum(e.value for e in estimates) / count,
        error=math.sqrt(math.fsum(e.error**2 for e in estimates)) / count,
    )


def slope(cells: Sequence[Cell]) -> Estimate:
    """Least squares of log noise over log n, every n with equal weight.

    Weights after the measured errors would follow their luck: a variance that came out small comes
    with a small error.
    """
    if len({cell.num_samples for cell in cells}) < 2:
        raise ValueError(
            f"a slope needs two different numbers of samples, got "
            f"{[cell.num_samples for cell in cells]}"
        )
    x = [math.log(cell.num_samples) for cell in cells]
    centre = math.fsum(x) / len(x)
    spread = math.fsum((value - centre) ** 2 for value in x)
    factor = [(value - centre) / spread for value in x]
    y = [cell.log_noise for cell in cells]
    return Estimate(
        value=math.fsum(f * e.value for f, e in zip(factor, y, strict=True)),
        error=math.sqrt(math.fsum((f * e.error) ** 2 for f, e in zip(factor, y, strict=True))),
    )


def log_ratio(cells: Sequence[Cell], others: Sequence[Cell]) -> Estimate | None:
    """Mean over the common n of log(noise of ``cells`` / noise of ``others``); None: no n."""
    by_n = {cell.num_samples: cell.log_noise for cell in others}
    pairs = [(c.log_noise, by_n[c.num_samples]) for c in cells if c.num_samples in by_n]
    if not pairs:
        return None
    return mean(
        [Estimate(value=a.value - b.value, error=math.hypot(a.error, b.error)) for a, b in pairs]
    )
