"""Causal policies that follow a script, and checks of the trees they grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.family import Family
from dlm_fast.ops import TokenStats
from dlm_fast.ops.philox import philox_uniform
from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout import SamplerConfig
from dlm_fast.rollout.rollout_tree import RolloutTree
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_sampler import sample_trees

EOS = 0
Script = Callable[[Sequence[int], float], int]
"""tokens of a path and a uniform number -> the next token"""


class ScriptedPolicy:
    """The next token is what the script says; its log-probability is minus its id over 100. Token
    t decodes to chr(t); end-of-text tokens to nothing."""

    def __init__(
        self, script: Script, *, eos_ids: Sequence[int] = (EOS,), max_length: int | None = None
    ) -> None:
        self.script = script
        self.family = Family(
            model_type="scripted",
            kind="causal",
            logit_shift=1,
            vocab_size=256,
            mask_id=None,
            eos_ids=tuple(eos_ids),
            max_length=max_length,
        )
        self.device = torch.device("cpu")
        self.drawn_per_forward: list[int] = []

    def encode(self, text: str, chat: bool = True) -> Tensor:
        return torch.tensor([ord(c) for c in text], dtype=torch.int64)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(t) for t in token_ids if t not in self.family.eos_ids)

    def stats(
        self, input_ids: Tensor, visibility: Visibility, *, rows: Tensor, rng: Any, **_: Any
    ) -> TokenStats:
        self.drawn_per_forward.append(rows.numel())
        ends = torch.tensor(visibility.lengths).cumsum(0).tolist()
        begins = {end - 1: end - n for end, n in zip(ends, visibility.lengths, strict=True)}
        uniform_N = philox_uniform(rng, 1)[:, 0].tolist() if rng is not None else [0.5] * len(rows)
        token_N = torch.tensor(
            [
                self.script(input_ids[begins[row] : row + 1].tolist(), uniform)
                for row, uniform in zip(rows.tolist(), uniform_N, strict=True)
            ]
        )
        zeros_N = torch.zeros(len(rows))
        return TokenStats(
            token=token_N,
            confidence=zeros_N + 0.5,
            lse=zeros_N,
            entropy=zeros_N,
            margin=zeros_N,
            logprob=-token_N.float() / 100,
        )


def ends_with_chance(chance: float) -> Script:
    """Ends with this probability at every token, else draws a letter."""

    def script(path: Sequence[int], uniform: float) -> int:
        if uniform < chance:
            return EOS
        return ord("a") + int((uniform - chance) / (1 - chance) * 26)

    return script


def writes(text: str) -> Script:
    """Writes this text behind a prompt of one token; 0 in it ends."""
    return lambda path, uniform: ord(text[len(path) - 1])


def sampler(max_new_tokens: int, **changes: Any) -> SamplerConfig:
    settings = {"block_size": 1, "steps": max_new_tokens, "temperature": 1.0, **changes}
    return SamplerConfig(max_new_tokens=max_new_tokens, **settings)


def grow(policy: Any, tree: TreeConfig, prompts: Sequence[Any] = ("P",), **options: Any):
    """Trees of at most ``segment * max_depth`` tokens a response."""
    longest = options.pop("max_new_tokens", tree.segment * tree.max_depth)
    drawing = sampler(longest, **options.pop("drawing", {}))
    return sample_trees(policy, list(prompts), drawing, tree, **options)


def check_tree(tree: RolloutTree, config: TreeConfig) -> None:
    """What holds of every tree."""
    made = tree.trajectories(seed=0, block_size=1)
    content: dict[int, tuple[int, list[int], list[float]]] = {}
    parent_of: dict[int, int] = {}
    for trajectory in made:
        begin, above = 0, -1
        assert sum(trajectory.node_lengths) == trajectory.response_length
        for node, length in zip(trajectory.node_path, trajectory.node_lengths, strict=True):
            assert node > above and parent_of.setdefault(node, above) == above
            own = (
                begin,
                trajectory.response_ids[begin : begin + length].tolist(),
                trajectory.logp_rollout[begin : begin + length].tolist(),
            )
            assert content.setdefault(node, own) == own
            assert 0 < length <= config.segment
            begin, above = begin + length, node
        assert trajectory.node_path[-1] not in parent_of.values()
    assert sum(len(tokens) for _, tokens, _ in content.values()) == tree.unique_tokens
    assert sum(t.response_length for t in made) == tree.flat_tokens
    below: dict[int, int] = {}
    for trajectory in made:
        for node in trajectory.node_path:
            below[node] = below.get(node, 0) + 1
    assert sum(len(content[n][1]) * below[n] for n in content) == tree.flat_tokens


def shape(tree: RolloutTree) -> list[Any]:
    """What two equal trees agree in."""
    return [
        (t.response_ids.tolist(), t.node_path, t.node_lengths, t.finish_reason, t.detail)
        for t in tree.trajectories(seed=0, block_size=1)
    ]
