"""Which masked positions a denoising step reveals: eight rules over one score per position.

Per row, over the candidates (selectable positions); ties go to the lowest index:

    top_k        the ``quota`` best scores. With a schedule of quotas this is static decoding; a
                 margin or a negative entropy is a score like any other
    dynamic      {score > bound} if at least ``quota`` pass, else the ``quota`` best
                 (block diffusion engines; Wang et al., TraceRL, arXiv 2509.06949)
    threshold    {score >= bound}, and the best one always (Wu et al., Fast-dLLM, arXiv 2505.22618)
    factor       scores c in descending order: the longest prefix with (k+1)(1-c_k) <= bound, at
                 least one (Fast-dLLM)
    entropy_sum  uncertainties in ascending order: as many as have a cumulative sum < bound, at
                 least one
    eb           uncertainties H in ascending order: the longest prefix with sum H - max H <= bound
                 (Ben-Hamu et al., EB-sampler, arXiv 2505.24857)
    random       ``quota`` of them, uniformly, by keyed random words
    sequential   the ``quota`` leftmost

A candidate whose score (or uncertainty, where the rule reads it) is NaN is passed over; a row with
nothing but NaN reveals its leftmost candidate, so that every step reveals a token and the denoising
loop ends. A row without candidates reveals nothing. Scores of ``factor`` are clamped to [0, 1] and
uncertainties in sums to >= 0. Shapes: R rows, L positions.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._device import check_device
from dlm_fast.ops._executor import executor_of
from dlm_fast.ops.philox import Rng, philox_words_ref

# A rule's place is its number in C++.
RULES = (
    "top_k",
    "dynamic",
    "threshold",
    "factor",
    "entropy_sum",
    "eb",
    "random",
    "sequential",
)
QUOTA_RULES = frozenset({"top_k", "dynamic", "random", "sequential"})
BOUND_RULES = frozenset({"dynamic", "threshold", "factor", "entropy_sum", "eb"})
UNCERTAINTY_RULES = frozenset({"entropy_sum", "eb"})


def unmask_select(
    score: Tensor,
    selectable: Tensor,
    rule: str,
    *,
    quota: int | Tensor | None = None,
    bound: float | Tensor | None = None,
    uncertainty: Tensor | None = None,
    rng: Rng | None = None,
) -> Tensor:
    """bool [R, L], True where the rule reveals a position; see the module's text.

    All tensors lie on one device. On a CUDA device nothing waits for it, so values of tensors are
    not checked there: a quota below 1 counts as 1, a bound that is NaN lets nothing through.

    Args:
        score: float [R, L], the larger the surer.
        selectable: bool [R, L], masked positions of the current block.
        rule: one of ``RULES``. What a rule does not use may be given and is ignored.
        quota: at least 1, an integer or integers [R]; may exceed the number of candidates.
        bound: not negative, a number or floats [R]; compared in the precision of ``score``.
        uncertainty: float [R, L], entropies in nats.
        rng: R rows, for ``random``; a column is the first counter, so give ``rng.at(position=...)``
            the start of the block when the columns are those of a block.
    """
    _check(score, selectable, rule, uncertainty, rng)
    _check_devices(score, selectable, rule, quota, bound, uncertainty, rng)
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    quota_R = _quota_of_rows(quota, selectable, rule) if rule in QUOTA_RULES else None
    bound_R = _bound_of_rows(bound, score, rule, dtype) if rule in BOUND_RULES else None
    uncertainty_RL = (
        uncertainty.to(dtype) if uncertainty is not None and rule in UNCERTAINTY_RULES else None
    )
    counters: tuple = (None, None, None, 0)
    if rule == "random" and rng is not None:
        counters = (rng.keys, rng.position, rng.step, rng.draw)
    return _unmask_select(
        score.to(dtype),
        selectable,
        RULES.index(rule),
        quota_R,
        bound_R,
        uncertainty_RL,
        *counters,
    )


def unmask_select_ref(
    score: Tensor,
    selectable: Tensor,
    rule: str,
    *,
    quota: int | Tensor | None = None,
    bound: float | Tensor | None = None,
    uncertainty: Tensor | None = None,
    rng: Rng | None = None,
) -> Tensor:
    """The definition. Every backend must match it."""
    _check(score, selectable, rule, uncertainty, rng)
    _check_devices(score, selectable, rule, quota, bound, uncertainty, rng)
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    score_RL = score.to(dtype)
    usable_RL = selectable & ~score_RL.isnan()
    if rule in UNCERTAINTY_RULES and uncertainty is not None:
        usable_RL = usable_RL & ~uncertainty.isnan()
        key_RL = uncertainty.to(dtype)
    elif rule == "random" and rng is not None:
        key_RL = philox_words_ref(rng, score.shape[1])
    elif rule == "sequential":
        key_RL = torch.arange(score.shape[1], device=score.device).expand_as(score)
    else:
        key_RL = -score_RL
    # Two stable sorts: candidates first, among them by key, ties by index.
    by_key_RL = key_RL.masked_fill(~usable_RL, 0).argsort(dim=1, stable=True)
    late_RL = (~usable_RL).to(torch.int8).gather(1, by_key_RL)
    order_RL = by_key_RL.gather(1, late_RL.argsort(dim=1, stable=True))
    usable_R = usable_RL.sum(1)

    quota_R = _quota_of_rows(quota, selectable, rule) if rule in QUOTA_RULES else None
    bound_R = _bound_of_rows(bound, score, rule, dtype) if rule in BOUND_RULES else None
    cut_R = _cut(rule, key_RL.gather(1, order_RL), usable_R, quota_R, bound_R)
    rank_RL = torch.arange(score.shape[1], device=score.device).expand_as(score)
    chosen_RL = torch.zeros_like(selectable).scatter(1, order_RL, rank_RL < cut_R[:, None])
    leftmost_RL = selectable & (selectable.cumsum(1) == 1)
    return torch.where((usable_R > 0)[:, None], chosen_RL, leftmost_RL)


def _cut(
    rule: str, key_RL: Tensor, usable_R: Tensor, quota_R: Tensor | None, bound_R: Tensor | None
) -> Tensor:
    """How many of the ordered candidates each row reveals; ``key`` ascends."""
    rank_RL = torch.arange(key_RL.shape[1], device=key_RL.device).expand_as(key_RL)
    inside_RL = rank_RL < usable_R[:, None]
    if bound_R is None:
        assert quota_R is not None
        return torch.minimum(quota_R.to(torch.int64), usable_R)
    bound_R1 = bound_R[:, None]
    if rule == "dynamic":
        assert quota_R is not None
        above_R = (inside_RL & (-key_RL > bound_R1)).sum(1)
        return torch.where(above_R >= quota_R, above_R, torch.minimum(quota_R, usable_R))
    if rule == "threshold":
        passing_RL = -key_RL >= bound_R1
    elif rule == "factor":
        doubt_RL = 1 - (-key_RL).double().clamp(0, 1)
        passing_RL = (rank_RL + 2) * doubt_RL <= bound_R1.double()
    else:
        sum_RL = key_RL.double().clamp(min=0).cumsum(1)
        if rule == "entropy_sum":
            passing_RL = sum_RL < bound_R1.double()
        else:  # the largest of an ascending prefix is its last
            before_RL = torch.nn.functional.pad(sum_RL, (1, 0))[:, :-1]
            passing_RL = before_RL <= bound_R1.double()
    prefix_R = (inside_RL & passing_RL).to(torch.int64).cumprod(1).sum(1)
    return torch.minimum(prefix_R.clamp(min=1), usable_R)


@torch.library.custom_op("dlm_fast::unmask_select", mutates_args=(), device_types=("cpu", "cuda"))
def _unmask_select(
    score: Tensor,
    selectable: Tensor,
    rule: int,
    quota: Tensor | None,
    bound: Tensor | None,
    uncertainty: Tensor | None,
    keys: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
    draw: int,
) -> Tensor:
    inputs = [
        None if t is None else t.contiguous()
        for t in (score, selectable, quota, bound, uncertainty, keys, position, step)
    ]
    selected = torch.empty(selectable.shape, dtype=torch.bool, device=selectable.device)
    kernel, wide = extension(), score.dtype == torch.float64
    executor = executor_of(score.device)
    if executor is None:
        call = kernel.unmask_select_f64_cpu if wide else kernel.unmask_select_cpu
        call(*score.shape, rule, draw, *addresses(*inputs, selected), num_threads())
    elif selected.numel():
        order = None
        if score.shape[1] > kernel.unmask_select_capacity(score.shape[1], wide):
            order = torch.empty(score.shape, dtype=torch.int32, device=score.device)
        plan = kernel.plan_unmask_select(
            *score.shape, rule, draw, wide, addresses(*inputs), addresses(order, selected)
        )
        executor.launch(plan, score.device)
    return selected


@_unmask_select.register_fake
def _(
    score: Tensor,
    selectable: Tensor,
    rule: int,
    quota: Tensor | None,
    bound: Tensor | None,
    uncertainty: Tensor | None,
    keys: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
    draw: int,
) -> Tensor:
    return torch.empty(selectable.shape, dtype=torch.bool, device=selectable.device)


def _check(
    score: Tensor, selectable: Tensor, rule: str, uncertainty: Tensor | None, rng: Rng | None
) -> None:
    if rule not in RULES:
        close = difflib.get_close_matches(str(rule), RULES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unmask_select: rule must be one of {', '.join(RULES)}, got {rule!r}{hint}"
        )
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    check_dtype("unmask_select", "score", score, *floats)
    check_dtype("unmask_select", "selectable", selectable, torch.bool)
    if score.dim() != 2 or score.shape != selectable.shape:
        raise ValueError(
            "unmask_select: score and selectable must have one shape [R, L], got "
            f"{list(score.shape)} and {list(selectable.shape)}"
        )
    if rule in UNCERTAINTY_RULES:
        if uncertainty is None:
            raise ValueError(
                f"unmask_select: rule {rule!r} needs uncertainty, the entropies [R, L]"
            )
        check_dtype("unmask_select", "uncertainty", uncertainty, *floats)
        if uncertainty.shape != score.shape:
            raise ValueError(
                f"unmask_select: uncertainty must have the shape {list(score.shape)} of score, "
                f"got {list(uncertainty.shape)}"
            )
    if rule == "random":
        if rng is None:
            raise ValueError("unmask_select: rule 'random' needs rng, one key per row")
        if len(rng) != score.shape[0]:
            raise ValueError(
                f"unmask_select: rng must have {score.shape[0]} rows as score, got {len(rng)}"
            )


def _check_devices(
    score: Tensor,
    selectable: Tensor,
    rule: str,
    quota: int | Tensor | None,
    bound: float | Tensor | None,
    uncertainty: Tensor | None,
    rng: Rng | None,
) -> None:
    """What the rule uses lies on one device."""
    used: dict[str, Tensor | None] = {"score": score, "selectable": selectable}
    if rule in QUOTA_RULES and isinstance(quota, Tensor):
        used["quota"] = quota
    if rule in BOUND_RULES and isinstance(bound, Tensor):
        used["bound"] = bound
    if rule in UNCERTAINTY_RULES:
        used["uncertainty"] = uncertainty
    if rule == "random" and rng is not None:
        used["rng"] = rng.keys
    check_device("unmask_select", **used)


def _quota_of_rows(quota: int | Tensor | None, selectable: Tensor, rule: str) -> Tensor:
    """int32 [R]. Values are checked on the CPU only: elsewhere that would wait for the device."""
    rows = selectable.shape[0]
    if quota is None:
        raise ValueError(f"unmask_select: rule {rule!r} needs quota, the number to reveal per row")
    if not isinstance(quota, Tensor):
        if isinstance(quota, bool) or not hasattr(quota, "__index__"):
            raise TypeError(f"unmask_select: quota must be an integer or a tensor, got {quota!r}")
        if quota < 1:
            raise ValueError(f"unmask_select: quota must be at least 1, got {quota}")
        quota = min(quota, selectable.shape[1])
        return torch.full((rows,), quota, dtype=torch.int32, device=selectable.device)
    check_dtype("unmask_select", "quota", quota, torch.int32, torch.int64)
    if quota.shape != (rows,):
        raise ValueError(f"unmask_select: quota must have shape [{rows}], got {list(quota.shape)}")
    if quota.device.type == "cpu":
        bad_R = (quota < 1) & selectable.any(1)
        if bad_R.any():
            row = int(bad_R.nonzero()[0])
            raise ValueError(
                f"unmask_select: quota must be at least 1 where a row has candidates, "
                f"got {int(quota[row])} in row {row}"
            )
    return quota.clamp(max=selectable.shape[1]).to(torch.int32)


def _bound_of_rows(
    bound: float | Tensor | None, score: Tensor, rule: str, dtype: torch.dtype
) -> Tensor:
    """[R] in the precision of the score: a score of float32(0.9) passes a bound of 0.9."""
    if bound is None:
        raise ValueError(f"unmask_select: rule {rule!r} needs bound")
    if not isinstance(bound, Tensor):
        if math.isnan(bound) or bound < 0:
            raise ValueError(f"unmask_select: bound must be a number >= 0, got {bound}")
        return torch.full((score.shape[0],), bound, dtype=dtype, device=score.device)
    if bound.shape != (score.shape[0],):
        raise ValueError(
            f"unmask_select: bound must have shape [{score.shape[0]}], got {list(bound.shape)}"
        )
    if bound.device.type == "cpu" and not bool((bound >= 0).all()):
        row = int((~(bound >= 0)).nonzero()[0])
        raise ValueError(
            f"unmask_select: bound must be a number >= 0, got {float(bound[row])} in row {row}"
        )
    return bound.to(dtype)
