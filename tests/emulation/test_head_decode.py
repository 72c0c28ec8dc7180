"""The small-N head kernel against the definition, in float64: values, draws, rows, ragged sizes."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import problem
from token_rows import Rows, equal_noise, on_cpu, same_numbers
from torch import Tensor

from dlm_fast.ops import Rng, Stream, token_stats_ref
from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._head_inputs import FLOAT_DTYPES

DEVICE = (2, 227 << 10)  # multiprocessors, bytes of shared memory


def keyed(count: int, seed: int = 0, **counters: Tensor | int) -> Rng:
    return Rng.of(seed, Stream.TOKEN, list(range(count))).at(**counters)


def plans(rows: Rows, hidden: Tensor, weight: Tensor, device: tuple[int, int] = DEVICE):
    """Both launches, and the workspace, which starts as NaN."""
    core = extension()
    count = core.head_decode_workspace_bytes(rows.count, rows.vocabulary)
    workspace = torch.full((count // 4,), torch.nan), torch.full((rows.count,), torch.nan)
    made = core.plan_head_decode(
        rows.bound,
        FLOAT_DTYPES.index(hidden.dtype),
        (hidden.data_ptr(), hidden.stride(0), hidden.shape[0]),
        (weight.data_ptr(), weight.stride(0)),
        hidden.shape[1],
        addresses(*workspace),
        device,
    )
    return made, workspace


def decode(executor, hidden: Tensor, weight: Tensor, count: int, device=DEVICE, **options):
    rows = Rows(count, weight.shape[0], **options)
    made, _workspace = plans(rows, hidden, weight, device)
    for plan in made:
        executor.launch(plan, hidden.device)
    return rows.out


def kernels(dtype: str) -> tuple[str, ...]:
    return *(f"head_decode_{dtype}_{tokens}" for tokens in (8, 32, 64)), "head_decode_merge"


# Rows, width, vocabulary: every tile of tokens and every kind of tail.
SHAPES = [(1, 16, 517), (7, 64, 1031), (8, 70, 517), (9, 123, 517), (31, 16, 300), (64, 70, 1031)]


def check_values(executor, dtype: torch.dtype, **options) -> None:
    for count, width, vocabulary in SHAPES:
        p = problem(count, width, vocabulary, dtype, bias=count % 2 == 1)
        common = {"rows": p.rows, "bias": p.bias, **options}
        if options.get("rng"):
            common["rng"] = keyed(count, position=p.rows, step=3, draw=5)
        temperature = common.pop("draw_temperature", 0.0)
        drawn = {"draw_temperature": temperature} if temperature else {}
        ours = decode(executor, p.hidden, p.weight, count, targets=p.targets, **common, **drawn)
        exact = p.exact()
        common["bias"] = exact.bias
        truth = token_stats_ref(
            exact.hidden, exact.weight, p.targets, temperature=temperature, **common
        )
        assert torch.equal(ours["token"], truth.token)
        same_numbers(ours, truth)
        total = ours["row_max"].double() + ours["log_sum"].double()
        assert (total - truth.lse).abs().max() < 1e-4


@pytest.mark.covers(*kernels("bf16"))
def test_bfloat16(executor):
    check_values(executor, torch.bfloat16, rng=True, draw_temperature=1.3)


@pytest.mark.covers(*kernels("f16"))
def test_float16(executor):
    check_values(executor, torch.float16)


@pytest.mark.covers(*kernels("f32"))
def test_float32(executor):
    check_values(executor, torch.float32, rng=True, draw_temperature=0.7)


def test_draws_are_those_of_the_cpu(executor):
    p = problem(40, 33, 700, bias=True)
    for temperature in (0.6, 1.0, 3.0):
        options = {"rows": p.rows, "bias": p.bias, "rng": keyed(40, seed=3, step=2, draw=1)}
        ours = decode(executor, p.hidden, p.weight, 40, draw_temperature=temperature, **options)
        cpu = on_cpu(p.hidden, p.weight, temperature=temperature, **options)
        assert torch.equal(ours["token"], cpu.token)
        same_numbers(ours, cpu)


def test_temperature_of_the_statistics(executor):
    """As ``token_logprob`` has it; a draw's own temperature comes on top."""
    p = problem(9, 20, 300, bias=True)
    ours = decode(
        executor, p.hidden, p.weight, 9, temperature=0.7, rows=p.rows, bias=p.bias,
        targets=p.targets, rng=keyed(9), draw_temperature=2.0,
    )  # fmt: skip
    truth = token_stats_ref(
        p.hidden.double() / 0.7, p.weight.double(), p.targets, rows=p.rows,
        bias=p.bias.double() / 0.7, temperature=2.0, rng=keyed(9),
    )  # fmt: skip
    assert torch.equal(ours["token"], truth.token)
    same_numbers(ours, truth)


