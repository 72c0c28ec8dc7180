"""The rates that benchmarks divide by are there for every instruction set."""

import pytest

from dlm_fast import _C


@pytest.mark.parametrize("level", range(_C.best_simd_level() + 1))
@pytest.mark.parametrize("pairs", [False, True])
def test_rates_of_every_instruction_set(level, pairs):
    best = _C.best_simd_level()
    _C.set_simd_level(level)
    try:
        rate = _C.fma_peak(pairs, 0.01, 1)
    finally:
        _C.set_simd_level(best)
    if pairs and level < 3:  # only AVX-512 BF16 multiplies pairs
        assert rate == {"peak": 0, "tile": 0}
    else:
        # any core since 2000 does a tenth of a multiply-add per nanosecond; none does 10,000
        assert 0.1 < rate["tile"] < 1e4
        assert 0.1 < rate["peak"] < 1e4


def test_threads_add_up():
    assert _C.fma_peak(False, 0.01, 2)["peak"] > 0


@pytest.mark.parametrize(
    ("seconds", "threads", "message"),
    [
        (0, 1, "seconds"),
        (1e9, 1, "seconds"),
        (float("nan"), 1, "seconds"),
        (0.1, 0, "num_threads"),
        (0.1, 1 << 30, "num_threads"),
    ],
)
def test_refusals(seconds, threads, message):
    with pytest.raises(ValueError, match=message):
        _C.fma_peak(False, seconds, threads)
