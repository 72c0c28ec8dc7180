"""coupled-GRPO: token scores from three states: all masked, a random set S masked, its complement.

    score_k = (1/2) [ log p(o_k | a) + log p(o_k | b) / rho ]           k in S,   |S| ~ rho L
              (1/2) [ log p(o_k | a) + log p(o_k | c) / (1 - rho) ]     k not in S
    a: all of the response masked;  b: S masked;  c: the rest masked;  rho ~ U(rho_low, rho_high)
    ratio_k = exp(score_k - score_old_k), clipped token by token;  A = r - mean of the others

Every token is scored by a and by one of b and c. The factors make a score that is no
log-probability. Rollouts of a prompt share state a; each pass draws other sets, the same under the
present, the old and the first weights. Source: DiffuCoder, arXiv 2506.20639, section 4.

Letters: ``M`` tokens masked in states b and c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlm_fast.algorithms.advantages import Baseline
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.group_ratio import RatioLevel, SequenceAgg
from dlm_fast.algorithms.mean_field import IGNORED, MaskedWindows
from dlm_fast.algorithms.mean_field_grpo import MeanFieldGRPO, Windows
from dlm_fast.algorithms.mean_field_options import MeanFieldOptions
from dlm_fast.algorithms.options import check_range
from dlm_fast.ops import Rng, Stream, Visibility, mix64, philox_uniform
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group


@dataclass(frozen=True, kw_only=True)
class Config(MeanFieldOptions):
    """coupled-GRPO: token scores from three masked states."""

    group_size: int = 10
    """rollouts per prompt"""
    rho_low: float = 0.2
    """smallest rate of masking in state b"""
    rho_high: float = 0.8
    """largest rate of masking in state b"""
    advantage: Baseline = "leave_one_out"
    """reward less the mean of the others (leave_one_out), less the group's mean (mean), over its
    standard deviation (std, or zscore with the population's), bare (none)"""
    ratio_level: RatioLevel = "token"
    """ratios of tokens (as published) or of whole responses"""
    loss_agg: SequenceAgg = "token_mean"
    """token_mean: over all tokens of an optimizer step. seq_mean: over the tokens of a response,
    then over responses"""
    clip_low: float = 0.5
    """ratios below 1 - clip_low give no gradient where the advantage is negative"""
    clip_high: float = 0.5
    """ratios above 1 + clip_high give no gradient where the advantage is positive"""
    epochs: int = 2
    """mu, passes over the rollouts of an iteration, each with sets of its own"""
    prompts_per_forward: int = 1
    """prompts in one forward of the loss, each with all its rollouts; changes memory and time, not
    the result"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1e-6, 1 - 1e-6, "rho_high")
        check_range(self, 1e-6, self.rho_high, "rho_low")

    def build(
        self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> CoupledGRPO:
        """The algorithm for one run."""
        return CoupledGRPO(
            self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledWindows(MaskedWindows):
    """State a of some prompts, and behind it states b and c of each of their rollouts."""

    place: Tensor
    """int64 [M], rollout times L plus position of each row behind those of state a"""
    weight: Tensor
    """float64 [M], 1 / rho or 1 / (1 - rho)"""


class CoupledGRPO(MeanFieldGRPO):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    config: Config

    @property
    def different_epochs(self) -> int:
        return self.config.epochs

    def masked(self, groups: Sequence[Group], context: Context, epoch: int) -> CoupledWindows:
        first = super().masked(groups, context, epoch)
        window, members = self.rollout.max_new_tokens, first.targets.shape[1]
        ids, lengths, rows, targets, places, weights = [], [], [], [], [], []
        start = first.input_ids.numel()
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                response = trajectory.response_ids[:window]
                masked_n, rho = self._set(trajectory.sequence_id, len(response), context, epoch)
                for hidden_n, rate in ((masked_n, rho), (~masked_n, 1 - rho)):
                    ids += [trajectory.prompt_ids, response.masked_fill(hidden_n, self.mask_id)]
                    lengths.append(trajectory.prompt_length + len(response))
                    token = hidden_n.nonzero()[:, 0]
                    rows.append(start + trajectory.prompt_length + token)
                    targets.append(response[token])
                    places.append((p * members + g) * window + token)
                    weights.append(torch.full((len(token),), 1 / rate, dtype=torch.float64))
                    start += lengths[-1]
        device = context.device
        visibility = Visibility.full([*first.visibility.lengths, *lengths])
        predicting = self._policy.predicting_rows(torch.cat(rows).to(torch.int32), visibility)
        one_target = pad(torch.cat(targets)[:, None], (0, members - 1), value=IGNORED)
        return CoupledWindows(
            input_ids=torch.cat([first.input_ids, torch.cat(ids).to(device)]),
            visibility=visibility.to(device),
            rows=torch.cat([first.rows, predicting.to(device)]),
            targets=torch.cat([first.targets, one_target.to(device)]),
            forbid_ids=first.forbid_ids,
            place=torch.cat(places).to(device),
            weight=torch.cat(weights).to(device),
        )

    def by_rollout(self, logprob_NG: Tensor, windows: Windows) -> Tensor:
        """[R, L], the scores."""
        masked = windows.masked
        assert isinstance(masked, CoupledWindows)
        shared = len(logprob_NG) - masked.place.numel()
        first, second = logprob_NG[:shared], logprob_NG[shared:, 0]
        all_masked_RL = super().by_rollout(first, windows)
        own_RL = torch.zeros_like(all_masked_RL).flatten()
        own_RL = own_RL.index_add(0, masked.place, masked.weight.to(second.dtype) * second)
        return 0.5 * (all_masked_RL + own_RL.view_as(all_masked_RL))

    def _set(self, name: int, count: int, context: Context, epoch: int) -> tuple[Tensor, float]:
        """S as bool [count], and rho."""
        rng = Rng.of(mix64(self.seed, context.iteration, epoch), Stream.MASK, [name])
        uniform = philox_uniform(rng, count + 1)[0]
        rho = self.config.rho_low
        rho += (self.config.rho_high - self.config.rho_low) * float(uniform[count])
        return uniform[:count] < rho, rho
