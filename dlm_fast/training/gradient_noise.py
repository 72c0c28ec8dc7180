"""Noise of BGPO's on-policy gradient over its masks: per mask sampler and number of samples.

One batch of rollouts stays fixed; what varies from repetition to repetition is the masks alone. The
gradient is that of ``algorithms.bgpo`` through the policy, weights and advantages included.

    g     = sum over responses i of g_i        masks of different responses are independent, so
    tr Cov(g) = sum_i tr Cov(g_i)              each g_i is measured by itself: the same sum from the
                                               same masks, several times more precise
    tr Cov(g_i) ~ (sum_r |g_ir|^2 - R |mean|^2) / (R - 1)      GradAccumulator.statistics()
    reference = mean over many more samples of an unbiased sampler, with masks of its own

Memory: one gradient per response and three more, whatever the repetitions and samples.
Sources: protocol of BGPO, arXiv 2510.11683 (fixed batch, repeated masks, a reference with many
samples); variance of the ELBO's masks: VRPO, arXiv 2505.19223.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dlm_fast import tasks
from dlm_fast.algorithms import bgpo
from dlm_fast.algorithms.contract import Context, SamplingPlan
from dlm_fast.algorithms.elbo import PAIRED, Micro, Sampler
from dlm_fast.models.load import load
from dlm_fast.ops import GradAccumulator, mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group
from dlm_fast.tasks import refuse_broken_checker
from dlm_fast.training.collect import Collector, Prompt
from dlm_fast.training.data import ExampleStream
from dlm_fast.training.demonstration import ROLLOUT, DemonstrationConfig, warm_start
from dlm_fast.training.loop import Trainer
from dlm_fast.training.noise_statistics import Cell

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

_REFERENCE: Sampler = "coupled_strat"
"""unbiased, and the quietest"""
_REFERENCE_PARTS = 8
"""independent parts of the reference, which say how noisy their mean still is"""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """What is measured, and how often."""

    samplers: tuple[Sampler, ...] = SAMPLERS
    """mask samplers"""
    samples: tuple[int, ...] = (1, 2, 4, 8, 16)
    """numbers n of masks per response; samplers of pairs skip the odd ones"""
    repetitions: int = 8
    """fresh sets of masks per sampler and n; a few of them may miss the rare large gradients, and
    then both noise and interval come out too small"""
    prompts: int = 2
    """prompts of the batch"""
    group_size: int = 4
    """rollouts per prompt"""
    reference_samples: int = 512
    """masks per response behind the reference gradient, a multiple of 16"""
    samples_per_forward: int = 32
    """masks per forward; changes memory and time, not the result"""

    def __post_init__(self) -> None:
        for name in ("prompts", "samples_per_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("repetitions", "group_size"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.reference_samples < 16 or self.reference_samples % (2 * _REFERENCE_PARTS):
            raise ValueError(
                f"reference_samples must be a positive multiple of {2 * _REFERENCE_PARTS}, got "
                f"{self.reference_samples}"
            )
        for name, values in (("samplers", self.samplers), ("samples", self.samples)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be different from each other and at least one")
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown:
            raise ValueError(f"samplers must be of {', '.join(SAMPLERS)}, got {unknown[0]!r}")
        if min(self.samples) < 1:
            raise ValueError(f"samples must be at least 1, got {min(self.samples)}")
        for sampler in self.samplers:
            if len(self.samples_of(sampler)) < 2:
                raise ValueError(
                    f"sampler {sampler} needs two numbers of samples for a slope"
                    f"{', and draws pairs: even ones' if sampler in PAIRED else ''}; got samples="
                    f"{' '.join(map(str, self.samples))}"
                )

    def samples_of(self, sampler: Sampler) -> list[int]:
        """The numbers of samples that a sampler can draw, ascending."""
        return sorted(n for n in self.samples if sampler not in PAIRED or n % 2 == 0)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The noise on one batch."""

    seed: int
    gradient_norm: float
    """of the reference, less what its noise adds"""
    reference_noise: float
    """root of the trace of the reference's own covariance"""
    responses: int
    """rollouts with an advantage"""
    rewards: list[list[float]]
    """of each group"""
    parameters: int
    cells: list[Cell]

    def of(self, sampler: str) -> list[Cell]:
        """The cells of one sampler."""
        return [cell for cell in self.cells if cell.sampler == sampler]


