"""What the training loop asks of an algorithm, and what an algorithm may ask of the loop.

One iteration of ``training.loop``:

    plan    = algorithm.sampling(iteration)          what to roll out
    groups  = rollouts of the plan, scored by the task
    groups  = algorithm.refine(groups, resample)     replace, reject or ask for more
    samples = algorithm.prepare(groups, context)     advantages, masks, old log-probabilities
    for update in algorithm.updates(samples, context):   a generator, resumed after each step
        for micro in update.micros:
            loss, metrics = algorithm.loss(micro, forward)   forward: the wrapped module
            loss.backward()
        optimizer step of update.module

Everything runs per rank on that rank's groups. Losses are sums divided by *global* counts
(``context.global_sum``), so they do not depend on ranks or micro-batches. ``refine`` and
``prepare`` run while the weights are whole on every rank: forwards there need no agreement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory


class Largest(float):
    """A metric of which the largest is logged, over micro-batches, updates and ranks."""


Metrics = dict[str, float | tuple[float, float]]
"""name -> value. A pair (sum, count) is logged as global sum / global count over micro-batches,
updates and ranks: exact however the work is split. A plain number is averaged over whoever reports
it: right for numbers that are equal everywhere already. Of ``Largest`` ones the largest."""


@dataclass(frozen=True, kw_only=True)
class TrainedModule:
    """A network with an optimizer of its own."""

    module: nn.Module
    idle_loss: Callable[[nn.Module], Tensor]
    """zero loss that touches every trained parameter, for a rank that has no micro-batch left while
    others have: every rank must take part in every backward pass of a sharded module. It gets the
    wrapped module and calls it once, as a loss does: only ``forward`` is seen by the wrapper"""
    lr_scale: float = 1.0
    """learning rate relative to ``train.lr``"""


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What one iteration rolls out."""

    num_prompts: int
    """prompts over all ranks"""
    group_size: int = 1
    """rollouts per prompt"""
    sampler: SamplerConfig | None = None
    """None: no rollouts; every group holds one trajectory, the task's own demonstration"""
    rollout: Callable[..., list[Trajectory]] | None = None
    """replaces ``dlm_fast.sample`` (trees, expert rows); called as rollout(policy, prompts,
    sampler, seed=..., sequence_ids=..., max_batch=...) with one entry per rollout, returns as many
    trajectories, unscored"""
    traces: bool = False
    """groups carry the task's trace of a right completion (``Group.trace``)"""
    fill_to: int = 0
    """demonstrations only: tokens up to which a shorter one is filled with EOS; by default one EOS
    ends it if it is shorter than ``rollout.max_new_tokens``"""


@dataclass(frozen=True, kw_only=True)
class ResampleRequest:
    """Rollouts that ``refine`` asks for: ``count`` more for the prompt of ``group``."""

    group: Group
    count: int = 1
    sampler: SamplerConfig | None = None
    """None: that of the plan"""
    fixed_ids: Sequence[Tensor] | None = None
    """one int64 [max_new_tokens] per rollout: mask id where free, a token where given (hints)"""


Resample = Callable[[Sequence[ResampleRequest]], list[list[Trajectory]]]
"""scored trajectories, one list per request"""


@dataclass(kw_only=True)
class Context:
    """What ``prepare`` and ``updates`` may use; made by the loop for each iteration."""

    score: Callable[..., Any]
    """score(input_ids, visibility=None, module="policy", **requests): forward without gradient. In
    ``prepare`` weights are whole; in ``updates`` it is a collective where weights are sharded"""
    global_sum: Callable[[float], float]
    """sum over ranks; a collective: call it the same number of times on every rank"""
    iteration: int
    seed: int
    device: Any = "cpu"
    micro_batch: int = 16
    """rollouts per forward (``train.micro_batch``)"""
    metrics: Metrics = field(default_factory=dict)
    """algorithms add what they want logged; values are averaged over ranks"""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step."""

    micros: Sequence[Any]
    """micro-batches whose losses add up; their number may differ between ranks, the forwards in
    each may not"""
    module: str = "policy"
    loss: Callable[[Any, Callable[..., Any]], tuple[Tensor, Metrics]] | None = None
    """replaces ``algorithm.loss``, where modules have different losses"""


class Algorithm(Protocol):
    """See the module's text. Subclass it: some methods have defaults."""

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        """What is trained. Default: the policy."""
        return {"policy": TrainedModule(module=policy, idle_loss=lambda module: module(idle=True))}

    def sampling(self, iteration: int) -> SamplingPlan:
        """What iteration ``iteration`` (from 0) rolls out."""
        ...

    def decoding(self, iteration: int, rollout: SamplerConfig) -> SamplerConfig:
        """How held-out examples are decoded after ``iteration`` iterations. Default: ``rollout``,
        the run's own setting."""
        return rollout

    def refine(self, groups: list[Group], resample: Resample) -> list[Group]:
        """Groups as they should be trained on. Default: as sampled."""
        return groups

    def prepare(self, groups: list[Group], context: Context) -> Any:
        """Samples: advantages, masks; old log-probabilities only where mathematics needs them."""
        ...

    def updates(self, samples: Any, context: Context) -> Iterator[Update]:
        """Optimizer steps, lazily: code after a ``yield`` sees the updated weights."""
        ...

    def loss(self, micro: Any, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """Scalar to minimise (already divided by global counts) and metrics of one micro-batch."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep besides modules and optimizers; plain JSON data."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what ``state`` gave."""
        return


class AlgorithmConfig(Protocol):
    """The frozen ``Config`` of an algorithm's file."""

    def build(
        self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> Algorithm:
        """The algorithm; ``num_prompts`` is ``train.prompts_per_step``, over all ranks."""
        ...
