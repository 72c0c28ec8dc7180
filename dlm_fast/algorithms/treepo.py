"""TreePO: policy optimisation on trees of rollouts, compared group by group of a shared prefix.

Rollouts of a prompt branch from each other segment by segment (``rollout.tree_config``). A leaf's
advantage is averaged over the groups of leaves that share its first j segments
(``tree_advantages``). With r = pi / pi_old of a token, over all tokens of all leaves,

    loss = mean of  -A min(r, 1 + e_high)             where A >= 0
                    -A min(max(r, 1 - e_low), c)      where A < 0      + beta KL - gamma H

Each unique token of a tree is forwarded once and scored once: with A+, A- and n its sums over the
leaves that contain it (``tree_tokens``), the same loss, exactly, is

    loss_u = -A+ min(r, 1 + e_high) + A- min(max(r, 1 - e_low), c) + beta n kl_u - gamma n H_u

Source: TreePO, arXiv 2508.17445; clip-higher, token mean, rejection of equal trees and the overlong
penalty: DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729.

Symbols: e_low ``clip_low``; e_high ``clip_high``; c ``dual_clip``; beta ``kl_weight``; gamma
``entropy_weight``; A+ ``TreeTokens.plus``; A- ``TreeTokens.minus``; n ``TreeTokens.share``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.clipped_loss import clipped_objective, kl_estimate
from dlm_fast.algorithms.contract import (
    Algorithm,
    Context,
    Metrics,
    Resample,
    ResampleRequest,
    SamplingPlan,
    TrainedModule,
    Update,
)
from dlm_fast.algorithms.mini_batches import MiniBatches
from dlm_fast.algorithms.options import check_range
from dlm_fast.algorithms.target_scores import score_targets
from dlm_fast.algorithms.tree_advantages import tree_advantages
from dlm_fast.algorithms.tree_metrics import tree_metrics
from dlm_fast.algorithms.tree_options import TreePolicyOptions
from dlm_fast.algorithms.tree_rows import NodeTokens, TreeLayout, TreeRows
from dlm_fast.algorithms.tree_tokens import (
    TreeTokens,
    node_weights,
    target_counts,
    token_metrics,
    tree_tokens,
)
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory, trajectories_of
from dlm_fast.rollout.tree import Forest, PackedTree
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_sampler import rollout_trees

TreeRollout = Callable[..., list[Trajectory]]
"""makes trees in place of flat rollouts, as ``SamplingPlan.rollout``"""


@dataclass(frozen=True, kw_only=True)
class Config(TreePolicyOptions):
    """TreePO: rollouts that branch, advantages by shared prefix, shared tokens trained once."""

    tree: TreeConfig = field(default_factory=TreeConfig)
    """how trees grow; tree.leaves rollouts per prompt"""
    rollouts: Literal["tree", "flat"] = "tree"
    """flat: as many rollouts per prompt, each drawn on its own, for comparison"""

    @property
    def group_size(self) -> int:
        """Rollouts per prompt."""
        return self.tree.leaves

    @property
    def max_depth(self) -> int:
        """Most segments of a path."""
        return self.tree.max_depth if self.rollouts == "tree" else 1

    anneal_iterations: int = 0
    """iterations over which tree.share_temperature moves to tree.share_temperature_end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, math.inf, "anneal_iterations")
        if (self.tree.share_temperature_end is None) != (self.anneal_iterations == 0):
            raise ValueError(
                f"algorithm.anneal_iterations={self.anneal_iterations} and "
                f"tree.share_temperature_end={self.tree.share_temperature_end} go together: set "
                "both or neither"
            )

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> TreePO:
        """The algorithm for one run."""
        grow = self._grow if self.rollouts == "tree" else None
        return TreePO(
            self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, make_trees=grow
        )

    def _grow(self, iteration: int) -> TreeRollout:
        done = min(1.0, iteration / self.anneal_iterations) if self.anneal_iterations else 0.0
        return partial(rollout_trees, tree=self.tree, progress=done)