def test_tiny_vocabularies(executor):
    for vocabulary, width in ((5, 64), (97, 70), (256, 16), (257, 16)):
        p = problem(9, width, vocabulary, torch.bfloat16)
        ours = decode(executor, p.hidden, p.weight, 9, rows=p.rows, rng=keyed(9))
        exact = p.exact()
        truth = token_stats_ref(
            exact.hidden, exact.weight, rows=p.rows, rng=keyed(9), temperature=1.0
        )
        assert torch.equal(ours["token"], truth.token)
        same_numbers(ours, truth)


@pytest.mark.parametrize("vocabulary", [8460, 33100])
def test_many_splits(executor, vocabulary):
    """More splits of the vocabulary than a warp has lanes, and than the merging block has threads;
    draws and targets lie in all of them."""
    p = problem(8, 16, vocabulary, torch.bfloat16)
    p.targets[:] = torch.arange(8) * vocabulary // 8 + vocabulary // 16
    options = {"rows": p.rows, "rng": keyed(8, seed=1)}
    ours = decode(executor, p.hidden, p.weight, 8, targets=p.targets, **options)
    exact = p.exact()
    truth = token_stats_ref(exact.hidden, exact.weight, p.targets, temperature=1.0, **options)
    assert torch.equal(ours["token"], truth.token)
    same_numbers(ours, truth)


def test_targets_at_the_ends_and_outside(executor):
    p = problem(4, 16, 300)
    p.targets[:] = torch.tensor([0, 299, -1, 300])
    ours = decode(executor, p.hidden, p.weight, 4, rows=p.rows, targets=p.targets)
    truth = token_stats_ref(p.hidden.double(), p.weight.double(), p.targets[:2], rows=p.rows[:2])
    same_numbers({name: value[:2] for name, value in ours.items()}, truth)
    assert ours["logprob"][2:].isnan().all() and ours["lse"].isfinite().all()


def test_columns_of_logits_far_from_zero(executor):
    """Padding must not count as a logit of 0, above or below all others."""
    p = problem(8, 64, 301)
    for level in (-60.0, 60.0):
        bias = torch.full((301,), level)
        ours = decode(executor, p.hidden, p.weight, 8, rows=p.rows, bias=bias)
        truth = token_stats_ref(
            p.hidden.double(), p.weight.double(), rows=p.rows, bias=bias.double()
        )
        assert torch.equal(ours["token"], truth.token)
        same_numbers(ours, truth)


def test_forbidden_columns_take_no_part(executor):
    p = problem(9, 20, 530)
    p.targets[:] = 7
    best = (p.hidden[p.rows.long()] @ p.weight.t()).argmax(-1)
    forbidden = sorted({0, 3, 527, 529, *best.tolist()} - {7})
    p.weight[0] = math.nan  # not even the weights count
    allowed = [v for v in range(530) if v not in forbidden]
    for drawn in ({}, {"rng": keyed(9)}):
        ours = decode(
            executor, p.hidden, p.weight, 9, rows=p.rows, targets=p.targets, forbid_ids=forbidden,
            **drawn,
        )  # fmt: skip
        weight = p.weight.double()
        weight[0] = 0
        truth = token_stats_ref(
            p.hidden.double(), weight, p.targets, rows=p.rows, forbid_ids=forbidden,
            temperature=float(len(drawn)), **drawn,
        )  # fmt: skip
        assert torch.equal(ours["token"], truth.token) and set(ours["token"].tolist()) <= set(
            allowed
        )
        same_numbers(ours, truth)


