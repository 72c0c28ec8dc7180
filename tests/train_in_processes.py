"""Training runs as a script, for tests that launch processes."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fake_training import ROLLOUT, Config, DigitsTask, tiny_policy

from dlm_fast.algorithms import bgpo, tracerl, treepo
from dlm_fast.rollout import TreeConfig
from dlm_fast.training import TrainConfig, Trainer, checkpoint

SMALL = TrainConfig(
    max_steps=3, prompts_per_step=5, micro_batch=2, lr=3e-3, eval_every=2, eval_examples=5,
    save_every=2, rollout_batch=4, device="cpu",
)  # fmt: skip


class SlowTask(DigitsTask):
    """A task that takes its time, for tests that send signals."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def metrics(self, scores: Any) -> dict[str, float]:
        time.sleep(self.seconds)
        return super().metrics(scores)


def fake(run_dir: str, changes: dict[str, Any]) -> Trainer:
    """An algorithm with two modules whose ranks have unequal numbers of micro-batches."""
    changes = dict(changes)
    resume, slow = changes.pop("resume", False), changes.pop("slow_score", 0.0)
    return Trainer(
        tiny_policy(),
        SlowTask(slow),
        Config(),
        replace(SMALL, **changes),
        rollout=ROLLOUT,
        run_dir=run_dir,
        seed=3,
        resume=resume,
    )


def ending_policy() -> Any:
    """A model that ends its text at about every second position: some rollouts stop early."""
    policy = tiny_policy()
    with torch.no_grad():
        policy.lm_head.weight *= 0.1
        policy.lm_head.weight[policy.family.eos_ids[0]] *= 80
    return policy


def real(run_dir: str, changes: dict[str, Any]) -> Trainer:
    """BGPO with two updates an iteration; prompts differ in length."""
    changes = dict(changes)
    bound, early = changes.pop("bound", "both"), changes.pop("early", False)
    lora = changes.pop("lora", None)
    algorithm = bgpo.Config(num_samples=2, group_size=4, mini_batch=8, bound=bound)
    return Trainer(
        ending_policy() if early else tiny_policy(lora=lora),
        DigitsTask(),
        replace(algorithm, scored_tokens="response") if early else algorithm,
        replace(SMALL, prompts_per_step=4, **changes),
        rollout=replace(ROLLOUT, block_size=2, steps=8) if early else ROLLOUT,
        run_dir=run_dir,
        seed=3,
    )


def trace(run_dir: str, changes: dict[str, Any]) -> Trainer:
    """TraceRL on a block model, two updates an iteration, a value model."""
    changes = dict(changes)
    options = {
        name: changes.pop(name) for name in ("value", "shrink", "old_logprob") if name in changes
    }
    return Trainer(
        tiny_policy(kind="block", block_size=2),
        DigitsTask(),
        tracerl.Config(group_size=4, mini_batch=8, rows_per_forward=64, **options),
        replace(SMALL, prompts_per_step=4, **changes),
        rollout=replace(ROLLOUT, block_size=2, steps=6),
        run_dir=run_dir,
        seed=3,
    )


def trees(run_dir: str, changes: dict[str, Any]) -> Trainer:
    """TreePO on a causal model, two updates an iteration, trees cut into several passes."""
    tree = TreeConfig(leaves=4, segment=4, max_depth=2, answer="none")
    return Trainer(
        tiny_policy(kind="causal"),
        DigitsTask(),
        treepo.Config(
            tree=tree, mini_batch=8, rows_per_forward=24, reject="reward", max_gen_batches=2
        ),
        replace(SMALL, prompts_per_step=4, **changes),
        rollout=ROLLOUT,
        run_dir=run_dir,
        seed=3,
    )


def slow_down_writes(seconds: float) -> None:
    """Files of checkpoints appear, then take their time."""
    write = checkpoint.write_durably

    def slow(path: Path, data: bytes) -> str:
        digest = write(path, data)
        if ".writing-step" in str(path):
            time.sleep(seconds)
        return digest

    checkpoint.write_durably = slow


KINDS = {"fake": fake, "bgpo": real, "tracerl": trace, "treepo": trees}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        slow_down_writes(float(sys.argv[2]))
    for kind, run_dir, changes in json.loads(sys.argv[1]):
        trainer = KINDS[kind](run_dir, changes)
        forwards: list[None] = []
        trainer.policy.register_forward_hook(lambda *_, seen=forwards: seen.append(None))
        result = trainer.run()
        runtime = trainer.runtime
        report = {
            "world": runtime.world,
            "sharded": runtime.is_sharded,
            "history": result.history,
            "forwards": len(forwards),
            "local_elements": sum(_local(p).numel() for p in trainer.policy.parameters()),
            "elements": sum(p.numel() for p in trainer.policy.parameters()),
        }
        Path(f"{run_dir}-rank{runtime.rank}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        # all is written: gloo's threads now and then abort an interpreter that winds itself down
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


if __name__ == "__main__":
    main()
