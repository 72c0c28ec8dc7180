"""IGPO end to end without the training loop: hints rescue what sampling cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from igpo_toys import build, sampler
from trace_toys import context

import dlm_fast
from dlm_fast.rollout import sample
from dlm_fast.rollout.trajectory import Group

TARGET = list(range(10, 16))
GROUP = 8


def right(ids):
    """Three tokens in a row of the target, at their places: out of reach of a guess."""
    hits = ids[: len(TARGET)] == torch.tensor(TARGET)
    return bool((hits[:-2] & hits[1:-1] & hits[2:]).any())


def all_wrong(guidance, seed, iterations=16):
    """Share of iterations in which no plain rollout was right, and how far the policy moved."""
    policy = dlm_fast.load(
        "tiny", width=32, layers=1, heads=2, seed=seed, learned_positions=True, max_length=32
    )
    policy.encode = lambda text, chat=False: torch.tensor(TARGET)
    before = copy.deepcopy(policy.state_dict())
    config = sampler(max_new_tokens=16, block_size=16, steps=8, temperature=1.0, early_stop=False)
    algorithm = build(
        policy, 1, config, group_size=GROUP, guidance=guidance, kl_weight=0.0, eta_high=1.0,
        eta_low=0.6, placement="inplace", chunk_min=2, chunk_max=3, epochs=2, hint_keep=1.0,
    )  # fmt: skip
    made, modules = context(algorithm, policy)
    optimizer = torch.optim.AdamW(modules["policy"].parameters(), lr=1e-2)
    prompt, failures = torch.tensor([7, 7, 7]), 0

    def rolled(count, ids, fixed=None):
        found = sample(
            policy, [prompt] * count, config, seed=seed, sequence_ids=ids, fixed_ids=fixed
        )
        for t in found:
            t.correct = right(t.response_ids)
            t.reward = float(t.correct)
        return found

    for iteration in range(iterations):
        ids = [1000 * iteration + i for i in range(GROUP)]
        group = Group(task_id=0, prompt_ids=prompt, trajectories=rolled(GROUP, ids), trace="x")
        for t in group.trajectories:
            t.group_id = iteration
        failures += not any(t.correct for t in group.trajectories)

        def resample(requests, iteration=iteration):
            again = [1000 * iteration + 500 + i for i in range(GROUP)]
            fixed = [list(r.fixed_ids) if r.fixed_ids is not None else None for r in requests]
            return [rolled(r.count, again, f) for r, f in zip(requests, fixed, strict=True)]

        groups = algorithm.refine([group], resample)
        made.metrics.clear()
        for update in algorithm.updates(algorithm.prepare(groups, made), made):
            if not update.micros:
                continue
            sum(algorithm.loss(micro, policy)[0] for micro in update.micros).backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = any(not torch.equal(t, before[name]) for name, t in policy.state_dict().items())
    return failures / iterations, moved


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hints_rescue_what_sampling_cannot(seed):
    """GRPO sees no right rollout and stays where it is; IGPO learns from the first hints on."""
    assert all_wrong("none", seed, iterations=6) == (1.0, False)
    assert all_wrong("resample", seed, iterations=6) == (1.0, False)
    share, moved = all_wrong("inpaint", seed)
    assert moved and share <= 0.5
