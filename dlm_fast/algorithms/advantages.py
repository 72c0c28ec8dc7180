"""How much better than the rest of its group a rollout is.

    mean            A_i = r_i - mean(r)
    std             A_i = (r_i - mean(r)) / (std(r) + 1e-6)      std divides by G - 1
    zscore          A_i = (r_i - mean(r)) / std(r)               std divides by G
    leave_one_out   A_i = r_i - mean of the other rewards = G/(G-1) * (r_i - mean(r))
    none            A_i = r_i

Sources: std is BGPO, arXiv 2510.11683, eq. 18, with the unbiased standard deviation and the 1e-6 of
the open DARE trainer; zscore is TraceRL, arXiv 2509.06949; mean is d1, arXiv 2504.12216;
leave_one_out is DiffuCoder, arXiv 2506.20639.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Baseline = Literal["std", "zscore", "mean", "leave_one_out", "none"]

STD_FLOOR = 1e-6
"""keeps a group of nearly equal rewards finite; far below any meaningful difference of rewards"""


def group_advantage(reward_G: Tensor, baseline: Baseline = "std") -> Tensor:
    """float64 [G]: advantages of the rollouts of one prompt.

    Equal rewards, and so a group of one, give exactly 0 unless the baseline is ``none``: the test
    is on the rewards, as the mean of equal numbers may differ from them in the last digit and the
    division by a standard deviation of 0 would blow that up.
    """
    reward_G = torch.as_tensor(reward_G, dtype=torch.float64)
    _check(reward_G, baseline)
    if baseline == "none":
        return reward_G.clone()
    if bool((reward_G == reward_G[:1]).all()):
        return torch.zeros_like(reward_G)
    centred_G = reward_G - reward_G.mean()
    if baseline == "mean":
        return centred_G
    if baseline == "leave_one_out":
        return centred_G * (len(reward_G) / (len(reward_G) - 1))
    if baseline == "zscore":
        return centred_G / reward_G.std(correction=0)
    return centred_G / (reward_G.std(correction=1) + STD_FLOOR)


def _check(reward_G: Tensor, baseline: str) -> None:
    if baseline not in get_args(Baseline):
        raise ValueError(
            f"advantage baseline must be one of {', '.join(get_args(Baseline))}, got {baseline!r}"
        )
    if reward_G.dim() != 1:
        raise ValueError(
            f"group_advantage takes the rewards of one group, one dimension; got shape "
            f"{tuple(reward_G.shape)}"
        )
    bad = torch.nonzero(~torch.isfinite(reward_G)).flatten().tolist()
    if bad:
        raise ValueError(
            f"rewards must be finite numbers; rollouts {bad} of the group have "
            f"{[reward_G[i].item() for i in bad]}. An unscored rollout has NaN: score all of them, "
            f"or look at the task's checker"
        )
