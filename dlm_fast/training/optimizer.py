"""One optimizer step: micro-batches of all ranks, clipping, refusal of non-finite numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.contract import Algorithm, TrainedModule, Update
from dlm_fast.training.accumulate import Accumulation
from dlm_fast.training.distributed import Runtime, grad_norm
from dlm_fast.training.metrics import MetricSums
from dlm_fast.training.run_config import TrainConfig

logger = logging.getLogger(__name__)

LOWEST_LR_OF_16_BIT_ADAMW = 1e-4


@dataclass(kw_only=True, eq=False)
class Trainee:
    """A trained network with what training it needs."""

    name: str
    spec: TrainedModule
    wrapped: nn.Module
    """as losses call it: replicated or sharded"""
    optimizer: torch.optim.AdamW
    updates: int = 0
    """optimizer steps taken"""

    @property
    def module(self) -> nn.Module:
        return self.spec.module


def make_trainees(
    specs: Mapping[str, TrainedModule], config: TrainConfig, runtime: Runtime
) -> dict[str, Trainee]:
    """Wraps the modules and gives each its optimizer."""
    trainees = {}
    for name, spec in specs.items():
        wrapped = runtime.prepare(spec.module)
        named = [(n, p) for n, p in spec.module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"module {name} of the algorithm has no parameter that is trained")
        lr = config.lr * spec.lr_scale
        for parameter_name, parameter in named:
            if (
                parameter.dtype in (torch.bfloat16, torch.float16)
                and lr < LOWEST_LR_OF_16_BIT_ADAMW
            ):
                raise ValueError(
                    f"{name}: {parameter_name} is {parameter.dtype}, and AdamW in 16 bits moves "
                    f"almost no weight at train.lr={lr:g} (below {LOWEST_LR_OF_16_BIT_ADAMW:g} the "
                    "step is smaller than the rounding); load float32 weights and set "
                    "train.precision=bf16 for bf16 arithmetic"
                )
        optimizer = torch.optim.AdamW(
            [parameter for _, parameter in named],
            lr=lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over weights, gradients and moments instead of ten
        )
        trainees[name] = Trainee(name=name, spec=spec, wrapped=wrapped, optimizer=optimizer)
    return trainees


class TooManyBadSteps(ValueError):
    """``train.max_bad_steps`` optimizer steps in a row were not finite."""


class Stepper:
    """Takes the optimizer steps of a run."""

    def __init__(
        self, trainees: Mapping[str, Trainee], config: TrainConfig, runtime: Runtime
    ) -> None:
        self.trainees = trainees
        self.bad_steps = 0
        """steps skipped since the start of the run"""
        self.bad_in_a_row = 0
        self.gave_up: str | None = None
        """why the run must stop: too many bad steps in a row"""
        self._config = config
        self._runtime = runtime
        self._accumulations = {
            name: Accumulation(trainee.module, config, runtime)
            for name, trainee in self.trainees.items()
        }

    def set_lr(self, iteration: int) -> float:
        lr = self._config.lr_at(iteration)
        for trainee in self.trainees.values():
            for group in trainee.optimizer.param_groups:
                group["lr"] = lr * trainee.spec.lr_scale
        return lr

    def step(self, update: Update | None, algorithm: Algorithm, sums: MetricSums) -> bool:
        """One optimizer step, together with all ranks; False when no rank has another one.

        A rank without an update, or with fewer micro-batches, runs idle losses: sharded and
        replicated modules need every rank in every backward pass.
        """
        own = None if update is None else (update.module, len(update.micros))
        wanted = [entry for entry in self._runtime.gather(own) if entry is not None]
        modules = {name for name, _ in wanted}
        if not modules:
            return False
        if len(modules) > 1:
            raise RuntimeError(
                f"ranks disagree on which module to update: {sorted(modules)}; "
                "Algorithm.updates must yield the same modules in the same order on every rank"
            )
        (name,) = modules
        if name not in self.trainees:
            raise ValueError(f"update of {name!r}, but modules() trains {sorted(self.trainees)}")
        counts = [count for _, count in wanted]
        if max(counts) == 0:
            sums.add_count("train/empty_updates", 1 if self._runtime.is_main else 0)
            return True
        trainee = self.trainees[name]
        with self._accumulations[name].step(sum(counts)):
            loss = self._accumulate(trainee, update, algorithm, max(counts), sums)
        self._finish(trainee, loss, sums)
        return True

    def _accumulate(
        self,
        trainee: Trainee,
        update: Update | None,
        algorithm: Algorithm,
        num_micros: int,
        sums: MetricSums,
    ) -> float:
        """Gradients of all micro-batches, summed over ranks at the end."""
        gradients = self._accumulations[trainee.name]
        micros = update.micros if update else ()
        loss_of = (update.loss if update else None) or algorithm.loss
        forward = self.forward_of(trainee.wrapped)
        total = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        for index in range(num_micros):
            is_last = index == num_micros - 1 and not gradients.owns_reduction
            with self._runtime.gradient_sync(trainee.wrapped, is_last):
                if index < len(micros):
                    loss, metrics = loss_of(micros[index], forward)
                    sums.add_reported(metrics)
                else:
                    loss = self._idle(trainee)
                if not loss.requires_grad:
                    loss = loss + self._idle(trainee)
                scale = gradients.loss_scale
                (loss if scale == 1 else loss * scale).backward()
            gradients.add(is_sample=index < len(micros))
            total += loss.detach()
        gradients.finish()
        return float(total)

    def _idle(self, trainee: Trainee) -> Tensor:
        with self._runtime.autocast():
            return trainee.spec.idle_loss(trainee.wrapped)

    def forward_of(self, wrapped: nn.Module) -> Callable[..., Any]:
        """What a loss calls as ``forward``."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._runtime.autocast():
                return wrapped(*args, **kwargs)

        return forward

    def _finish(self, trainee: Trainee, loss: float, sums: MetricSums) -> None:
        parameters = [p for group in trainee.optimizer.param_groups for p in group["params"]]
        norm = grad_norm(parameters)
        norm_value = float(norm)
        losses = self._runtime.gather(loss)
        total = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        if not (math.isfinite(total) and math.isfinite(norm_value)):
            trainee.optimizer.zero_grad(set_to_none=True)
            self._count_bad(trainee.name, total, norm_value)
            return
        self.bad_in_a_row = 0
        self._accumulations[trainee.name].report(trainee.name, norm_value, sums)
        limit = self._config.max_grad_norm
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        trainee.updates += 1
        if self._runtime.is_main:  # the same number everywhere: one rank reports it
            main = "policy" if "policy" in self.trainees else next(iter(self.trainees))
            sums.add("loss" if trainee.name == main else f"{trainee.name}/loss", total)
            sums.add(f"{trainee.name}/grad_norm", norm_value)
            sums.add_count("train/updates", 1)

    def _count_bad(self, name: str, loss: float, norm: float) -> None:
        self.bad_steps += 1
        self.bad_in_a_row += 1
        what = f"{name}: loss {loss}, gradient norm {norm}"
        if self._runtime.is_main:
            logger.warning("optimizer step skipped, not finite: %s", what)
        if self.bad_in_a_row >= self._config.max_bad_steps:
            self.gave_up = (
                f"{self.bad_in_a_row} optimizer steps in a row were not finite ({what}); "
                "lower train.lr or train.max_grad_norm, try train.precision=fp32, look at "
                "reward/* and */grad_norm in metrics.jsonl; train.max_bad_steps sets the limit"
            )
