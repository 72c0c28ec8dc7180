"""The row kernels against their definition, in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._executor import Emulated

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SUFFIX = dict(zip(DTYPES, ("f32", "bf16", "f16", "f64"), strict=True))
OUTPUTS = ("logprob", "lse", "entropy", "row_max", "log_sum", "confidence", "margin", "argmax")
# one thread, one round of 256 threads of four columns each, several, ragged ends
VOCABULARIES = [1, 5, 97, 512, 517, 1024, 2051]
STORED = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]
# relative error of rounding once, and what the computation in float adds
ROUNDING = {
    torch.float32: {"atol": 1e-5, "rtol": 3e-6},
    torch.bfloat16: {"atol": 1e-5, "rtol": 1.02 * 2**-8},
    torch.float16: {"atol": 1e-5, "rtol": 1.02 * 2**-11},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
}


def fenced(rows: int, columns: int, dtype: torch.dtype, stride: int | None = None) -> Tensor:
    """[rows, columns] of NaN with NaN around and, up to `stride`, between them."""
    stride = columns if stride is None else stride
    if dtype.is_floating_point:
        fence = torch.full((rows + 2, stride), torch.nan, dtype=dtype)
    else:
        fence = torch.full((rows + 2, stride), -7, dtype=dtype)
    return fence[1:-1, :columns]


def only_inside(part: Tensor) -> bool:
    """Nothing was written around a fenced tensor."""
    whole = torch.as_strided(
        part, (len(part) + 2, part.stride(0)), part.stride(), part.storage_offset() - part.stride(0)
    )
    outside = torch.ones(whole.shape, dtype=torch.bool)
    outside[1:-1, : part.shape[1]] = False
    values = whole[outside]
    return bool((values.isnan() if part.dtype.is_floating_point else values == -7).all())


def with_stride(logits_NV: Tensor) -> Tensor:
    """The same rows, a multiple of four elements apart."""
    rows, vocabulary = logits_NV.shape
    out = fenced(rows, vocabulary, logits_NV.dtype, (vocabulary + 3) // 4 * 4 + 4)
    out.copy_(logits_NV)
    return out


class Problem(NamedTuple):
    logits_NV: Tensor
    targets_N: Tensor | None
    bias_V: Tensor | None
    temperature: float

    def bind(self, wanted: tuple[str, ...] = OUTPUTS) -> tuple[object, dict[str, Tensor]]:
        """The extension's view of the rows, and its outputs; others are null."""
        rows, vocabulary = self.logits_NV.shape
        outputs = {name: fenced(rows, 1, self.logits_NV.dtype) for name in wanted}
        if "argmax" in wanted:
            outputs["argmax"] = fenced(rows, 1, torch.int64)
        bound = extension().LogitRows(
            (rows, vocabulary),
            (self.logits_NV.data_ptr(), self.logits_NV.stride(0)),
            DTYPES.index(self.logits_NV.dtype),
            *addresses(self.bias_V),
            self.temperature,
            *addresses(self.targets_N),
            addresses(*(outputs.get(name) for name in OUTPUTS)),
        )
        return bound, outputs

    def z(self) -> Tensor:
        z = self.logits_NV.double()
        return (z if self.bias_V is None else z + self.bias_V.double()) / self.temperature

    def ignored(self) -> Tensor:
        if self.targets_N is None:
            return torch.zeros(len(self.logits_NV), dtype=torch.bool)
        return self.targets_N == -100

    def truth(self) -> dict[str, Tensor]:
        """Every statistic by its definition."""
        z = self.z()
        logprob = z.log_softmax(-1)
        p = logprob.exp()
        best = torch.cat([p, torch.zeros(len(p), 1)], 1).topk(2, -1).values
        found = {
            "logprob": torch.zeros(len(z), dtype=torch.float64),
            "lse": z.logsumexp(-1),
            "entropy": -torch.where(p > 0, p * logprob, p).sum(-1),
            "row_max": z.amax(-1),
            "log_sum": (z - z.amax(-1, keepdim=True)).logsumexp(-1),
        }
        if self.targets_N is not None:
            inside = self.targets_N.clamp(0, z.shape[1] - 1)
            found["logprob"] = logprob.gather(1, inside[:, None])[:, 0]
        for values in found.values():
            values[self.ignored()] = 0
        found |= {"confidence": best[:, 0], "margin": best[:, 0] - best[:, 1]}
        return found | {"argmax": z.argmax(-1)}


