"""The gradient of one optimizer step: the sum over its micro-batches, in at least float32.

Which parameters have a main gradient of their own, outside autograd:

    all                     with ``train.gradient_statistics`` or ``train.per_sample_clip``
    those of 16 bits        their ``.grad`` would lose small contributions
    the head                ``train.head_gradient=in_place``: the fused op adds to it
    none                    where modules are sharded: the wrapper owns the sum

Replicated modules with main gradients sum over ranks here, once, after the last micro-batch.
A sample is a micro-batch, its gradient scaled so that the step's gradient is the samples' mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from dlm_fast.models.head import Head
from dlm_fast.models.head_gradient import HeadGradient
from dlm_fast.ops import GradAccumulator
from dlm_fast.ops.grad_accumulator import gradient_moments
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.metrics import MetricSums
from dlm_fast.training.run_config import TrainConfig


class Accumulation:
    """Sums the gradients of a module's micro-batches; ``p.grad`` holds them after ``finish``."""

    def __init__(self, module: nn.Module, config: TrainConfig, runtime: Runtime) -> None:
        self._params = [p for p in module.parameters() if p.requires_grad]
        self._runtime = runtime
        self._clip = config.per_sample_clip
        self._per_sample = config.gradient_statistics or self._clip > 0
        if self._per_sample and runtime.is_sharded:
            raise ValueError(
                "train.gradient_statistics and train.per_sample_clip need whole gradients in every "
                "process, but FSDP2 shards them; switch both off, or use replicated modules (DDP)"
            )
        self._heads: list[Head] = []
        if config.head_gradient == "in_place" and not runtime.is_sharded and not self._per_sample:
            heads = [m for m in module.modules() if isinstance(m, Head)]
            self._heads = [head for head in heads if head.weight.requires_grad]
        self._sum = self._make_sum()
        self._largest_norm, self._samples = 0.0, 0

    def _make_sum(self) -> GradAccumulator | None:
        kept = {id(head.weight) for head in self._heads}
        chosen = [
            p
            for p in self._params
            if self._per_sample or id(p) in kept or p.dtype in (torch.bfloat16, torch.float16)
        ]
        if not chosen or self._runtime.is_sharded:
            return None
        return GradAccumulator(chosen, statistics=self._per_sample)

    @property
    def owns_reduction(self) -> bool:
        """Ranks are summed by ``finish``; wrappers must not do it."""
        return self._sum is not None and self._runtime.world > 1

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied by: wrappers average gradients over ranks, but losses are
        already shares of global means."""
        return 1.0 if self._sum is not None else float(self._runtime.world)

    @contextlib.contextmanager
    def step(self, num_samples: int) -> Iterator[None]:
        """The micro-batches of one optimizer step; ``num_samples`` of them over all ranks."""
        gradients = []
        if self._sum is not None:
            self._sum.zero()
            self._samples = num_samples
            self._sum.per_sample_clip = self._clip / num_samples if self._clip > 0 else None
            gradients = [HeadGradient(self._sum.buffer(head.weight)) for head in self._heads]
        for head, gradient in zip(self._heads, gradients, strict=False):
            head.gradient = gradient
        try:
            yield
            for gradient in gradients:
                gradient.check_closed()
        finally:
            for head in self._heads:
                head.gradient = None

    def add(self, *, is_sample: bool = True) -> None:
        """After each backward pass; an idle one is no sample."""
        if self._sum is None:
            return
        if not is_sample:
            for param in self._sum.params:
                param.grad = None
            return
        for head in self._heads:
            self._sum.accumulated(head.weight)
        if self._heads or any(p.grad is not None for p in self._sum.params):
            self._sum.add()

    def finish(self) -> None:
        """Sums over ranks and gives every parameter its gradient."""
        if self._sum is None:
            return
        if self.owns_reduction:
            kept = {id(param) for param in self._sum.params}
            totals = list(self._sum.main_grads)
            for param in self._params:
                if id(param) in kept:
                    continue
                if param.grad is None:  # other ranks may have one
                    param.grad = torch.zeros_like(param)
                totals.append(param.grad)
            self._runtime.sum_tensors(totals)
        self._sum.assign_grads(everywhere=self.owns_reduction)

    def report(self, name: str, norm: float, sums: MetricSums) -> None:
        """Metrics of the samples, ``norm`` being that of the whole gradient. A collective."""
        if self._sum is None or not self._per_sample:
            return
        found = self._sum.statistics()
        own = found.norms * self._samples, found.clip_factors
        gathered = self._runtime.gather(own)
        if not self._runtime.is_main:
            return
        norm_K, factor_K = (torch.cat([part[i] for part in gathered]) for i in range(2))
        if not norm_K.numel():
            return
        square_K = (norm_K * factor_K).square()
        count = norm_K.numel()
        _, variance, _ = gradient_moments(torch.ones(count), square_K, (norm * count) ** 2)
        sums.add(f"{name}/sample_norm", float(norm_K.mean()))
        sums.add_max(f"{name}/sample_norm_max", float(norm_K.max()))
        if self._clip > 0:
            sums.add(f"{name}/sample_clip_fraction", float((factor_K < 1).double().mean()))
        if math.isfinite(variance):
            sums.add(f"{name}/sample_variance", variance)
            if norm > 0:
                sums.add(f"{name}/noise_scale", variance / norm**2)
