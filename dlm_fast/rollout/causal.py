"""Flat decoding of autoregressive models: one token after the other, each row by itself.

Rows of equal prompts share the prompt's keys. Random numbers are keyed by (seed, sequence id,
position), so a row does not depend on its company.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops.tree_kv_pool import TreePoolExhausted
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import PathNetwork
from dlm_fast.rollout.path_networks import path_network
from dlm_fast.rollout.path_nodes import PathNode, root_of
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory


def decode_rows(
    policy: Any,
    prompts: Sequence[Tensor],
    sampler: SamplerConfig,
    seed: int,
    sequence_ids: Sequence[int],
    *,
    max_batch: int | None = None,
    forward: Forward | None = None,
    on_done: Callable[[list[int], list[Trajectory]], None] | None = None,
) -> list[Trajectory]:
    """One response per prompt [P], up to an end-of-text token or ``rollout.max_new_tokens``."""
    network = path_network(policy, sampler, seed, forward)
    ids = [tuple(prompt.tolist()) for prompt in prompts]
    rows = _Rows(network, ids, sequence_ids, sampler.max_new_tokens, max_batch)
    made: dict[int, Trajectory] = {}
    while rows.enter():
        try:
            network.step(list(rows.inside.values()))
        except TreePoolExhausted as error:
            if len(rows.inside) == 1:
                raise TreePoolExhausted(
                    f"one rollout alone needs more pages than rollout.cache_pages="
                    f"{sampler.cache_pages}; raise it, or shorten the prompt or "
                    f"rollout.max_new_tokens ({error})"
                ) from None
            rows.put_back()
            continue
        done = [row for row, node in rows.inside.items() if not node.is_open]
        if not done:
            continue
        found = [
            _trajectory(prompts[row], rows.inside[row], sampler, seed, sequence_ids[row])
            for row in done
        ]
        rows.leave(done)
        made |= zip(done, found, strict=True)
        if on_done is not None:
            on_done(done, found)
    return [made[row] for row in range(len(prompts))]


class _Rows:
    """Which rows decode now. Rows of equal prompts hang below one root."""

    def __init__(
        self,
        network: PathNetwork,
        prompts: Sequence[tuple[int, ...]],
        sequence_ids: Sequence[int],
        room: int,
        max_batch: int | None,
    ) -> None:
        self._network, self._prompts, self._sequence_ids = network, prompts, sequence_ids
        self._room_of_row = room
        self._most = len(prompts) if max_batch is None else max_batch
        self._room = self._most
        self._waiting = deque(range(len(prompts)))
        self._unfinished = Counter(prompts)
        self._roots: dict[tuple[int, ...], PathNode] = {}
        self.inside: dict[int, PathNode] = {}

    def enter(self) -> bool:
        """Lets rows in while there is room; whether any is inside."""
        while self._waiting and len(self.inside) < self._room:
            row = self._waiting.popleft()
            prompt = self._prompts[row]
            if prompt not in self._roots:
                self._roots[prompt] = root_of(prompt, 0)
            self.inside[row] = self._roots[prompt].grow(self._room_of_row)
            self.inside[row].key = self._sequence_ids[row]
        return bool(self.inside)

    def put_back(self) -> None:
        """Pages ran out: the row that came last begins again when another one has finished."""
        row, node = self.inside.popitem()
        self._network.forget([node])
        self._waiting.appendleft(row)
        self._room = len(self.inside)

    def leave(self, rows: Sequence[int]) -> None:
        """These rows are finished; the last one of a prompt takes it along."""
        self._room = self._most
        for row in rows:
            self._network.forget([self.inside.pop(row)])
            prompt = self._prompts[row]
            self._unfinished[prompt] -= 1
            if not self._unfinished[prompt]:
                self._network.forget([self._roots.pop(prompt)])


def _trajectory(
    prompt: Tensor,
    node: PathNode,
    sampler: SamplerConfig,
    seed: int,
    sequence_id: int,
) -> Trajectory:
    return Trajectory(
        prompt_ids=prompt.clone(),
        response_ids=torch.tensor(node.tokens),
        step_map=torch.tensor(node.steps, dtype=torch.int32),
        logp_rollout=torch.tensor(node.logprobs, dtype=torch.float32),
        confidence=(
            torch.tensor(node.confidences, dtype=torch.float32)
            if sampler.record_confidence
            else None
        ),
        sequence_id=sequence_id,
        seed=seed,
        block_size=1,
        finish_reason="eos" if node.is_stopped else "length",
        num_forwards=node.step,
    )