def problem(real: torch.dtype, vocabulary: int, temperature: float = 0.7) -> Problem:
    """Ties everywhere a thread could meet them, minus infinity, an ignored row, wide rows."""
    generator = torch.Generator().manual_seed(vocabulary)
    last = vocabulary - 1
    logits = torch.randn(8, vocabulary, generator=generator, dtype=torch.float64) * 4
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    ties = [0, 1, 4, 1024, last]  # one thread's columns, its neighbour's, its next round's
    for row, column in enumerate(ties, start=2):
        for place in {0, min(column, last)}:
            logits[row, place] = 40.0
            bias[place] = 0.5
    if vocabulary > 8:
        bias[vocabulary // 3] = -torch.inf
        logits[7, vocabulary // 2] = -torch.inf
    targets = torch.tensor([last, -100, 0, last, vocabulary // 2, 0, last // 3 + 1, last])
    targets.clamp_(max=last)
    if vocabulary > 8:
        targets[4] = vocabulary // 3  # cannot be: its log-probability is minus infinity
    return Problem(with_stride(logits.to(real)), targets, bias.to(real), temperature)


def check(got: dict[str, Tensor], want: dict[str, Tensor], real: torch.dtype, **tolerance) -> None:
    for name, values in got.items():
        assert only_inside(values), name
        if name == "argmax":
            assert torch.equal(values[:, 0], want[name])
        else:
            torch.testing.assert_close(
                values[:, 0].double(), want[name], **(tolerance or ROUNDING[real])
            )


def kernels(*names: str) -> list[object]:
    return [pytest.mark.covers(*names)]


STATISTICS = [
    pytest.param(real, top, marks=kernels(f"row_stats{'_top' * top}_{SUFFIX[real]}"))
    for real in (torch.float32, torch.float64)
    for top in (False, True)
]


def run_statistics(executor, p: Problem, top: bool, wanted=None) -> dict[str, Tensor]:
    wanted = wanted or OUTPUTS[: 8 if top else 6]
    bound, got = p.bind(wanted)
    executor.launch(extension().plan_row_stats(bound, top, False), p.logits_NV.device)
    return got


@pytest.mark.parametrize(("real", "top"), STATISTICS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_statistics(executor, real, top, vocabulary):
    p = problem(real, vocabulary)
    check(run_statistics(executor, p, top), p.truth(), real)


@pytest.mark.parametrize(("real", "top"), STATISTICS)
def test_wide_logits_do_not_overflow(executor, real, top):
    """Logits of +-1e4; errors are relative to them."""
    logits = torch.randn(3, 1100, dtype=torch.float64).sign() * 1e4
    logits += torch.randn(3, 1100, dtype=torch.float64)
    logits[2, 7] = 2e4
    p = Problem(with_stride(logits.to(real)), torch.tensor([0, 1, 7]), None, 1.0)
    got = run_statistics(executor, p, top)
    check(got, p.truth(), real, rtol=1e-6, atol=1e-5)
    assert got["logprob"][2] == 0 and got["entropy"][2] == 0


@pytest.mark.parametrize(("real", "top"), STATISTICS)
def test_nan_and_rows_of_minus_infinity(executor, real, top):
    logits = torch.zeros(5, 600, dtype=real)
    logits[0, 599] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3:] = -torch.inf
    p = Problem(with_stride(logits), torch.tensor([0, 0, 5, 600, -1]), None, 0.5)
    got = run_statistics(executor, p, top)
    for name in ("logprob", "lse", "entropy", "confidence"):
        assert got[name][0].isnan(), name
    assert got["lse"][1] == -torch.inf and got["logprob"][1].isnan()
    assert got["confidence"][1].isnan() and got["row_max"][1] == -torch.inf
    assert got["logprob"][2] == -torch.inf and got["entropy"][2].allclose(
        torch.tensor(3.0, dtype=real).log()
    )
    assert got["logprob"][3:].isnan().all() and got["lse"][3:].isfinite().all(), "targets outside"
    if top:
        assert got["argmax"][1:, 0].tolist() == [-1, 0, 0, 0]


@pytest.mark.parametrize(("real", "top"), STATISTICS)
def test_targets_bias_and_outputs_may_be_left_out(executor, real, top):
    p = problem(real, 517, 1.3)._replace(targets_N=None, bias_V=None)
    p.logits_NV[:, 172] = 0.0
    want = p.truth()
    check(run_statistics(executor, p, top), want, real)
    for name in OUTPUTS[: 8 if top else 6]:
        check(run_statistics(executor, p, top, (name,)), want, real)


@pytest.mark.parametrize(("real", "top"), STATISTICS)
def test_nothing_is_read_outside_of_the_logits(executor, real, top):
    """Of tensors of the exact size, so that the address sanitizer sees a step outside."""
    logits = torch.arange(24, dtype=real).reshape(2, 12)
    bias = torch.ones(12, dtype=real)
    for targets in (None, torch.tensor([-1, 12])):
        p = Problem(logits, targets, bias, 1.0)
        got = run_statistics(executor, p, top)
        torch.testing.assert_close(got["lse"][:, 0].double(), p.z().logsumexp(-1))
        assert got["logprob"].isnan().all() if targets is not None else (got["logprob"] == 0).all()


class Gradient(NamedTuple):
    """Cotangents of the rows, None for zero, and the gradient they make."""

    logprob: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None

    def truth(self, p: Problem) -> Tensor:
        keep = ~p.ignored()
        logits = p.logits_NV.double().requires_grad_()
        z = p._replace(logits_NV=logits).z()[keep]
        logprob = z.log_softmax(-1)
        known = logprob.detach().exp() > 0
        plogp = torch.where(known, logprob.exp() * torch.where(known, logprob, 0), 0)
        chosen = logprob.gather(1, p.targets_N[keep][:, None])[:, 0]
        values = (torch.where(chosen.isfinite(), chosen, 0), z.logsumexp(-1), -plogp.sum(-1))
        total = torch.zeros((), dtype=torch.float64)
        for value, cotangent in zip(values, self, strict=True):
            if cotangent is not None:
                total = total + (value * cotangent[keep].double()).sum()
        if not total.requires_grad:
            return torch.zeros_like(logits)
        return torch.autograd.grad(total, logits)[0].nan_to_num()

    def none(self, p: Problem) -> Tensor:
        """Rows that take no part."""
        parts = [torch.zeros_like(p.targets_N) if c is None else (c != 0).long() for c in self]
        return (sum(parts) == 0) | p.ignored()


def gradient_of(real: torch.dtype, rows: int) -> Gradient:
    """Row 0 has all three, rows 2 to 4 one each, row 5 none."""
    generator = torch.Generator().manual_seed(11)
    parts = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    for row, kept in ((2, 0), (3, 1), (4, 2), (5, None)):
        parts[[part for part in range(3) if part != kept], row] = 0
    return Gradient(*parts.to(real))


def run_gradient(
    executor,
    p: Problem,
    grad: Gradient,
    stored: torch.dtype,
    *,
    known: bool,
    width=5,
    in_place=False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradient of the logits, hidden rows, statistics."""
    rows, vocabulary = p.logits_NV.shape
    out = p.logits_NV if in_place else fenced(rows, vocabulary, stored, vocabulary + 3)
    hidden = fenced(rows, width, stored) if width else None
    bound, statistics = p.bind(OUTPUTS[:5])
    if known:
        for name, values in p.truth().items():
            if name in statistics:
                statistics[name][:, 0] = values
    view = extension().LogitRowsGrad(
        bound,
        addresses(*grad),
        (out.data_ptr(), out.stride(0), DTYPES.index(stored)),
        (*addresses(hidden), width),
    )
    plan = extension().plan_row_grad(view) if known else extension().plan_row_step(view, False)
    executor.launch(plan, out.device)
    return out, hidden, statistics


GRADIENTS = [
    pytest.param(
        known,
        real,
        stored,
        marks=kernels(f"row_{'grad' if known else 'step'}_{SUFFIX[real]}_{SUFFIX[stored]}"),
    )
    for known in (True, False)
    for real, stored in STORED
]


@pytest.mark.parametrize(("known", "real", "stored"), GRADIENTS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradient(executor, known, real, stored, vocabulary):
    p = problem(real, vocabulary)
    p.targets_N[4] = 0  # a log-probability of minus infinity has no gradient
    width = {97: 600, 512: 0, 517: 256}.get(vocabulary, 5)
    grad = gradient_of(real, len(p.logits_NV))
    out, hidden, statistics = run_gradient(executor, p, grad, stored, known=known, width=width)
    assert only_inside(out)
    torch.testing.assert_close(out.double(), grad.truth(p), **ROUNDING[stored])
    none = grad.none(p)
    assert none[[1, 5]].all() and none.sum() == 2
    assert (out[none] == 0).all()
    if width:
        assert only_inside(hidden)
        assert (hidden[none] == 0).all() and hidden[~none].isnan().all()
    check(statistics, p.truth(), real)


@pytest.mark.parametrize(
    ("known", "real", "stored"), [case for case in GRADIENTS if case.values[1] == case.values[2]]
)
def test_gradient_in_place_of_the_logits(executor, known, real, stored):
    p = problem(real, 2051)
    p.targets_N[4] = 0
    grad = gradient_of(real, len(p.logits_NV))
    want, truth = grad.truth(p), p.truth()
    out, _, statistics = run_gradient(executor, p, grad, stored, known=known, in_place=True)
    torch.testing.assert_close(out.double(), want, **ROUNDING[stored])
    check(statistics, truth, real)
    assert only_inside(out)


@pytest.mark.parametrize(("known", "real", "stored"), GRADIENTS)
@pytest.mark.parametrize("part", range(4))
def test_missing_cotangents_are_zero(executor, known, real, stored, part):
    p = problem(real, 97)
    p.targets_N[4] = 0
    whole = gradient_of(real, len(p.logits_NV))
    grad = Gradient(*(c if index == part else None for index, c in enumerate(whole)))
    out, hidden, _ = run_gradient(executor, p, grad, stored, known=known)
    torch.testing.assert_close(out.double(), grad.truth(p), **ROUNDING[stored])
    none = grad.none(p)
    assert (hidden[none] == 0).all() and hidden[~none].isnan().all()


@pytest.mark.parametrize(("known", "real", "stored"), GRADIENTS)
def test_nan_stays_in_its_row(executor, known, real, stored):
    """A row without a cotangent is cleared whatever it holds; one with a cotangent shows it."""
    p = problem(real, 97, 1.0)
    p.targets_N[[4, 6, 7]] = torch.tensor([0, 97, -1])  # and targets outside
    p.logits_NV[[0, 1, 5], 3] = torch.nan
    grad = gradient_of(real, len(p.logits_NV))
    out, _, _ = run_gradient(executor, p, grad, stored, known=known)
    assert out[[0, 6, 7]].isnan().all()
    assert (out[[1, 5]] == 0).all()
    assert out[[2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("top", [False, True])
def test_thread_orders_give_the_same_bits(top):
    p = problem(torch.float32, 2051)
    runs = [run_statistics(Emulated(order), p, top) for order in Emulated.ORDERS]
    for name in runs[0]:
        assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:]), name
