"""A run without training: data read, memory estimated, the largest shape tried once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dlm_fast.rollout import sample
from dlm_fast.rollout.trajectory import Group
from dlm_fast.training.held_memory import held_for_backward
from dlm_fast.training.loop import Trainer
from dlm_fast.training.metrics import MetricSums, add_memory

_EXAMPLES_READ = 2000
"""prompts that are encoded to find the longest; reading all of a large file takes minutes"""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a dry run found; sizes in bytes, per process if nothing is sharded."""

    num_examples: int
    num_eval_examples: int
    longest_prompt: int
    """tokens"""
    rollouts: int
    """rollouts in the largest forward and backward pass"""
    tokens: int
    """tokens of each of them"""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """measured: what the backward pass of the largest micro-batch holds"""
    memory_gb: float
    """of this process after the largest shape"""
    checkpoint: int
    """bytes on disk of one checkpoint"""
    disk_free: int | None
    loss: float

    def text(self) -> str:
        total = self.weights + self.gradients + self.optimizer + self.activations
        lines = [
            "dry run: nothing was written",
            f"data         {self.num_examples} training and {self.num_eval_examples} held-out "
            f"examples, longest prompt {self.longest_prompt} tokens",
            f"largest      {self.rollouts} rollouts of {self.tokens} tokens in one pass, "
            f"loss {self.loss:.4g}",
            f"weights      {_size(self.weights)}",
            f"gradients    {_size(self.gradients)}",
            f"optimizer    {_size(self.optimizer)}",
            f"activations  {_size(self.activations)}",
            f"together     {_size(total)}; the process holds {self.memory_gb:.2f} GB",
            f"checkpoint   {_size(self.checkpoint)} each"
            + (f", {_size(self.disk_free)} free" if self.disk_free is not None else ""),
        ]
        return "\n".join(lines)


def dry_run(trainer: Trainer) -> DryRun:
    """Tries what would be largest. ValueError or the system's own error where it would fail."""
    trainer.check_folder()
    lengths = _prompt_lengths(trainer)
    longest = sorted(lengths, key=lambda i: -lengths[i])
    window = trainer.rollout.max_new_tokens
    limit = trainer.policy.family.max_length
    needed = lengths[longest[0]] + window
    if limit is not None and needed > limit:
        raise ValueError(
            f"the longest prompt has {lengths[longest[0]]} tokens; with rollout.max_new_tokens="
            f"{window} that makes {needed}, and the model takes {limit}: shorten one of them"
        )
    groups = _largest_groups(trainer, longest)
    loss, activations = _one_pass(trainer, groups)
    trained = [
        p for t in trainer.trainees.values() for g in t.optimizer.param_groups for p in g["params"]
    ]
    gradients = _bytes(trained)
    sums = MetricSums()
    add_memory(sums, trainer.runtime.device)
    row = sums.reduce(None)
    return DryRun(
        num_examples=len(trainer.examples),
        num_eval_examples=len(trainer.eval_examples),
        longest_prompt=lengths[longest[0]],
        rollouts=min(trainer.config.micro_batch, sum(len(g.trajectories) for g in groups)),
        tokens=needed,
        weights=_bytes({id(p): p for m in trainer.modules.values() for p in _tensors(m)}.values()),
        gradients=gradients,
        optimizer=2 * gradients,
        activations=activations,
        memory_gb=row.get("memory/cuda_gb", row["memory/rss_gb"]),
        checkpoint=3 * gradients,
        disk_free=_disk_free(trainer),
        loss=loss,
    )


def _prompt_lengths(trainer: Trainer) -> dict[int, int]:
    count = min(len(trainer.examples), _EXAMPLES_READ)
    return {i: int(trainer.prompts.encode(trainer.examples[i]).numel()) for i in range(count)}


def _largest_groups(trainer: Trainer, longest: list[int]) -> list[Group]:
    """Groups of the longest prompts, decoded in as few steps as the schedule allows."""
    plan = trainer.algorithm.sampling(0)
    prompts = -(-max(trainer.config.micro_batch, 1) // plan.group_size)
    prompts = min(prompts, plan.num_prompts, len(longest))
    sampler = plan.sampler or trainer.rollout
    sampler = replace(sampler, steps=sampler.num_blocks, early_stop=False)
    roll = plan.rollout or sample
    groups = []
    with trainer.whole_weights():
        for index in longest[:prompts]:
            example = trainer.examples[index]
            prompt_ids = trainer.prompts.encode(example)
            trajectories = roll(
                trainer.policy,
                [prompt_ids] * plan.group_size,
                sampler,
                seed=trainer.seed,
                sequence_ids=list(range(plan.group_size)),
                max_batch=trainer.config.rollout_batch,
            )
            for number, trajectory in enumerate(trajectories):
                # different verdicts, so that no rollout is left out of the update
                trajectory.reward, trajectory.correct = float(number % 2), bool(number % 2)
                trajectory.sequence_id = number
            groups.append(
                Group(
                    task_id=index, prompt_ids=prompt_ids, trajectories=trajectories, example=example
                )
            )
    return groups


def _one_pass(trainer: Trainer, groups: list[Group]) -> tuple[float, int]:
    """Loss of each module's first micro-batch, added up, and the most bytes that one's backward
    pass holds."""
    context = trainer.make_context()
    with trainer.whole_weights():
        samples = trainer.algorithm.prepare(groups, context)
    for module in trainer.modules.values():
        module.train()
    tensors = [t for module in trainer.modules.values() for t in _tensors(module)]
    weights = {t.untyped_storage().data_ptr() for t in tensors}
    total, most, tried = 0.0, 0, set()
    for update in trainer.algorithm.updates(samples, context):
        if update.module in tried or not update.micros:
            continue
        tried.add(update.module)
        trainee = trainer.trainees[update.module]
        loss_of = update.loss or trainer.algorithm.loss
        with held_for_backward(weights) as held:
            loss, _ = loss_of(update.micros[0], trainer.stepper.forward_of(trainee.wrapped))
        loss.backward()
        trainee.optimizer.zero_grad(set_to_none=True)
        total, most = total + loss.item(), max(most, sum(held.values()))
    return total, most


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _disk_free(trainer: Trainer) -> int | None:
    folder = trainer.run_dir
    if folder is None:
        return None
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
