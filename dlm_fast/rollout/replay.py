"""What a rollout's tokens were worth without a cache: each step's forward again, in full.

T packed tokens, L positions of a sequence, R+E response and tail tokens, N tokens of some steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout.sampler import evaluating
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory


def replay_logprobs(
    policy: Any, trajectory: Trajectory, config: SamplerConfig, max_batch: int = 16
) -> Tensor:
    """float32 [R+E] on the CPU: log-probability (temperature 1, full vocabulary) of each drawn
    token in the state that its step began with, the whole sequence recomputed; 0 where nothing was
    drawn. ``max_batch``: steps in one forward. It costs as many forwards of the whole sequence as
    the rollout took steps."""
    if trajectory.step_map is None:
        raise ValueError(
            "a trajectory without step_map was not sampled, so nothing can be replayed"
        )
    family, device = policy.family, getattr(policy, "device", "cpu")
    prompt_length, step_L = trajectory.prompt_length, trajectory.step_map.long()
    final_L = torch.cat([trajectory.response_ids, trajectory.tail_ids])
    # in the tail, which nothing fills, only given tokens were not drawn
    given_L = (torch.arange(final_L.numel()) >= trajectory.response_length) & (step_L == 0)
    if trajectory.hint_mask is not None:
        given_L[: trajectory.hint_mask.numel()] = trajectory.hint_mask
    # what a row never decoded was masked all the time: a window that ended early, a filled rest
    missing = config.max_new_tokens - final_L.numel()
    unseen = torch.full((missing,), family.mask_id)
    length = prompt_length + config.max_new_tokens
    drawn = (step_L > 0).nonzero()[:, 0]
    logprob_L = torch.zeros(final_L.numel())
    steps = step_L[drawn].unique().tolist()
    for begin in range(0, len(steps), max_batch):
        some = steps[begin : begin + max_batch]
        ids, rows, columns = [], [], []
        for copy, step in enumerate(some):
            visible_L = given_L | ((step_L > 0) & (step_L < step))
            state_L = torch.where(visible_L, final_L, family.mask_id)
            ids.append(torch.cat([trajectory.prompt_ids, state_L, unseen]))
            here = (step_L == step).nonzero()[:, 0]
            columns.append(here)
            rows.append(copy * length + prompt_length + here)
        column_N = torch.cat(columns)
        lengths = [length] * len(some)
        if family.kind == "block":
            visibility = Visibility.block_causal(lengths, family.block_size)
        else:
            visibility = Visibility.full(lengths)
        visibility = visibility.to(device)
        stats = policy.stats(
            torch.cat(ids).to(device),
            visibility,
            rows=policy.predicting_rows(torch.cat(rows).to(device, torch.int32), visibility),
            targets=final_L[column_N].to(device),
            forbid_ids=config.never_drawn(family),
        )
        logprob_L[column_N] = stats.logprob.float().cpu()
    return logprob_L


def cache_gaps(policy: Any, trajectory: Trajectory, config: SamplerConfig) -> Tensor:
    """float32, for each drawn token the distance of its recorded log-probability from the exact one
    of ``replay_logprobs``: what an approximate cache costs in fidelity."""
    assert trajectory.logp_rollout is not None and trajectory.step_map is not None
    with evaluating(policy):
        exact_L = replay_logprobs(policy, trajectory, config)
    return (trajectory.logp_rollout - exact_L).abs()[trajectory.step_map > 0]