class GradientSums:
    """What the gradients of one response add up to."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._accumulator = GradAccumulator(parameters)
        self._parameters = parameters
        self.squares: list[float] = []
        """squared distance of each gradient from the centre given with it"""

    def add(self, centre: Sequence[Tensor] | None = None) -> None:
        """Takes the parameters' ``.grad``, and frees it."""
        if centre is not None:
            grads = [p.grad for p in self._parameters]
            moved = [c if g is None else g - c for g, c in zip(grads, centre, strict=True)]
            self.squares.append(square_norm(moved))
        self._accumulator.add()

    def zero(self) -> None:
        """Forgets all."""
        self._accumulator.zero()
        self.squares = []

    @property
    def mean(self) -> list[Tensor]:
        count = self._accumulator.count
        return [main.double() / count for main in self._accumulator.main_grads]

    @property
    def variance(self) -> float:
        """Unbiased trace of the covariance of one gradient."""
        return self._accumulator.statistics().variance

    @property
    def variance_error_squared(self) -> float:
        """Squared standard error of the variance: see ``noise_statistics``."""
        count = len(self.squares)
        mean = math.fsum(self.squares) / count
        spread = math.fsum((square - mean) ** 2 for square in self.squares) / (count - 1)
        return spread / count


def square_norm(tensors: Sequence[Tensor]) -> float:
    """Sum of all squares."""
    norms = torch._foreach_norm(list(tensors), 2, torch.float64)
    return math.fsum(float(norm) ** 2 for norm in norms)


class BatchGradient:
    """The gradients of a fixed batch's responses under BGPO's loss, with masks drawn by name."""

    def __init__(
        self,
        policy: Any,
        groups: Sequence[Group],
        config: NoiseConfig,
        rollout: SamplerConfig,
        seed: int,
    ) -> None:
        self.policy, self.groups, self.config = policy, list(groups), config
        self.rollout, self.seed = rollout, seed
        self.parameters = [p for p in policy.parameters() if p.requires_grad]

    def repeat(
        self, sampler: Sampler, num_samples: int, repetitions: int, purpose: int
    ) -> Iterator[Iterator[None]]:
        """Response after response; each step of the inner iterator leaves the gradient under fresh
        masks in the parameters' ``.grad``. Different ``purpose``, different masks."""
        algorithm = bgpo.Config(
            num_samples=num_samples,
            sampler=sampler,
            group_size=self.config.group_size,
            samples_per_forward=self.config.samples_per_forward,
        ).build(
            rollout=self.rollout,
            num_prompts=len(self.groups),
            mask_id=self.policy.family.mask_id,
            seed=mix64(self.seed, purpose, SAMPLERS.index(sampler), num_samples),
        )
        algorithm.modules(self.policy)
        # a micro-batch never mixes responses, so each response's gradient can be taken by itself
        micros_Ri: list[list[list[Micro]]] = []
        for repetition in range(repetitions):
            context = Context(
                score=self.policy,
                global_sum=float,
                iteration=repetition,
                seed=self.seed,
                device=self.parameters[0].device,
                micro_batch=1,
            )
            by_response: dict[int, list[Micro]] = {}
            for micros in algorithm.prepare(self.groups, context):
                for micro in micros:
                    by_response.setdefault(id(micro.records[0].trajectory), []).append(micro)
            micros_Ri.append(list(by_response.values()))
        for micros_R in zip(*micros_Ri, strict=True):
            yield self._gradients(algorithm, micros_R)

    def _gradients(
        self, algorithm: bgpo.BGPO, micros_R: Sequence[Sequence[Micro]]
    ) -> Iterator[None]:
        for micros in micros_R:
            for parameter in self.parameters:
                parameter.grad = None
            for micro in micros:
                algorithm.loss(micro, self.policy)[0].backward()
            yield


