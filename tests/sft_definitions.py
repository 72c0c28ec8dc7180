"""The supervised variants spelt out: a forward of its own for every state, nothing packed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dlm_fast
from dlm_fast.algorithms.sft import SFT, Config
from dlm_fast.ops import Visibility
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

EVERY = [
    ("random_masking", "full"),
    ("semi_ar", "full"),
    ("semi_ar", "block"),
    ("trace", "full"),
    ("trace", "block"),
    ("ar", "causal"),
]
"""(variant, kind of attention)"""


@functools.cache
def tiny(kind: str = "full", block_size: int = 4, shift: int | None = None) -> Any:
    options = {"block_size": block_size, "logit_shift": shift, "seed": 2}
    return dlm_fast.load("tiny", kind=kind, width=16, heads=2, layers=2, **options).double()


EOS = tiny().family.eos_ids[0]


def make(policy: Any, block_size: int = 4, window: int = 24, **options: Any) -> SFT:
    rollout = SamplerConfig(max_new_tokens=window, block_size=min(block_size, window), steps=window)
    return Config(**options).build(
        rollout=rollout, num_prompts=4, mask_id=policy.family.mask_id, seed=3
    )


def demonstration(prompt: int, response: int, number: int = 0, pads: int = 0) -> Group:
    """Random text of ``response`` tokens with its end, and ``pads`` more ends of text."""
    generator = torch.Generator().manual_seed(100 * prompt + 10 * response + number)
    ids = torch.randint(0, 90, (prompt + response,), generator=generator)
    ids[-1] = EOS
    trajectory = Trajectory(
        prompt_ids=ids[:prompt],
        response_ids=torch.cat([ids[prompt:], torch.full((pads,), EOS)]),
        sequence_id=number,
        group_id=number,
        finish_reason="data",
    )
    return Group(task_id=number, prompt_ids=ids[:prompt], trajectories=[trajectory])


@dataclass(frozen=True)
class Spelt:
    """A demonstration before a policy; ``length``: its tokens that may be targets."""

    policy: Any
    trajectory: Trajectory
    block_size: int
    window: int
    length: int

    def block_of(self, token: int) -> int:
        on_grid = self.policy.family.kind == "block"
        return (self.trajectory.prompt_length * on_grid + token) // self.block_size

    def blocks(self) -> dict[int, list[int]]:
        """block -> its tokens that may be targets."""
        found: dict[int, list[int]] = {}
        for token in range(self.length):
            found.setdefault(self.block_of(token), []).append(token)
        return found

    def state(self, visible: Iterable[int], block: int) -> Tensor:
        """Prompt, then the visible tokens and masks: all of the response, or as far as a block
        model in ``block`` sees."""
        response = self.trajectory.response_ids
        count = len(response)
        if self.policy.family.kind == "block":
            count = max(self.window, count)
            count = sum(self.block_of(token) <= block for token in range(count))
        ids = torch.full((count,), self.policy.family.mask_id)
        chosen = torch.tensor(sorted(visible), dtype=torch.int64)
        ids[chosen] = response[chosen]
        return torch.cat([self.trajectory.prompt_ids, ids])

    def score(self, ids: Tensor, tokens: Iterable[int], causal: bool = False) -> Tensor:
        """Sum of the log-probabilities of the response's ``tokens`` in the state ``ids``."""
        chosen = torch.tensor(sorted(tokens))
        if causal:
            logits = self.policy.logits(ids, Visibility.causal([len(ids)]))
        else:
            logits = self.policy.logits(ids[None])[0]
        found = logits[self.trajectory.prompt_length + chosen].log_softmax(-1)
        return found.gather(1, self.trajectory.response_ids[chosen][:, None]).sum()

    def random_masking(self, masked: set[int]) -> Tensor:
        visible = set(range(self.length)) - masked
        return self.score(self.state(visible, 0), masked) if masked else torch.zeros(())

    def semi_ar(self, masked: set[int]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for block, tokens in self.blocks().items():
            targets = masked & set(tokens)
            visible = set(range(tokens[-1] + 1)) - targets
            if targets:
                total = total + self.score(self.state(visible, block), targets)
        return total

    def greedy_steps(self, per_step: int) -> list[list[int]]:
        """Tokens that each step reveals, a forward per step."""
        steps, mask = [], self.policy.family.mask_id
        for block, tokens in self.blocks().items():
            hidden = list(tokens)
            while hidden:
                visible = set(range(tokens[-1] + 1)) - set(hidden)
                logits = self.policy.logits(self.state(visible, block)[None])[0].detach()
                logits[:, mask] = -torch.inf
                sure = logits.softmax(-1).max(-1).values[self.trajectory.prompt_length :]
                hidden.sort(key=lambda token: (-float(sure[token]), token))
                steps.append(sorted(hidden[:per_step]))
                hidden = hidden[per_step:]
        return steps

    def trace(self, steps: list[list[int]], shrink: int) -> Tensor:
        total, visible = torch.zeros((), dtype=torch.float64), set()
        for block, group in self._merged(steps, shrink):
            total = total + self.score(self.state(visible, block), group)
            visible |= set(group)
        return total

    def _merged(self, steps: list[list[int]], shrink: int) -> Iterator[tuple[int, list[int]]]:
        """(block, tokens) of merged steps; block models merge inside a block alone."""
        parts = [steps]
        if self.policy.family.kind == "block":
            blocks = sorted({self.block_of(step[0]) for step in steps})
            parts = [[s for s in steps if self.block_of(s[0]) == block] for block in blocks]
        for part in parts:
            for start in range(0, len(part), shrink):
                group = [token for step in part[start : start + shrink] for token in step]
                yield self.block_of(group[0]), group

    def ar(self) -> Tensor:
        ids = torch.cat([self.trajectory.prompt_ids, self.trajectory.response_ids])
        total = torch.zeros((), dtype=torch.float64)
        for token in range(self.length):
            so_far = ids[: self.trajectory.prompt_length + token + 1]
            total = total + self.score(so_far, [token], causal=True)
        return total


def targets_of(samples: Any) -> dict[int, list[tuple[int, int]]]:
    """(copy, token) of the targets of each response; full attention's ``semi_ar`` counts a copy
    per (order, block)."""
    found: dict[int, list[tuple[int, int]]] = {}
    for micro in samples:
        rows = micro.rows
        names = zip(rows.response.tolist(), rows.copy.tolist(), rows.token.tolist(), strict=True)
        for response, copy, token in names:
            found.setdefault(response, []).append((copy, token))
    return {response: sorted(names) for response, names in found.items()}


def gradient(loss: Tensor, policy: Any) -> Tensor:
    parameters = list(policy.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )
