"""Small models, recorded rollouts and a context for the tests of TraceRL."""

from __future__ import annotations

import torch

import dlm_fast
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.tracerl import Config
from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

EOS, MASK = 1, 31


def rollout(step, *, prompt=(5, 6, 7), ids=None, **fields):
    """A recorded response; ids are no special tokens."""
    ids = list(range(10, 10 + len(step))) if ids is None else ids
    return Trajectory(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        response_ids=torch.tensor(ids),
        step_map=torch.tensor(step, dtype=torch.int32),
        logp_rollout=torch.full((len(step),), -1.0),
        **fields,
    )


def tiny(kind, **options):
    sizes = {"width": 16, "heads": 2, "layers": 2, "block_size": 4, "seed": 2}
    return dlm_fast.load("tiny", kind=kind, **(sizes | options)).double()


def sampler(**options):
    return SamplerConfig(**({"max_new_tokens": 12, "block_size": 4, "steps": 6} | options))


def sampled_groups(policy, prompts=2, size=4, **options):
    config = sampler(temperature=1.0, **options)
    ids = [torch.arange(3, 8 + p) for p in range(prompts) for _ in range(size)]
    made = sample(policy, ids, config, seed=3)
    groups = []
    for p in range(prompts):
        members = made[p * size : (p + 1) * size]
        for member, trajectory in enumerate(members):
            trajectory.group_id, trajectory.member = p, member
            trajectory.sequence_id = 10 * p + member
            trajectory.reward = float((trajectory.response_ids % 3 == 0).double().mean())
            trajectory.correct = trajectory.reward > 0.3
        groups.append(Group(task_id=p, prompt_ids=ids[p * size], trajectories=members))
    return groups


def context(algorithm, policy, iteration=0):
    modules = {name: spec.module for name, spec in algorithm.modules(policy).items()}

    def score(*inputs, module="policy", **requests):
        with torch.no_grad():
            return modules[module](*inputs, **requests)

    made = Context(score=score, global_sum=lambda x: x, iteration=iteration, seed=0, micro_batch=4)
    return made, modules


def build(policy, rollout_config=None, num_prompts=2, **options):
    config = Config(**({"group_size": 4} | options))
    return config.build(
        rollout=rollout_config or sampler(),
        num_prompts=num_prompts,
        mask_id=policy.family.mask_id,
        seed=5,
    )
