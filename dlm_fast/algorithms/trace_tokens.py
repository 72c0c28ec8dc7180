"""The target tokens of an iteration: their forward passes, advantages, returns and weights.

Letters: ``n`` tokens of a response, ``U`` target tokens of a forward, ``C`` orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm_fast.algorithms.clipped_loss import (
    KL,
    MAX_LOG_RATIO,
    LossAgg,
    averaging,
    kl_estimate,
)
from dlm_fast.algorithms.contract import Largest, Metrics
from dlm_fast.algorithms.trace_returns import outcome_rewards, step_returns
from dlm_fast.algorithms.trace_rows import (
    TargetRows,
    Traced,
    rows_of_blocks,
    rows_of_slices,
    slice_index,
)
from dlm_fast.rollout.trajectory import Group


@dataclass(kw_only=True, eq=False)
class Record:
    """A rollout that is trained on."""

    traced: Traced
    advantage: float
    """A_i of the whole response"""
    update: int
    """which optimizer step of an epoch"""

    @property
    def token_rewards(self) -> Tensor | None:
        """float64 [n], if the task rewarded single tokens (``detail["token_rewards"]``)."""
        given = self.traced.trajectory.detail.get("token_rewards")
        if given is None:
            return None
        reward = torch.as_tensor(given, dtype=torch.float64)
        if reward.dim() != 1 or not bool(reward.isfinite().all()):
            raise ValueError(
                "token_rewards must be a list of finite numbers, one per token of the response, "
                f"got {given!r:.60}"
            )
        count = len(self.traced.ids)
        return torch.nn.functional.pad(reward[:count], (0, max(0, count - len(reward))))

    @property
    def rollout_logprob(self) -> Tensor:
        """float64 [n], as recorded while decoding; NaN where nothing was."""
        recorded, count = self.traced.trajectory.logp_rollout, len(self.traced.ids)
        if recorded is None:
            return torch.full((count,), float("nan"), dtype=torch.float64)
        return recorded[:count].double()


@dataclass(kw_only=True, eq=False)
class Tokens:
    """A forward pass and the numbers of its target tokens, float64 [U] each."""

    rows: TargetRows
    advantage: Tensor
    share: Tensor
    """weight in the average of an optimizer step"""
    divisor: float
    """of that average, over all ranks"""
    rollout: Tensor | None
    """log-probability as recorded while decoding; None: masks were drawn"""
    old: Tensor | None = None
    """log pi_old; None: the policy has not moved yet, so it is the new one"""
    returns: Tensor | None = None
    old_value: Tensor | None = None
    hidden: Tensor | None = None
    """[U, D], the policy's last hidden states, where a value head reads them"""

    def evenly(self, divisor: float) -> Tokens:
        """The same tokens, all of one weight."""
        return replace(self, share=torch.ones_like(self.share), divisor=divisor)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides about the rows of forward passes."""

    kind: str
    block_size: int
    mask_id: int
    shrink: int
    row_budget: int
    device: Any = "cpu"

    def rows(self, responses: Sequence[Traced]) -> list[TargetRows]:
        """The forward passes that score the responses."""
        common = {"mask_id": self.mask_id, "shrink": self.shrink, "row_budget": self.row_budget}
        if self.kind == "block":
            return list(rows_of_blocks(responses, block_size=self.block_size, **common))
        return list(rows_of_slices(responses, **common))

    def tokens(
        self, records: Sequence[Record], loss_agg: LossAgg, padded_length: int
    ) -> tuple[list[Tokens], float]:
        """Tokens of one optimizer step, and this rank's part of their divisor, not yet in them."""
        responses = [record.traced for record in records]
        packs = self.rows(responses)
        if not packs:
            return [], 0.0
        share, divisor = averaging(
            loss_agg,
            torch.cat([p.response for p in packs]),
            torch.cat(
                [
                    slice_index(p, responses, kind=self.kind, block_size=self.block_size)
                    for p in packs
                ]
            ),
            torch.cat([p.step for p in packs]),
            padded_length,
        )
        advantage_R = torch.tensor([r.advantage for r in records], dtype=torch.float64)
        recorded = [record.rollout_logprob for record in records]
        is_traced = all(record.traced.is_recorded for record in records)
        made = [
            Tokens(
                rows=rows.to(self.device),
                advantage=advantage_R[rows.response].to(self.device),
                share=own.to(self.device),
                divisor=1.0,
                rollout=_gather(recorded, rows).to(self.device) if is_traced else None,
            )
            for rows, own in zip(packs, share.split([p.rows.numel() for p in packs]), strict=True)
        ]
        return made, divisor


