"""The one training loop: rollouts, optimizer steps, evaluation, checkpoints, for any algorithm."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dlm_fast.algorithms.contract import Algorithm, AlgorithmConfig, Context
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.tasks import CheckerError, Score, refuse_broken_checker
from dlm_fast.training.collect import (
    Collector,
    Prompt,
    add_rollout_metrics,
    add_scoring_metrics,
    finish_rollout_metrics,
)
from dlm_fast.training.data import Examples, ExampleStream, choose_examples, load_examples
from dlm_fast.training.demonstrations import worth_imitating
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.evaluate import evaluate, evaluation_sampler
from dlm_fast.training.metrics import MetricSums, Row, add_memory
from dlm_fast.training.optimizer import Stepper, TooManyBadSteps, make_trainees
from dlm_fast.training.persistence import Persistence
from dlm_fast.training.progress import ProgressView
from dlm_fast.training.prompts import PromptEncoder
from dlm_fast.training.run_config import RunConfig, TrainConfig
from dlm_fast.training.signals import StopSignals

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class RunResult:
    """What a run leaves."""

    step: int
    """iterations done"""
    history: list[Row]
    """rows of this process's part of the run, as in metrics.jsonl"""
    run_dir: Path | None
    stopped_by: str | None = None
    """name of the signal that ended the run early"""
    best: dict[str, float] = field(default_factory=dict)
    """``step`` and ``eval/correct`` of the best evaluation"""
    closing_words: str = ""
    """where everything lies, and the command that continues"""

    @property
    def metrics(self) -> Row:
        """The last row."""
        return self.history[-1] if self.history else {}