class TreePO(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the rows."""

    def __init__(
        self,
        config: TreePolicyOptions,
        *,
        rollout: SamplerConfig,
        num_prompts: int,
        mask_id: int | None,
        make_trees: Callable[[int], TreeRollout] | None = None,
    ) -> None:
        """``make_trees``: what samples the trees of an iteration; None: flat rollouts."""
        self.config, self.rollout = config, rollout
        self.num_prompts, self.mask_id, self.make_trees = num_prompts, mask_id, make_trees
        self.mini_batches = MiniBatches(
            num_prompts=num_prompts, group_size=config.group_size, mini_batch=config.mini_batch
        )
        self._policy: Any = None
        self._forbid_ids: tuple[int, ...] = ()
        self._gen_batches = 1
        self._replaced = 0
        self._skipped = 0

    def loss(self, micro: TreeTokens, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """Minus the objective over the tokens of one forward."""
        config, net_U = self.config, micro.plus - micro.minus
        if micro.old is None and micro.reference is None and not config.entropy_weight:
            # D = 0: the slope of the clipped terms is A+ - A-, that of k1 is n, of k2 and k3 0.
            # Weights that are known before the forward need no second pass over the head.
            slope = config.kl_weight if config.kl == "k1" else 0.0
            output = self._score(micro.rows, forward, (slope * micro.share - net_U) / micro.divisor)
            surrogate, logprob_U = output.objective, output.logprob
            value = -(net_U.sum() / micro.divisor).to(surrogate.dtype)
            loss = surrogate - surrogate.detach() + value
            log_ratio_U = torch.zeros_like(net_U)
        else:
            output = self._score(micro.rows, forward, None)
            logprob_U = output.logprob
            wide_U = logprob_U.double()
            log_ratio_U = wide_U - (wide_U.detach() if micro.old is None else micro.old)
            clips = (config.clip_low, config.clip_high, config.dual_clip)
            gain_U = clipped_objective(log_ratio_U, micro.plus, *clips)
            gain_U = gain_U + clipped_objective(log_ratio_U, -micro.minus, *clips)
            moved_U = log_ratio_U if micro.reference is None else wide_U - micro.reference
            divergence_U = kl_estimate(moved_U, config.kl)
            terms_U = config.kl_weight * divergence_U
            if config.entropy_weight:
                terms_U = terms_U - config.entropy_weight * output.entropy.double()
            loss = ((micro.share * terms_U - gain_U).sum() / micro.divisor).to(logprob_U.dtype)
        clip = (config.clip_low, config.clip_high)
        return loss, token_metrics(micro, logprob_U, log_ratio_U, clip, config.kl)

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        bare: Any = policy
        family = bare.family
        if family.kind == "full":
            raise ValueError(
                f"model family {family.model_type!r} attends to the whole sequence, so no two "
                "rollouts have a state in common; take a causal or block model (tiny: "
                "model_options.kind=causal), or bgpo, tracerl or igpo for this one (igpo with "
                "algorithm.guidance=none is GRPO)"
            )
        if family.kind == "block" and family.block_size != self.rollout.block_size:
            raise ValueError(
                f"rollout.block_size={self.rollout.block_size} differs from the model's own blocks "
                f"of {family.block_size}; set rollout.block_size={family.block_size}"
            )
        if self.config.kl_weight and self.config.kl_to == "reference" and bare.adapters is None:
            raise ValueError(
                "algorithm.kl_to=reference needs adapters, which are switched off for it: set "
                "lora.rank, or algorithm.kl_to=old"
            )
        self._policy = bare
        self._forbid_ids = self.rollout.never_drawn(family)
        return super().modules(policy)

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(
            num_prompts=self.num_prompts,
            group_size=self.config.group_size,
            sampler=self.rollout,
            rollout=self.make_trees(iteration) if self.make_trees else None,
        )

    def refine(self, groups: list[Group], resample: Resample) -> list[Group]:
        """Prompts whose rollouts are all alike get fresh ones, ``max_gen_batches`` in all."""
        self._gen_batches, self._replaced = 1, 0
        while self._gen_batches < self.config.max_gen_batches:
            alike = [group for group in groups if self._is_rejected(group)]
            if not alike:
                break
            count = self.config.group_size
            requests = [ResampleRequest(group=group, count=count) for group in alike]
            for group, made in zip(alike, resample(requests), strict=True):
                self._replaced += PackedTree.of(group).response_tokens
                group.trajectories = made
            self._gen_batches += 1
        return groups

    def prepare(self, groups: list[Group], context: Context) -> list[list[TreeTokens]]:
        """Forward passes of each optimizer step of an epoch."""
        made = [(group, PackedTree.of(group)) for group in groups]
        chosen = [(group, tree) for group, tree in made if not self._is_rejected(group)]
        kept, trees = [group for group, _ in chosen], [tree for _, tree in chosen]
        count = float(len(groups))
        decoded = float(self._replaced + sum(tree.response_tokens for _, tree in made))
        context.metrics |= {
            "tree/rejected": (count - len(kept), count),
            "tree/decoded_tokens": (decoded, count),
            "tree/gen_batches": float(self._gen_batches),
            **tree_metrics(trees, kept, self.config.max_depth),
        }
        if self._skips(len(kept), context):
            return []
        layout = self._layout(context)
        eos_ids = self._policy.family.eos_ids
        tokens = [
            layout.node_tokens(tree, group, eos_ids)
            for tree, group in zip(trees, kept, strict=True)
        ]
        forest = Forest.of(trees)
        counts_N = target_counts(forest, tokens)
        advantage_Q = tree_advantages(
            forest,
            torch.tensor([self._reward(t) for t in trajectories_of(kept)], dtype=torch.float64),
            self.config,
            counts_N[forest.pairs[1]],
            context.global_sum,
        )
        tree_Q = forest.tree_of_leaf[forest.pairs[0]]
        steps = []
        for update in range(self.mini_batches.num_updates):
            members = [
                k
                for k, group in enumerate(kept)
                if self.mini_batches.update_of(group.trajectories[0].group_id) == update
            ]
            # pairs of chosen trees come in the order that their own forest has
            own_Q = advantage_Q[torch.isin(tree_Q, torch.tensor(members, dtype=torch.int64))]
            own = Forest.of([trees[k] for k in members])
            moved = update > 0 or self.config.epochs > 1
            steps.append(self._step(own, [tokens[k] for k in members], own_Q, moved, context))
        rows = float(sum(one.rows.input_ids.numel() for step in steps for one in step))
        context.metrics["tree/rows"] = (rows, float(len(kept)))
        return steps

    def updates(self, samples: list[list[TreeTokens]], context: Context) -> Iterator[Update]:
        for _ in range(self.config.epochs):
            for tokens in samples:
                yield Update(micros=tokens)

    def state(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        self._skipped = int(state["skipped"])

    def _is_rejected(self, group: Group) -> bool:
        members = group.trajectories
        if self.config.reject == "none" or len(members) == 1:
            return False
        if self.config.reject == "correct":
            return len({t.correct for t in members}) == 1
        return len({t.reward for t in members}) == 1

    def _skips(self, kept: int, context: Context) -> bool:
        """Whether no process has a tree to train on; ValueError where that goes on."""
        if context.global_sum(float(kept)):
            self._skipped = 0
            return False
        self._skipped += 1
        context.metrics["tree/skipped"] = float(self._skipped)
        if self._skipped >= self.config.max_skipped:
            raise ValueError(
                f"the leaves of every tree were alike in {self._skipped} iterations in a row, so "
                "there is nothing to learn from: choose easier or harder examples, more rollouts "
                f"per prompt, algorithm.reject=reward or none (now {self.config.reject}), or a "
                "larger algorithm.max_gen_batches"
            )
        return True

    def _reward(self, trajectory: Trajectory) -> float:
        """With the penalty of responses that nearly fill the window."""
        window, longest = self.config.overlong_window, self.rollout.max_new_tokens
        if not window:
            return trajectory.reward
        excess = trajectory.response_length - (longest - window)
        return trajectory.reward - max(0.0, excess / window)

    def _layout(self, context: Context) -> TreeLayout:
        family = self._policy.family
        return TreeLayout(
            kind=family.kind,
            block_size=family.block_size or 0,
            mask_id=-1 if self.mask_id is None else self.mask_id,
            row_budget=self.config.rows_per_forward,
            device=context.device,
        )

    def _step(
        self,
        forest: Forest,
        tokens: Sequence[NodeTokens],
        advantage_Q: Tensor,
        moved: bool,
        context: Context,
    ) -> list[TreeTokens]:
        """One optimizer step: rows, weights and old log-probabilities."""
        counts_N = target_counts(forest, tokens)
        weights = node_weights(forest, advantage_Q, counts_N, self.config.loss_agg)
        divisor = context.global_sum(weights.divisor)
        if not divisor and context.global_sum(float(forest.num_leaves)):
            raise ValueError(
                "the rollouts of an optimizer step have no response token to learn from; look at "
                "rollout.max_new_tokens, or raise algorithm.mini_batch"
            )
        made = [
            tree_tokens(rows, forest, weights)
            for rows in self._layout(context).rows(forest, tokens)
        ]
        with torch.no_grad():
            for one in made:
                one.divisor = divisor
                if self.config.old_logprob == "rollout":
                    one.old = self._recorded(one)
                elif moved:
                    one.old = self._score(one.rows, context.score, None).logprob.double()
                if self.config.kl_weight and self.config.kl_to == "reference":
                    with self._policy.reference():
                        score = self._score(one.rows, context.score, None)
                    one.reference = score.logprob.double()
        return made

    def _recorded(self, micro: TreeTokens) -> Tensor:
        if bool(micro.rollout.isnan().any()):
            raise ValueError(
                "algorithm.old_logprob=rollout, but rollouts hold no log-probabilities; take "
                "old_logprob=recompute"
            )
        return micro.rollout

    def _score(self, rows: TreeRows, forward: Callable[..., Any], weight: Tensor | None) -> Any:
        return score_targets(
            self._policy,
            rows,
            forward,
            weight,
            temperature=self.config.score_temperature,
            forbid_ids=self._forbid_ids,
        )
