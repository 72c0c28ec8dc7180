"""From a run's configuration to the run itself."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_fast import tasks
from dlm_fast.models.load import load
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.dry_run import dry_run
from dlm_fast.training.loop import RunResult, Trainer
from dlm_fast.training.run_config import RunConfig

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, policy: Any = None) -> RunResult:
    """Trains as the configuration says. ``policy`` replaces the model that it names."""
    trainer = make_trainer(config, policy=policy)
    if config.dry_run:
        report = dry_run(trainer).text()
        logger.info("%s", report)
        return RunResult(step=0, history=[], run_dir=None, closing_words=report)
    return trainer.run()


def make_trainer(config: RunConfig, *, policy: Any = None) -> Trainer:
    """The trainer of a configuration: model, task and data loaded, nothing written yet."""
    if config.run_dir is None and not config.dry_run:
        runtime = Runtime(device=config.train.device, precision=config.train.precision)
        config = replace(config, run_dir=runtime.on_main(lambda: _new_run_dir(config)))
    if policy is None:
        policy = load(config.model, lora=config.lora, **config.model_options)
    return Trainer(
        policy,
        tasks.get(config.task, **config.task_options),
        config.algorithm,
        config.train,
        rollout=config.rollout,
        data=config.data,
        eval_data=config.eval_data,
        run_dir=config.run_dir,
        seed=config.seed,
        resume=config.resume,
        run_config=config,
    )


def _new_run_dir(config: RunConfig) -> str:
    task = Path(config.task.partition(":")[0]).stem
    return str(Path("runs") / f"{config.name}-{task}-{time.strftime('%Y%m%d-%H%M%S')}")