class Clipping(Protocol):
    """The options that ``token_metrics`` reads."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def kl(self) -> KL: ...


def token_metrics(
    micro: Tokens, logprob_U: Tensor, log_ratio_U: Tensor, options: Clipping
) -> Metrics:
    """(sum, count) over target tokens, read from the device in one go."""
    logprob_U, log_ratio_U = logprob_U.detach().double(), log_ratio_U.detach()
    ratio_U = log_ratio_U.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_U = (micro.advantage > 0) & (ratio_U > 1 + options.clip_high)
    clipped_U |= (micro.advantage < 0) & (ratio_U < 1 - options.clip_low)
    counted = {
        "policy/logprob": logprob_U,
        "policy/ratio_mean": ratio_U,
        "policy/clip_fraction": clipped_U,
        "policy/kl": kl_estimate(log_ratio_U, options.kl),
        "policy/advantage": micro.advantage,
    }
    largest = logprob_U.new_zeros(())
    if micro.rollout is not None:
        difference_U = (logprob_U if micro.old is None else micro.old) - micro.rollout
        counted["trace/mismatch"] = difference_U.abs()
        largest = difference_U.abs().max()
    sums = [values_U.double().sum() for values_U in counted.values()]
    *totals, worst = torch.stack([*sums, largest]).tolist()
    count = float(logprob_U.numel())
    metrics: Metrics = {name: (total, count) for name, total in zip(counted, totals, strict=True)}
    if micro.rollout is not None:
        metrics["trace/mismatch_largest"] = Largest(worst)
    return metrics


def has_share(group: Group, low: float, high: float) -> bool:
    """Whether the share of correct rollouts lies in ``low``..``high``, both included."""
    correct, count = sum(t.correct for t in group.trajectories), len(group.trajectories)
    # in counts: 8 of 10 is not above 0.8, whatever the last digit of the quotient says
    return low * count - 1e-9 <= correct <= high * count + 1e-9


def row_counts(packs: Sequence[TargetRows], responses: int) -> Metrics:
    """Rows that are forwarded and tokens that are scored, per response."""
    rows = sum(one.input_ids.numel() for one in packs)
    targets = sum(one.rows.numel() for one in packs)
    return {
        "trace/rows_per_response": (float(rows), float(responses)),
        "trace/targets_per_response": (float(targets), float(responses)),
    }


def assign_returns(
    tokens: Sequence[Tokens],
    records: Sequence[Record],
    values: Sequence[Tensor],
    gamma: float,
    lam: float,
) -> None:
    """Writes values, returns and step-level advantages into the tokens of all ``records``.

    ``values``: V_old [U] of each. Where the task rewarded no single tokens, the advantage of a
    response is the reward of its last step.
    """
    rows = [one.rows.to("cpu") for one in tokens]
    copies = max(len(record.traced.step) for record in records)
    sequence = torch.cat([r.response * copies + r.copy for r in rows])
    step = torch.cat([r.step for r in rows])
    given = [reward for record in records if (reward := record.token_rewards) is not None]
    if len(given) == len(records):
        reward = torch.cat([_gather(given, r) for r in rows])
    else:
        outcome = torch.tensor([r.advantage for r in records], dtype=torch.float64)
        reward = outcome_rewards(sequence, step, outcome.repeat_interleave(copies))
    value = torch.cat([v.double().cpu() for v in values])
    found = step_returns(sequence, step, reward, value, gamma, lam)
    first = 0
    for one, own in zip(tokens, rows, strict=True):
        place = slice(first, first + own.rows.numel())
        device = one.share.device
        one.old_value = value[place].to(device)
        one.returns = found.returns[place].to(device)
        one.advantage = found.advantages[place].to(device)
        first = place.stop


def explained_variance(tokens: Sequence[Tokens], global_sum: Callable[[float], float]) -> float:
    """Share of the returns' variance, over all ranks, that the old values explain; nan where the
    returns are equal. Five collectives."""
    empty = torch.zeros(0, dtype=torch.float64)
    returns = torch.cat([empty, *(t.returns.cpu() for t in tokens if t.returns is not None)])
    value = torch.cat([empty, *(t.old_value.cpu() for t in tokens if t.old_value is not None)])
    count = max(1.0, global_sum(float(len(returns))))
    whole, left = (
        global_sum(float((x - global_sum(float(x.sum())) / count).square().sum()))
        for x in (returns, returns - value)
    )
    return 1 - left / whole if whole > 1e-20 * count else float("nan")


def _gather(values: Sequence[Tensor], rows: TargetRows) -> Tensor:
    """float64 [U]: the number of each target's token; one tensor [n] per response."""
    start = torch.tensor([0, *(len(value) for value in values)]).cumsum(0)
    return torch.cat(list(values)).double()[start[rows.response] + rows.token]
