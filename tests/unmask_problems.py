"""Problems for the unmasking rules, and what must hold wherever they are solved."""

from __future__ import annotations

import torch
from device_runs import Run
from hypothesis import strategies as st
from torch import Tensor

from dlm_fast.ops import Rng, Stream, unmask_select, unmask_select_ref
from dlm_fast.ops.unmask_select import RULES, UNCERTAINTY_RULES

nan, inf = float("nan"), float("inf")


@st.composite
def problems(draw):
    """Score, selectable, rule and options of a few short rows, full of ties and NaN."""
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 23))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    # few levels make ties; NaN and infinities among them
    levels = torch.tensor([0.0, 0.25, 0.5, 0.5, 0.9, 0.95, 1.0, nan, inf, -inf, -0.0])
    used = draw(st.sampled_from([7, 8, 11]))
    pick = torch.randint(used, (rows, length), generator=generator)
    score = levels[pick]
    if draw(st.booleans()):
        score = torch.rand(rows, length, generator=generator)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    selectable = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.2, 0.8]))
    rule = draw(st.sampled_from(RULES))
    options = {"rng": Rng.of(seed, Stream.UNMASK, list(range(rows))).at(step=3)}
    if draw(st.booleans()):
        options |= {"quota": draw(st.integers(1, 30)), "bound": draw(st.floats(0, 3))}
    else:
        options |= {
            "quota": torch.randint(1, 30, (rows,), generator=generator),
            "bound": 3 * torch.rand(rows, generator=generator),
        }
    entropy = torch.rand(rows, length, generator=generator).mul(4).round() / 4
    options["uncertainty"] = entropy.masked_fill(score.isnan() & (entropy > 0.5), nan).to(dtype)
    return score.to(dtype), selectable, rule, options


def rows_of_all_kinds(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score, selectable, uncertainty and the end of the wanted prefix of six rows: dense, sparse,
    with ties and NaN, nothing open, nothing but NaN open, all open and wanted."""
    generator = torch.Generator().manual_seed(length)
    score = torch.rand(6, length, generator=generator, dtype=torch.float64).sqrt()
    score[2] = (score[2] * 4).round() / 4
    score[2, ::5] = nan
    score[4] = nan
    share = torch.tensor([0.95, 0.1, 0.7, 0.0, 0.5, 1.1])
    selectable = torch.rand(6, length, generator=generator) < share[:, None]
    uncertainty = -2 * score.log() + torch.rand(6, 1, generator=generator) / 8
    uncertainty[5, :: max(1, length // 3)] = -0.125  # rounding may leave something below zero
    prefix = (torch.rand(6, generator=generator) * selectable.sum(1)).long()
    prefix[5] = length
    return score.to(dtype), selectable, uncertainty.to(dtype), prefix


def options_of_rule(
    rule: str, score: Tensor, uncertainty: Tensor, prefix: Tensor
) -> dict[str, Tensor | Rng]:
    """Options by which the rows reveal about as many positions as ``prefix`` says."""
    rows, length = score.shape
    ordered = score.double().nan_to_num(0).sort(1, descending=True).values
    worst = ordered.gather(1, prefix.clamp(max=length - 1)[:, None])[:, 0]
    bound = worst
    if rule == "dynamic":  # in half of the rows too few pass
        bound = torch.where(torch.arange(rows) % 2 == 0, worst, 1.5)
    elif rule == "factor":
        bound = (prefix + 1) * (1 - worst)
    elif rule in UNCERTAINTY_RULES:
        sums = uncertainty.double().nan_to_num(0).clamp(min=0).sort(1).values.cumsum(1)
        bound = sums.gather(1, prefix.clamp(max=length - 1)[:, None])[:, 0]
    quota = prefix.clamp(min=1) + (prefix > length // 2)
    quota[5] = max(1, length - 1)  # all of them would need no order
    return {
        "quota": quota,
        "bound": bound.to(score.dtype),
        "uncertainty": uncertainty,
        "rng": Rng.of(length, Stream.UNMASK, range(rows)).at(
            position=torch.arange(rows) * 32, step=3, draw=2**32 - 1
        ),
    }


def check_equal(run: Run, score: Tensor, selectable: Tensor, rule: str, options: dict) -> Tensor:
    chosen = run(unmask_select, score, selectable, rule, **options)
    assert torch.equal(chosen, unmask_select(score, selectable, rule, **options)), rule
    assert torch.equal(chosen, unmask_select_ref(score, selectable, rule, **options)), rule
    return chosen


def check_rule(run: Run, rule: str, length: int, dtype: torch.dtype = torch.float32) -> None:
    """The backend that ``run`` reaches equals the CPU backend and the twin."""
    score, selectable, uncertainty, prefix = rows_of_all_kinds(length, dtype)
    options = options_of_rule(rule, score, uncertainty, prefix)
    chosen = check_equal(run, score, selectable, rule, options)
    assert torch.equal(chosen.any(1), selectable.any(1)), "one reveal at least in every open row"


def check_numbers_out_of_range(run: Run, length: int) -> None:
    """What nobody checks on a device: still one reveal at least, and none outside."""
    score, selectable, uncertainty, _ = rows_of_all_kinds(length, torch.float32)
    rows = score.shape[0]
    rng = Rng.of(0, Stream.UNMASK, range(rows))
    op, (least, most) = torch.ops.dlm_fast.unmask_select, (-(2**31), 2**31 - 1)
    for rule in RULES:

        def select(quota, bound, rule=rule):
            quotas = torch.full((rows,), quota, dtype=torch.int32)
            bounds = torch.full((rows,), bound)
            counters = (uncertainty, rng.keys, None, None, 0)
            number = RULES.index(rule)
            return run(_call, op, score, selectable, number, quotas, bounds, *counters)

        for quota in (least, 0):
            assert torch.equal(select(quota, inf), select(1, inf)), rule
        usable = selectable & ~(selectable & score.isnan()).all(1, keepdim=True)
        if rule in ("top_k", "dynamic", "random", "sequential"):
            everything = select(most, inf)
            assert torch.equal(everything.sum(1) > 1, (usable & ~score.isnan()).sum(1) > 1)
        assert torch.equal(select(1, nan).sum(1), selectable.any(1).long()), rule
        assert torch.equal(select(1, -1.0).any(1), selectable.any(1)), rule


def _call(op, *args):
    return op(*args)
