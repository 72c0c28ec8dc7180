"""The rollout layer: the denoising loop, its configuration, and what it leaves behind."""

from dlm_fast.rollout.rollout_tree import Leaf, RolloutTree
from dlm_fast.rollout.sampler import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory, trajectories_of
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_sampler import rollout_trees, sample_trees
from dlm_fast.rollout.unmask import ConfiguredRule, Decision, UnmaskRule

__all__ = [
    "sample",
    "SamplerConfig",
    "Trajectory",
    "Group",
    "trajectories_of",
    "TreeConfig",
    "sample_trees",
    "rollout_trees",
    "RolloutTree",
    "Leaf",
    "UnmaskRule",
    "Decision",
    "ConfiguredRule",
]