def measure(
    policy: Any,
    groups: Sequence[Group],
    config: NoiseConfig,
    *,
    rollout: SamplerConfig,
    seed: int,
    progress: Callable[[Cell], None] | None = None,
) -> Measurement:
    """The noise of every sampler at every n, on the rollouts of ``groups``.

    ``progress`` is called with each cell as it is done.
    """
    batch = BatchGradient(policy, groups, config, rollout, seed)
    policy.train()
    sums = GradientSums(batch.parameters)
    total = [torch.zeros_like(p, dtype=torch.float64) for p in batch.parameters]
    share = config.reference_samples // _REFERENCE_PARTS
    centres, reference_variance = [], 0.0
    for repetitions in batch.repeat(_REFERENCE, share, _REFERENCE_PARTS, purpose=0):
        _sum_up(sums, repetitions)
        reference_variance += sums.variance / _REFERENCE_PARTS
        mean = sums.mean
        torch._foreach_add_(total, mean)
        centres.append([m.to(p.dtype) for m, p in zip(mean, batch.parameters, strict=True)])
    if not centres:
        raise ValueError(
            "every rollout's advantage is 0, as the rewards inside each group are equal: there is "
            "no gradient to measure; take another seed or more prompts"
        )
    norm_squared = square_norm(total) - reference_variance
    if not norm_squared > 0:
        raise ValueError("the reference gradient is all noise; raise reference_samples")
    cells = []
    for sampler in config.samplers:
        for n in config.samples_of(sampler):
            cells.append(_cell(batch, sums, sampler, n, centres, reference_variance))
            if progress is not None:
                progress(cells[-1])
    return Measurement(
        seed=seed,
        gradient_norm=math.sqrt(norm_squared),
        reference_noise=math.sqrt(reference_variance),
        responses=len(centres),
        rewards=[group.rewards.tolist() for group in groups],
        parameters=sum(p.numel() for p in batch.parameters),
        cells=cells,
    )


def _sum_up(
    sums: GradientSums, repetitions: Iterator[None], centre: Sequence[Tensor] | None = None
) -> None:
    sums.zero()
    for _ in repetitions:
        sums.add(centre)


def _cell(
    batch: BatchGradient,
    sums: GradientSums,
    sampler: Sampler,
    num_samples: int,
    centres: Sequence[Sequence[Tensor]],
    reference_variance: float,
) -> Cell:
    repetitions = batch.config.repetitions
    variance = error_squared = 0.0
    offset = [torch.zeros_like(p, dtype=torch.float64) for p in batch.parameters]
    responses = batch.repeat(sampler, num_samples, repetitions, purpose=1)
    for gradients, centre in zip(responses, centres, strict=True):
        _sum_up(sums, gradients, centre)
        variance += sums.variance
        error_squared += sums.variance_error_squared
        torch._foreach_add_(offset, sums.mean)
        torch._foreach_sub_(offset, list(centre))
    unseen = variance / repetitions + reference_variance
    return Cell(
        sampler=sampler,
        num_samples=num_samples,
        repetitions=repetitions,
        variance=variance,
        variance_error=math.sqrt(error_squared),
        bias_squared=square_norm(offset) - unseen,
        unseen=unseen,
    )


def rollouts(
    policy: Any,
    task: Any,
    config: NoiseConfig,
    *,
    rollout: SamplerConfig,
    seed: int,
    data: str | None = None,
) -> list[Group]:
    """The batch: scored rollouts of the first prompts that a run with this seed would see."""
    examples = task.load(data, "train")
    indices = ExampleStream(len(examples), seed).take(config.prompts)
    plan = SamplingPlan(num_prompts=config.prompts, group_size=config.group_size, sampler=rollout)
    collector = Collector(
        policy,
        task,
        plan,
        rollout=rollout,
        iteration=0,
        seed=seed,
        policy_version=0,
        max_batch=config.prompts * config.group_size,
    )
    policy.eval()
    groups = collector.collect(
        [Prompt(example=examples[k], task_id=k, index=i) for i, k in enumerate(indices)]
    )
    failures = sum("checker_error" in score.detail for score in collector.scores)
    refuse_broken_checker(task, failures, len(collector.scores), 1.0, collector.scores)
    return groups


def warm_started(seed: int, steps: int) -> tuple[Any, Any, SamplerConfig]:
    """The demonstration's tiny model after some steps of its warm start, its task, its rollouts."""
    run = warm_start(DemonstrationConfig(seed=seed, warm_start_steps=steps), Path())
    run = replace(run, run_dir=None)
    policy = load(run.model, **run.model_options)
    task = tasks.get(run.task, **run.task_options)
    Trainer(policy, task, run.algorithm, run.train, rollout=ROLLOUT, seed=seed).run()
    return policy, task, ROLLOUT


def measure_tiny(
    config: NoiseConfig,
    warm_start_steps: int,
    *,
    seed: int,
    progress: Callable[[Cell], None] | None = None,
) -> Measurement:
    """The noise at the weights that the demonstration's warm start reaches after so many steps.

    Some training is needed: the gradients of random weights only teach which tokens occur at all.
    """
    policy, task, rollout = warm_started(seed, warm_start_steps)
    groups = rollouts(policy, task, config, rollout=rollout, seed=seed)
    return measure(policy, groups, config, rollout=rollout, seed=seed, progress=progress)