def test_rows_that_are_not_there(executor):
    """Unselected and, on request, ignored rows are not read; zeros come out."""
    p = problem(12, 64, 300, torch.bfloat16)
    clean = decode(executor, p.hidden, p.weight, 12, rows=p.rows, targets=p.targets)
    hidden, rows, targets = p.hidden.clone(), p.rows.clone(), p.targets.clone()
    hidden[sorted(set(range(15)) - set(p.rows.tolist()))] = math.nan
    hidden[rows[[2, 5]].long()] = math.nan
    targets[[2, 5]] = -100
    ours = decode(executor, hidden, p.weight, 12, rows=rows, targets=targets, skip_ignored=True)
    there = torch.tensor([i not in (2, 5) for i in range(12)])
    for name, value in ours.items():
        assert torch.equal(value[there], clean[name][there]), name
        assert (value[~there] == 0).all(), name
    hidden[rows[[2, 5]].long()] = p.hidden[rows[[2, 5]].long()]
    kept = decode(executor, hidden, p.weight, 12, rows=rows, targets=targets)
    assert kept["logprob"][5] == 0 and kept["lse"][5] == clean["lse"][5]
    rows[3], rows[4] = 15, -1  # outside: cannot be reported without a wait
    broken = decode(executor, hidden, p.weight, 12, rows=rows, targets=targets)
    assert broken["lse"][3:5].isnan().all() and torch.equal(broken["lse"][5:], kept["lse"][5:])


def test_a_nan_row_poisons_only_itself(executor):
    p = problem(9, 20, 300, torch.float16)
    for drawn in ({}, {"rng": keyed(9)}):
        clean = decode(executor, p.hidden, p.weight, 9, rows=p.rows, forbid_ids=[0], **drawn)
        hidden = p.hidden.clone()
        hidden[p.rows[4].long(), 3] = math.nan
        ours = decode(executor, hidden, p.weight, 9, rows=p.rows, forbid_ids=[0], **drawn)
        others = torch.arange(9) != 4
        for name, value in ours.items():
            assert torch.equal(value[others], clean[name][others]), name
            assert name == "token" or name == "row_max" or value[4].isnan(), name
        assert ours["token"][4] == 1  # the lowest allowed one: a token that exists


def test_ties_and_extremes(executor):
    logits = torch.zeros(5, 600)
    logits[1, [7, 550]] = 5.0
    logits[2, 599] = 60.0
    logits[3, [255, 256]] = 30.0
    logits[4], logits[4, 3] = -1e4, 1e4
    ours = decode(executor, logits, torch.eye(600), 5)
    assert ours["token"].tolist() == [0, 7, 599, 255, 3]
    assert ours["margin"].tolist() == [0, 0, 1, 0, 1]
    assert ours["entropy"][0].item() == pytest.approx(math.log(600), abs=2e-6)
    assert ours["confidence"][0].item() == pytest.approx(1 / 600, rel=1e-6)
    assert ours["lse"][4] == 1e4


def test_equal_scores_go_to_the_lowest_id(executor):
    rng, logits = equal_noise(600, 20)
    ours = decode(executor, logits, torch.eye(600), 20, rng=rng)
    assert torch.equal(ours["token"], logits.nonzero()[::2, 1])


def test_columns_of_minus_infinity(executor):
    p = problem(3, 16, 300)
    bias = torch.zeros(300)
    bias[100:] = -math.inf
    for temperature in (1.0, 0.7, 1.3):  # their reciprocals' low parts have both signs
        ours = decode(executor, p.hidden, p.weight, 3, bias=bias, temperature=temperature)
        exact = p.hidden[:3].double() / temperature
        truth = token_stats_ref(exact, p.weight.double()[:100])
        assert torch.equal(ours["token"], truth.token)
        same_numbers(ours, truth)


