"""What several scored answers per example say: accuracy with its interval, pass@k, maj@k.

    accuracy   mean over examples of the fraction of an example's samples that are right
    interval   percentile bootstrap over examples (Efron 1979): they are the independent unit
    pass@k     1 - C(n-c, k) / C(n, k), c right of n samples (Chen et al. 2021, arXiv 2107.03374)
    maj@k      the most frequent of k answers is right (Wang et al. 2022, arXiv 2203.11171)

Letters: ``E`` examples, ``B`` bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_DRAWS = 2000
_CHUNK = 1 << 22  # random indices made at once


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One scored answer."""

    correct: bool
    answer: str | None
    """the extracted answer, for votes; None if there is none"""


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k samples, drawn without replacement from these, is right.

    As the product of (1 - k/i) over i = n-c+1..n, which neither overflows nor cancels.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 0 <= right <= samples and 1 <= k <= samples, got {k=}, "
                         f"{right=}, {samples=}")  # fmt: skip
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def majority(verdicts: Sequence[Verdict]) -> float:
    """Chance that the answer with most votes is right.

    Samples without an answer have no vote; without any vote the result is 0. Between answers with
    equally many votes the choice is by lot, so their mean counts, not luck. Equal answers share
    one verdict as a rule; where they do not, their mean counts as well.
    """
    votes: dict[str, list[bool]] = {}
    for verdict in verdicts:
        if verdict.answer is not None:
            votes.setdefault(verdict.answer, []).append(verdict.correct)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [sum(right) / len(right) for right in votes.values() if len(right) == most]
    return sum(winners) / len(winners)


def majority_at_k(verdicts: Sequence[Verdict], k: int) -> float:
    """``majority`` of k samples: the mean over the disjoint groups of k that follow one another; a
    last group of fewer is left out."""
    groups = [verdicts[start : start + k] for start in range(0, len(verdicts) - k + 1, k)]
    return sum(map(majority, groups)) / len(groups)


def counts_of_samples(fewest: int) -> list[int]:
    """The k that are reported: powers of 2 up to the number of samples, and that number.

    >>> counts_of_samples(6)
    [1, 2, 4, 6]
    """
    return sorted({2**i for i in range(fewest.bit_length())} | {fewest})


def bootstrap_interval(
    values: Iterable[float], seed: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentiles of the mean over examples drawn with replacement; the same for the same seed."""
    value_E = np.asarray(list(values), dtype=np.float64)
    if value_E.size == 0:
        raise ValueError("no values to draw from")
    # raw words: numpy promises them across versions, and modulo 2^64 their bias is nil
    source = np.random.Philox(key=seed)
    rows = max(1, _CHUNK // value_E.size)
    means = []
    for start in range(0, _DRAWS, rows):
        count = min(rows, _DRAWS - start)
        raw = source.random_raw(count * value_E.size).reshape(count, value_E.size)
        means.append(value_E[raw % np.uint64(value_E.size)].mean(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a proportion that stays inside [0, 1] and does not shrink to a point at 0 or 1.

    Wilson 1927: the proportions p with |p - successes/trials| <= z * sqrt(p (1 - p) / trials).
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
