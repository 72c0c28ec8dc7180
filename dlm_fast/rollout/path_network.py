"""One token for each of many paths: what any way of doing it offers, and the one without a cache.

Letters: ``T`` packed tokens of one forward, ``N`` paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm_fast.ops import Rng, Stream, TokenStats
from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_nodes import PathNode
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.unmask import check_finite


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are drawn. A draw is named by the node's key and the token's position."""

    sampler: SamplerConfig
    forbid_ids: tuple[int, ...]
    eos_ids: frozenset[int]
    seed: int
    device: torch.device | str = "cpu"

    def options(
        self, nodes: Sequence[PathNode], position_N: Tensor | None = None, step_N: Tensor | int = 0
    ) -> dict[str, Any]:
        """Arguments of the forward for one token of each node: the next one, or that at these
        positions."""
        config, rng = self.sampler, None
        if position_N is None:
            position_N = torch.tensor([node.stop for node in nodes])
        if config.temperature > 0:
            rng = Rng.of(self.seed, Stream.TOKEN, [node.key for node in nodes])
            rng = rng.at(position=position_N, step=step_N).to(self.device)
        return {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "forbid_ids": self.forbid_ids,
            "rng": rng,
        }


class PathNetwork(Protocol):
    """Draws tokens at the ends of paths. Nodes without tokens draw from their parent's last row,
    which is computed once for all of them."""

    tokens_forwarded: int
    """tokens that went through the network so far"""

    @property
    def pages_peak(self) -> int:
        """Most pages of keys in use at once so far; 0 where no keys are kept."""
        ...

    def step(self, nodes: Sequence[PathNode]) -> None:
        """One forward; every node, which must be open, gets a drawn token. On an error no node has
        changed. Raises ``TreePoolExhausted`` where pages are too few."""
        ...

    def finish(self, node: PathNode) -> None:
        """Its pages may be taken, until it or a child of it draws again."""
        ...

    def split(self, node: PathNode, count: int) -> PathNode:
        """``PathNode.split`` of a node that this network has seen."""
        ...

    def forget(self, nodes: Sequence[PathNode]) -> None:
        """Nothing of these nodes is needed any more; parents before their children."""
        ...


def sources_of(nodes: Sequence[PathNode]) -> tuple[list[PathNode], list[int]]:
    """The nodes whose last rows predict, each once, and which of them each node draws from."""
    place: dict[int, int] = {}
    sources: list[PathNode] = []
    source_N: list[int] = []
    for node in nodes:
        source = node if node.tokens else node.parent
        assert source is not None
        if id(source) not in place:
            place[id(source)] = len(sources)
            sources.append(source)
        source_N.append(place[id(source)])
    return sources, source_N


def append_drawn(nodes: Sequence[PathNode], stats: TokenStats, eos_ids: frozenset[int]) -> None:
    """Writes the drawn tokens and their numbers to the nodes."""
    check_finite(stats.logprob)
    drawn = zip(
        nodes,
        stats.token.tolist(),
        stats.logprob.tolist(),
        stats.confidence.tolist(),
        strict=True,
    )
    for node, token, logprob, confidence in drawn:
        node.tokens.append(token)
        node.is_stopped = token in eos_ids
        node.logprobs.append(logprob)
        node.confidences.append(confidence)
        node.step += 1
        node.steps.append(node.step)


class WholePaths:
    """The definition: each token is drawn after a forward of its whole path."""

    def __init__(self, policy: Any, forward: Forward, drawing: Drawing) -> None:
        self._policy, self._forward, self._drawing = policy, forward, drawing
        self._device = getattr(policy, "device", "cpu")
        self.tokens_forwarded = 0

    @property
    def pages_peak(self) -> int:
        return 0

    def step(self, nodes: Sequence[PathNode]) -> None:
        sources, source_N = sources_of(nodes)
        paths = [source.path_tokens() for source in sources]
        lengths = tuple(map(len, paths))
        ids_T = torch.tensor([token for path in paths for token in path], device=self._device)
        last_S = torch.tensor(lengths).cumsum(0) - 1
        stats = self._forward(
            ids_T,
            Visibility.causal(lengths).to(self._device),
            rows=last_S[source_N].to(self._device, torch.int32),
            **self._drawing.options(nodes),
        )
        append_drawn(nodes, stats, self._drawing.eos_ids)
        self.tokens_forwarded += sum(lengths)

    def finish(self, node: PathNode) -> None:
        pass

    def split(self, node: PathNode, count: int) -> PathNode:
        return node.split(count)

    def forget(self, nodes: Sequence[PathNode]) -> None:
        pass
