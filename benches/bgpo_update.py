"""Time of BGPO's optimizer step: torch's own way, autograd's gradient of the head, and in place.

Run: OMP_NUM_THREADS=1 python benches/bgpo_update.py [--out FOLDER] [--rounds N]

    torch      ``train.head_gradient=autograd``, torch's linear layers, AdamW tensor by tensor
    autograd   the same gradient of the head, made whole for every micro-batch and added to the last
               one's; linear layers through oneDNN and AdamW's fused step
    in_place   as that, but the fused op adds the head's gradient to its sum: the default

All are measured in one process, turn by turn, on the same rollouts; rollouts themselves are not in
the time. The metrics of the first steps, from equal weights, are compared too: of torch's way and
ours with each other, and of both with a head that reads the same rounded weights and states in
float32, so that its gradient is never rounded to 16 bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dlm_fast
from dlm_fast.algorithms import bgpo
from dlm_fast.algorithms.contract import Context
from dlm_fast.models.head import Head
from dlm_fast.models.linear import Linear
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.metrics import MetricSums, Row
from dlm_fast.training.optimizer import Stepper, make_trainees
from dlm_fast.training.run_config import TrainConfig

SIZES: dict[str, dict[str, Any]] = {
    # the demonstration: one micro-batch of all rollouts and masks
    "demonstration": {
        "model": {"learned_positions": True, "max_length": 64},
        "prompts": 16, "group": 8, "prompt": 34, "window": 17, "micro_batch": 128,
        "samples": 4, "samples_per_forward": 4,
    },
    # a head of a real vocabulary over a small backbone, micro-batches of one rollout
    "wide": {
        "model": {"width": 512, "layers": 1, "heads": 8}, "vocabulary": 32000,
        "prompts": 1, "group": 2, "prompt": 32, "window": 128, "micro_batch": 1,
        "samples": 8, "samples_per_forward": 4,
    },
}  # fmt: skip
KINDS = ("torch", "autograd", "in_place")
COMPARED_STEPS = 2


def make_policy(size: dict[str, Any]) -> Any:
    policy = dlm_fast.load("tiny", **size["model"])
    if "vocabulary" in size:  # rows of norm 1, as a trained head's
        rows, width = size["vocabulary"], size["model"]["width"]
        generator = torch.Generator().manual_seed(1)
        head = torch.randn(rows, width, generator=generator) * width**-0.5
        policy.lm_head.weight = nn.Parameter(head)
        policy.backbone.embed_tokens = nn.Embedding.from_pretrained(
            torch.randn(rows, width, generator=generator), freeze=False
        )
    return policy


def make_groups(size: dict[str, Any], vocabulary: int) -> list[Group]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for g in range(size["prompts"]):
        ids = torch.randint(0, vocabulary, (size["group"], size["window"]), generator=generator)
        prompt_ids = torch.randint(0, vocabulary, (size["prompt"],), generator=generator)
        members = [
            Trajectory(
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                reward=float(torch.rand((), generator=generator)),
                group_id=g,
                member=i,
                sequence_id=g * size["group"] + i,
            )
            for i, response_ids in enumerate(ids)
        ]
        made.append(Group(task_id=g, prompt_ids=prompt_ids, trajectories=members))
    return made


def make_step(size: dict[str, Any], precision: str, kind: str) -> Callable[[int], Row]:
    """A function that takes optimizer step i on the same rollouts with new masks."""
    policy = make_policy(size)
    config = TrainConfig(
        lr=1e-4, device="cpu", precision=precision, micro_batch=size["micro_batch"],
        head_gradient="in_place" if kind == "in_place" else "autograd",
    )  # fmt: skip
    runtime = Runtime(device="cpu", precision=precision)
    window = size["window"]
    algorithm = bgpo.Config(
        num_samples=size["samples"],
        samples_per_forward=size["samples_per_forward"],
        sampler="coupled",
        group_size=size["group"],
    ).build(
        rollout=SamplerConfig(max_new_tokens=window, block_size=window, steps=window),
        num_prompts=size["prompts"],
        mask_id=policy.family.mask_id,
        seed=0,
    )
    trainees = make_trainees(algorithm.modules(policy), config, runtime)
    if kind == "exact":
        policy.lm_head.__class__ = ExactHead
    if kind in ("torch", "exact"):
        as_torch_does(policy, trainees["policy"].optimizer)
    stepper = Stepper(trainees, config, runtime)
    groups = make_groups(size, min(size.get("vocabulary", 90), len(policy.lm_head.weight)))

    def step(iteration: int) -> Row:
        context = Context(
            score=policy, global_sum=float, iteration=iteration, seed=0,
            micro_batch=size["micro_batch"],
        )  # fmt: skip
        sums = MetricSums()
        for update in algorithm.updates(algorithm.prepare(groups, context), context):
            stepper.step(update, algorithm, sums)
        return sums.reduce(None)

    return step


def as_torch_does(policy: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Without our shortcuts outside the head."""
    for module in policy.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
    for group in optimizer.param_groups:
        group["fused"] = None


class _Rounded(torch.autograd.Function):
    """A tensor with the values of a 16-bit copy; its gradient stays as wide as it is."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return weight.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class ExactHead(Head):
    """Reads what autocast rounds the weight and the states to, and computes in float32."""

    def _same_dtype(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_autocast_enabled("cpu"):
            return hidden_TD, self.weight
        dtype = torch.get_autocast_dtype("cpu")
        return hidden_TD.to(dtype).float(), _Rounded.apply(self.weight, dtype)


def largest_difference(rows: list[Row], twins: list[Row]) -> float:
    """Relative, where numbers are above 1."""
    return max(
        abs(row[name] - twin[name]) / max(1.0, abs(twin[name]))
        for row, twin in zip(rows, twins, strict=True)
        for name in row
    )


def compare(size: dict[str, Any], precision: str, rounds: int) -> dict[str, Any]:
    steps = {kind: make_step(size, precision, kind) for kind in KINDS}
    first = {kind: [step(i) for i in range(COMPARED_STEPS)] for kind, step in steps.items()}
    exact = make_step(size, precision, "exact")
    truth = [exact(i) for i in range(COMPARED_STEPS)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS[turn % len(KINDS) :] + KINDS[: turn % len(KINDS)]:
            begun = time.process_time()
            steps[kind](COMPARED_STEPS + turn)
            seconds[kind].append(time.process_time() - begun)
    medians = {kind: statistics.median(seconds[kind]) for kind in KINDS}
    return {
        "seconds": medians,
        "fastest": {kind: min(seconds[kind]) for kind in KINDS},
        "torch_over_in_place": medians["torch"] / medians["in_place"],
        "autograd_over_in_place": medians["autograd"] / medians["in_place"],
        "metrics_differ_by": largest_difference(first["in_place"], first["torch"]),
        "error": {kind: largest_difference(first[kind], truth) for kind in ("torch", "in_place")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    arguments = parser.parse_args()
    rows = []
    for name, size in SIZES.items():
        for precision in ("fp32", "bf16"):
            row = {"size": name, "precision": precision}
            rows.append(row | compare(size, precision, arguments.rounds))
            print(rows[-1])
    result = {
        "what": "process CPU seconds of one BGPO optimizer step, median",
        "sizes": SIZES,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "versions": {"dlm_fast": dlm_fast.__version__, "torch": torch.__version__},
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bgpo_update.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