def spread(matrix: Tensor, gap: int, offset: int) -> Tensor:
    """The same numbers with NaN between the rows, from an address of any alignment on."""
    rows, width = matrix.shape
    memory = torch.full((offset + rows * (width + gap),), torch.nan, dtype=matrix.dtype)
    view = memory[offset:].view(rows, width + gap)[:, :width]
    view.copy_(matrix)
    return view


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_alignment_gives_the_same_bits(executor, dtype):
    p = problem(7, 71, 300, dtype)
    plain = decode(executor, p.hidden, p.weight, 7, rows=p.rows)
    for gap, offset in ((1, 0), (2, 0), (1, 1), (5, 3)):
        ours = decode(
            executor, spread(p.hidden, gap, offset), spread(p.weight, gap, offset), 7, rows=p.rows
        )
        for name, value in ours.items():
            assert torch.equal(value, plain[name]), name


def test_any_depth_of_the_pipeline_gives_the_same_bits(executor):
    p = problem(5, 72, 517, torch.bfloat16)
    fullest = decode(executor, p.hidden, p.weight, 5, rows=p.rows)
    for stages in (2, 3, 4, 5):
        device = (1, (4 + 33 * stages) << 10)  # a stage of 264 rows is 33 KiB
        ours = decode(executor, p.hidden, p.weight, 5, device=device, rows=p.rows)
        for name, value in ours.items():
            assert torch.equal(value, fullest[name]), (stages, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_depends_on_nothing_else(executor, dtype):
    """Bitwise: alone, in any batch and order, on any device."""
    p = problem(40, 70, 517, dtype)
    rng = keyed(40, position=p.rows)
    whole = decode(executor, p.hidden, p.weight, 40, rows=p.rows, rng=rng)
    for part in ([0], [39], [5, 30], list(range(13)), list(range(39, 20, -1))):
        alone = decode(
            executor, p.hidden, p.weight, len(part), rows=p.rows[part], rng=rng.take(part)
        )
        for name, value in alone.items():
            assert torch.equal(value, whole[name][part]), name
    for device in ((1, 99 << 10), (132, 163 << 10)):
        other = decode(executor, p.hidden, p.weight, 40, device=device, rows=p.rows, rng=rng)
        for name, value in other.items():
            assert torch.equal(value, whole[name]), name


def test_draws_follow_the_distribution(executor):
    """1,280 draws over 16 tokens; five standard deviations of chi-square."""
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    hidden = logits.expand(64, 16).contiguous()
    counts = torch.zeros(16, dtype=torch.float64)
    for first in range(20):
        rng = Rng.of(0, Stream.TOKEN, list(range(64 * first, 64 * first + 64)))
        drawn = decode(executor, hidden, torch.eye(16), 64, rng=rng, draw_temperature=1.5)
        counts += torch.bincount(drawn["token"], minlength=16)
    expected = 64 * 20 * (logits.double() / 1.5).softmax(0)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 15 + 5 * math.sqrt(30)


def test_what_cannot_be_planned():
    hidden, weight = torch.zeros(65, 16), torch.zeros(20, 16)
    with pytest.raises(ValueError, match="65 rows, at most 64"):
        plans(Rows(65, 20), hidden, weight)
    with pytest.raises(ValueError, match="shared memory"):
        plans(Rows(64, 20), hidden, weight, (2, 48 << 10))
    with pytest.raises(ValueError, match="float32 or 16-bit"):
        plans(Rows(1, 20), hidden.double(), weight.double())
    with pytest.raises(ValueError, match="more rows than hidden"):
        plans(Rows(5, 20), hidden[:4], weight)
    with pytest.raises(ValueError, match="forbidden"):
        plans(Rows(5, 3, forbid_ids=[0, 1, 2]), hidden, weight)