class Trainer:
    """Trains a policy on a task by an algorithm; ``run()`` does it."""

    def __init__(
        self,
        policy: Any,
        task: Any,
        algorithm_config: AlgorithmConfig,
        train_config: TrainConfig,
        *,
        rollout: SamplerConfig | None = None,
        data: Examples = None,
        eval_data: Examples = None,
        run_dir: str | Path | None = None,
        seed: int = 0,
        resume: bool = False,
        run_config: RunConfig | None = None,
    ) -> None:
        """``data``, ``eval_data``: a file for the task to read, or examples; None: the task's own.

        ``run_dir=None`` writes nothing. ``run_config`` is what config.yaml will say; without it,
        the other arguments in that form.
        """
        self.config = train_config
        self.rollout = rollout or SamplerConfig()
        self.policy, self.task, self.seed = policy, task, seed
        self.runtime = runtime = Runtime(
            device=train_config.device, precision=train_config.precision
        )
        if train_config.prompts_per_step < runtime.world:
            raise ValueError(
                f"train.prompts_per_step={train_config.prompts_per_step} leaves some of the "
                f"{runtime.world} processes without a prompt; raise it"
            )
        limits = train_config.max_prompt_tokens, train_config.long_prompts
        self.prompts = PromptEncoder(policy, task, self.rollout.max_new_tokens, *limits)
        found = load_examples(task, data, "train", self.prompts)
        self.examples = worth_imitating(found, data, task, policy, train_config)
        self.eval_examples: Sequence[dict[str, Any]] = ()
        if train_config.eval_every:
            held_out = load_examples(task, eval_data, "test", self.prompts)
            self.eval_examples = choose_examples(held_out, train_config.eval_examples)
        self._stream = ExampleStream(len(self.examples), seed)
        self.algorithm: Algorithm = algorithm_config.build(
            rollout=self.rollout,
            num_prompts=train_config.prompts_per_step,
            mask_id=policy.family.mask_id,
            seed=seed,
        )
        policy.to(runtime.device)
        if train_config.gradient_checkpointing:
            policy.gradient_checkpointing_enable()
        self.trainees = make_trainees(self.algorithm.modules(policy), train_config, runtime)
        self.stepper = Stepper(self.trainees, train_config, runtime)
        self.modules = {"policy": policy} | {n: t.module for n, t in self.trainees.items()}
        self._resume = resume
        self._disk = Persistence(
            Path(run_dir) if run_dir is not None else None,
            run_config or _describe(self, algorithm_config, data, eval_data),
            {name: (t.module, t.optimizer) for name, t in self.trainees.items()},
            runtime,
        )
        self.step = 0
        self._best: dict[str, float] = {}
        self._history: list[Row] = []

    @property
    def run_dir(self) -> Path | None:
        return self._disk.folder.path if self._disk.folder else None

    def check_folder(self) -> None:
        """Raises what ``run`` would raise about its folder, and writes nothing."""
        if self._disk.folder is not None:
            self._disk.folder.check(self._disk.config, resume=self._resume)

    @property
    def policy_version(self) -> int:
        """Optimizer steps that the policy has taken."""
        return self.trainees["policy"].updates if "policy" in self.trainees else 0

    def run(self) -> RunResult:
        """Trains until ``max_steps``, a signal, or too many bad steps."""
        with StopSignals() as self._signals:
            self._set_state(self._disk.open(resume=self._resume))
            max_steps, shown = self.config.max_steps, self.runtime.is_main
            with ProgressView(max_steps, self.step, shown=shown) as self._view:
                try:
                    if self.step == 0 and self.eval_examples:
                        self._record_evaluated({"step": 0, **self._evaluate()})
                    signal = self._stop_requested()
                    while self.step < max_steps and signal is None:
                        signal = self._next_step()
                except CheckerError as error:
                    self._save()
                    raise CheckerError(f"{error}\n{self._disk.closing_words()}") from None
            self._save()
            self._disk.draw(at_once=True)
            self._disk.require_saved()
            if self.step >= max_steps:
                self._disk.write_model(self.policy)
        closing_words = self._disk.closing_words()
        if self.runtime.is_main:
            logger.info("%s\n%s", _ending(self.step, max_steps, signal), closing_words)
        return RunResult(
            step=self.step,
            history=self._history,
            run_dir=self.run_dir,
            stopped_by=signal if self.step < max_steps else None,
            best=self._best,
            closing_words=closing_words,
        )

    def _next_step(self) -> str | None:
        """One iteration with all that follows it; the name of the signal if one came."""
        row = self.iterate()
        if row is None:
            return self._stop_requested()
        every = self.config.eval_every
        if self.eval_examples and (self.step % every == 0 or self.step == self.config.max_steps):
            row |= self._evaluate()
        self._record_evaluated(row)
        if self.stepper.gave_up is not None:
            reason, self.stepper.gave_up = self.stepper.gave_up, None
            self.stepper.bad_in_a_row = 0
            self._save()
            raise TooManyBadSteps(f"{reason}\n{self._disk.closing_words()}")
        if self.config.save_every and self.step % self.config.save_every == 0:
            self._save()
        return self._stop_requested()

    def iterate(self) -> Row | None:
        """Rollouts, then the algorithm's optimizer steps; None if a signal came in between."""
        sums, started = MetricSums(), time.monotonic()
        position = self._stream.position
        try:
            with self.whole_weights():
                samples, context = self._collect(sums)
        except CheckerError:  # on every rank, since the counts are global
            self._stream.position = position
            self._record({"step": self.step + 1, **self._finished(sums)})
            raise
        if self._stop_requested() is not None:
            self._stream.position = position
            return None
        rolled_out = time.monotonic()
        lr = self.stepper.set_lr(self.step)
        for module in self.modules.values():
            module.train()
        updates = iter(self.algorithm.updates(samples, context))
        while self.stepper.step(next(updates, None), self.algorithm, sums):
            if self.stepper.gave_up is not None:
                break
        self.step += 1
        sums.add_reported(context.metrics)
        finished = time.monotonic()
        sums.add_max("train/lr", lr)
        sums.add_max("train/bad_steps", self.stepper.bad_steps)
        sums.add_max("train/failed_checkpoints", self._disk.failures)
        sums.add_max("time/rollout_s", rolled_out - started)
        sums.add_max("time/update_s", finished - rolled_out)
        sums.add_max("time/step_s", finished - started)
        add_memory(sums, self.runtime.device)
        return {"step": self.step, **self._finished(sums)}

    def _finished(self, sums: MetricSums) -> Row:
        return finish_rollout_metrics(sums.reduce(self.runtime))

    def _collect(self, sums: MetricSums) -> tuple[Any, Context]:
        """Samples of this rank, from its share of the prompts."""
        plan = self.algorithm.sampling(self.step)
        collector = Collector(
            self.policy,
            self.task,
            plan,
            rollout=self.rollout,
            iteration=self.step,
            seed=self.seed,
            policy_version=self.policy_version,
            max_batch=self.config.rollout_batch,
            threads=self.config.score_threads,
            encode=self.prompts.encode,
        )
        context = self.make_context()
        # every rank-th prompt: equal slices of the ranks' lists make up slices of the whole list
        taken = list(enumerate(self._stream.take(plan.num_prompts)))
        prompts = [
            Prompt(example=self.examples[task_id], task_id=task_id, index=index)
            for index, task_id in taken[self.runtime.rank :: self.runtime.world]
        ]
        groups = collector.collect(prompts)
        if plan.sampler is not None:
            add_rollout_metrics(sums, groups, collector.scores, self.task)
            add_scoring_metrics(sums, collector.scores, collector.waited_s)
            # before refine, which may go on asking for rollouts until some reward is not 0
            self._refuse_broken_checker(collector.scores)
        groups = self.algorithm.refine(groups, collector.resample)
        sums.add_count("rollout/resampled", collector.resampled)
        if collector.cache_gaps:
            sums.add_values("rollout/cache_gap", collector.cache_gaps)
        if collector.resampled:
            add_scoring_metrics(sums, collector.scores[-collector.resampled :], collector.waited_s)
        return self.algorithm.prepare(groups, context), context

    def _refuse_broken_checker(self, scores: Sequence[Score]) -> None:
        failures = self.runtime.sum(sum("checker_error" in score.detail for score in scores))
        count, limit = self.runtime.sum(len(scores)), self.config.max_checker_failures
        refuse_broken_checker(self.task, failures, count, limit, scores)

    def make_context(self) -> Context:
        """What this iteration's ``prepare`` and ``updates`` may use."""
        return Context(
            score=self._score,
            global_sum=self.runtime.sum,
            iteration=self.step,
            seed=self.seed,
            device=self.runtime.device,
            micro_batch=self.config.micro_batch,
        )

    def _score(
        self, input_ids: Any, visibility: Any = None, *, module: str = "policy", **requests: Any
    ) -> Any:
        """Forward without gradient, for ``Context``."""
        with torch.no_grad(), self.runtime.autocast():
            inputs = (input_ids,) if visibility is None else (input_ids, visibility)
            return self.modules[module](*inputs, **requests)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """For rollouts, scores and evaluations: each rank on its own, in evaluation mode."""
        for module in self.modules.values():
            module.eval()
        with self.runtime.unsharded(self.modules.values()), self.runtime.autocast():
            yield

    def _evaluate(self) -> Row:
        """Held-out examples at the rollouts' own setting."""
        started = time.monotonic()
        rollout = self.algorithm.decoding(self.step, self.rollout)
        with self.whole_weights():
            found = evaluate(
                self.policy,
                self.task,
                self.eval_examples,
                evaluation_sampler(rollout, self.config.eval_temperature),
                seed=self.seed,
                max_batch=self.config.rollout_batch,
                threads=self.config.score_threads,
                encode=self.prompts.encode,
                runtime=self.runtime,
            )
        shown = found.trajectories[: self.config.log_samples]
        self._disk.write_samples(self.step, shown, self.policy.decode)
        if found.metrics["eval/correct"] > self._best.get("eval/correct", -1.0):
            self._best = {"step": self.step, "eval/correct": found.metrics["eval/correct"]}
        return found.metrics | {"time/eval_s": time.monotonic() - started}

    def _record(self, row: Row) -> None:
        ordered = {"step": row["step"], **{name: row[name] for name in sorted(row)}}
        self._history.append(ordered)
        self._disk.record(ordered)
        self._view.show(self.step, ordered)

    def _record_evaluated(self, row: Row) -> None:
        self._record(row)
        failures, count = row.get("eval/checker_failures", 0.0), len(self.eval_examples)
        refuse_broken_checker(self.task, failures, count, self.config.max_checker_failures)

    def _stop_requested(self) -> str | None:
        """The signal that any rank has received: all stop together."""
        received = filter(None, self.runtime.gather(self._signals.received))
        return next(received, None)

    # -- state

    def _save(self) -> None:
        state = {
            "step": self.step,
            "position": self._stream.position,
            "num_examples": len(self.examples),
            "seed": self.seed,
            "updates": {name: trainee.updates for name, trainee in self.trainees.items()},
            "bad_steps": self.stepper.bad_steps,
            "bad_in_a_row": self.stepper.bad_in_a_row,
            "failed_checkpoints": self._disk.failures,
            "best": self._best,
            "algorithm": self.algorithm.state(),
        }
        self._disk.save(self.step, state, keep=self.config.keep_checkpoints)

    def _set_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        if state["num_examples"] != len(self.examples):
            raise ValueError(
                f"the run was trained on {state['num_examples']} examples, now there are "
                f"{len(self.examples)}: give it its own data"
            )
        self.step, self._stream.position = state["step"], state["position"]
        for name, trainee in self.trainees.items():
            trainee.updates = state["updates"][name]
        self.stepper.bad_steps = state["bad_steps"]
        self.stepper.bad_in_a_row = state["bad_in_a_row"]
        self._disk.failures = state["failed_checkpoints"]
        self._best = state["best"]
        self.algorithm.load_state(state["algorithm"])


def _describe(
    trainer: Trainer, algorithm: AlgorithmConfig, data: Examples, eval_data: Examples
) -> RunConfig:
    """The arguments of a ``Trainer`` in the form of config.yaml."""

    def named(source: Examples) -> str | None:
        return source if source is None or isinstance(source, str) else "(given examples)"

    return RunConfig(
        name=type(algorithm).__module__.rsplit(".", 1)[-1],
        algorithm=algorithm,
        model="(given model)",
        task=trainer.task.name,
        data=named(data),
        eval_data=named(eval_data),
        rollout=trainer.rollout,
        train=trainer.config,
        seed=trainer.seed,
    )


def _ending(step: int, max_steps: int, signal: str | None) -> str:
    if step >= max_steps:
        return f"finished {step} steps"
    return f"stopped by {signal} after {step} of {max_steps} steps"
