"""Small models and groups of rollouts for the tests of IGPO."""

from __future__ import annotations

import torch

import dlm_fast
from dlm_fast.algorithms.igpo import Config
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

SMALL = {"group_size": 4, "tail": 2, "chunk_min": 2, "chunk_max": 4}


def tiny(**options):
    return dlm_fast.load("tiny", **({"width": 16, "layers": 2, "heads": 2, "seed": 2} | options))


EOS = tiny().family.eos_ids[0]
MASK = tiny().family.mask_id


def sampler(**options):
    return SamplerConfig(**({"max_new_tokens": 12, "block_size": 4, "steps": 6} | options))


def build(policy, num_prompts=2, rollout=None, **options):
    return Config(**(SMALL | options)).build(
        rollout=rollout or sampler(temperature=1.0),
        num_prompts=num_prompts,
        mask_id=policy.family.mask_id,
        seed=5,
    )


def rollouts(policy, prompts=2, size=4, hints=True):
    """Groups of different prompt lengths; the first two members of the first were given tokens."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for p in range(prompts):
        members = []
        for g in range(size):
            ids = torch.randint(3, 60, (12,), generator=generator)
            ids[8 + g :] = EOS
            hint = torch.zeros(12).bool()
            if hints and p == 0 and g < 2:
                hint[2:9] = True
            members.append(
                Trajectory(
                    prompt_ids=torch.arange(3, 8 + p),
                    response_ids=ids,
                    hint_mask=hint,
                    group_id=p,
                    member=g,
                    reward=float(g % 2),
                    correct=g % 2 == 1,
                )
            )
        groups.append(Group(task_id=p, prompt_ids=members[0].prompt_ids, trajectories=members))
    return groups
