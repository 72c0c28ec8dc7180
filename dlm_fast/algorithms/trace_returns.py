"""Step-level returns and advantages of a trajectory whose steps reveal several tokens each.

A step t reveals the tokens tau(t); rewards and values of a step are means over its tokens:

    R*_t = r*_t + gamma R*_{t+1}              delta_t = r*_t - V*_t + gamma V*_{t+1}
    A*_t = delta_t + gamma lambda A*_{t+1}    (0 behind the last step)
    R_j = r_j + gamma R*_{t+1}
    A_j = (r_j - V_j) + gamma V*_{t+1} + gamma lambda A*_{t+1}       for the tokens j of tau(t)

so that the means of R_j and A_j over a step are R*_t and A*_t. Discounts count steps, not tokens.
Source: TraceRL, arXiv 2509.06949, section 4.3.

Letters: ``U`` tokens of all sequences, ``S`` steps of all sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepReturns(NamedTuple):
    """Of every token, in the order given."""

    returns: Tensor
    """float64 [U], R_j, what the value model learns"""
    advantages: Tensor
    """float64 [U], A_j"""


def step_returns(
    sequence: Tensor, step: Tensor, reward: Tensor, value: Tensor, gamma: float, lam: float
) -> StepReturns:
    """``sequence`` and ``step`` integers [U], ``reward`` and ``value`` [U], float64 inside.

    Tokens may come in any order; only the order of the steps of a sequence matters.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lambda must lie in [0, 1], got {gamma} and {lam}")
    if sequence.numel() == 0:
        empty = reward.new_zeros(0, dtype=torch.float64)
        return StepReturns(empty, empty.clone())
    reward, value = reward.double(), value.double()
    keys, of_token = torch.unique(
        torch.stack([sequence, step], dim=1).long(), dim=0, return_inverse=True
    )
    mean_reward_S, mean_value_S = (_mean(x, of_token, len(keys)) for x in (reward, value))
    last_S = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    last_S[:-1] = keys[1:, 0] != keys[:-1, 0]
    next_value_S = _after(mean_value_S, last_S)
    delta_S = mean_reward_S - mean_value_S + gamma * next_value_S
    next_return_S = _after(_discounted(mean_reward_S, last_S, gamma), last_S)
    next_advantage_S = _after(_discounted(delta_S, last_S, gamma * lam), last_S)
    return StepReturns(
        reward + gamma * next_return_S[of_token],
        (reward - value)
        + gamma * next_value_S[of_token]
        + gamma * lam * next_advantage_S[of_token],
    )


def outcome_rewards(sequence: Tensor, step: Tensor, outcome: Tensor) -> Tensor:
    """float64 [U]: the reward of the whole sequence on the tokens of its last step, 0 elsewhere.

    ``outcome`` [sequences], indexed by ``sequence``.
    """
    last = torch.zeros(len(outcome), dtype=step.dtype, device=step.device)
    last.scatter_reduce_(0, sequence.long(), step, "amax")
    given = outcome.double()[sequence.long()]
    return torch.where(step == last[sequence.long()], given, 0.0)


def _mean(value_U: Tensor, of_token: Tensor, count: int) -> Tensor:
    total = value_U.new_zeros(count).index_add(0, of_token, value_U)
    return total / torch.bincount(of_token, minlength=count)


def _after(value_S: Tensor, last_S: Tensor) -> Tensor:
    """Of the next step of the sequence; 0 behind the last."""
    return torch.where(last_S, 0.0, value_S.roll(-1))


def _discounted(value_S: Tensor, last_S: Tensor, factor: float) -> Tensor:
    """x_t + factor * x_{t+1} + factor^2 * x_{t+2} ... within each sequence.

    By doubling: after round k each place holds the sum of its next 2^k steps.
    """
    index = torch.arange(len(value_S), device=value_S.device)
    # steps from each place to the end of its sequence, itself included
    ends = index.masked_fill(~last_S, len(index)).flip(0).cummin(0).values.flip(0)
    left_S = ends - index + 1
    total, reach, weight = value_S.clone(), 1, factor
    while reach < int(left_S.max()):
        inside = left_S > reach
        total = total + torch.where(inside, weight * total.roll(-reach), 0.0)
        reach, weight = 2 * reach, weight * weight
    return total
