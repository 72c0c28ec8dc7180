"""Time of IGPO's likelihood stage: one forward per prompt against one per rollout.

Run: OMP_NUM_THREADS=1 python benches/mean_field_update.py [--out FOLDER] [--rounds N]

An iteration's old and reference log-probabilities and ``epochs`` updates (forward, loss, backward)
for one group. ``shared``: the algorithm. ``per rollout``: the same numbers from one row for each
rollout, as the released code makes them, old and reference passes repeated for every update
(``released``) or made once (``per rollout``). Rollouts and optimizer are not in the time. Losses of
the first pass are compared.
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
from torch import Tensor, nn

import dlm_fast
from dlm_fast.algorithms import igpo
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.group_ratio import agg_divisor, averaged, divergence, objective
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

SIZES: dict[str, dict[str, Any]] = {
    "short": {"vocabulary": 32000, "width": 256, "layers": 4, "prompt": 96, "window": 128},
    "published lengths": {
        "vocabulary": 32000, "width": 256, "layers": 2, "prompt": 200, "window": 256,
    },
}  # fmt: skip
GROUP, EPOCHS = 8, 4


def make_policy(size: dict[str, Any], seed: int = 0) -> Any:
    width, rows = size["width"], size["vocabulary"]
    policy = dlm_fast.load(
        "tiny", width=width, layers=size["layers"], heads=width // 64, seed=seed, max_length=512
    )
    if rows > len(policy.lm_head.weight):
        generator = torch.Generator().manual_seed(1 + seed)
        head = torch.randn(rows, width, generator=generator) * width**-0.5
        policy.lm_head.weight = nn.Parameter(head)
    return policy


def make_group(size: dict[str, Any], vocabulary: int) -> Group:
    generator = torch.Generator().manual_seed(2)
    prompt_ids = torch.randint(3, 90, (size["prompt"],), generator=generator)
    members = [
        Trajectory(
            prompt_ids=prompt_ids,
            response_ids=torch.randint(3, 90, (size["window"],), generator=generator),
            reward=float(i % 2),
        )
        for i in range(GROUP)
    ]
    return Group(task_id=0, prompt_ids=prompt_ids, trajectories=members)


class Stage:
    """The stage in its ways, on the same weights."""

    def __init__(self, size: dict[str, Any]) -> None:
        self.policy = make_policy(size)
        window = size["window"]
        self.rollout = SamplerConfig(max_new_tokens=window, block_size=32, steps=window)
        self.algorithm = igpo.Config(epochs=EPOCHS, group_size=GROUP).build(
            rollout=self.rollout, num_prompts=1, mask_id=self.policy.family.mask_id, seed=0
        )
        self.algorithm.modules(self.policy)
        # other weights, so that the divergence is not 0
        self.start = make_policy(size, seed=1)
        self.algorithm._start = self.start
        self.group = make_group(size, size["vocabulary"])

    def shared(self) -> list[float]:
        """One row for the prompt."""

        def score(*inputs: Any, **requests: Any) -> Any:
            with torch.no_grad():
                return self.policy(*inputs, **requests)

        context = Context(score=score, global_sum=float, iteration=0, seed=0)
        losses = []
        samples = self.algorithm.prepare([self.group], context)
        for update in self.algorithm.updates(samples, context):
            loss = sum(self.algorithm.loss(micro, self.policy)[0] for micro in update.micros)
            losses.append(self._backward(loss))
        return losses

    def per_rollout(self, repeated: bool) -> list[float]:
        """A row for each rollout; ``repeated``: old and reference passes for every update."""
        losses: list[float] = []
        old = reference = torch.zeros(0)
        for epoch in range(EPOCHS):
            if epoch == 0 or repeated:
                with torch.no_grad():
                    old, reference = self._logprobs(self.policy), self._logprobs(self.start)
            losses.append(self._backward(self._loss(self._logprobs(self.policy), old, reference)))
        return losses

    def _logprobs(self, model: Any) -> Tensor:
        """[G, L]"""
        window, members = self.rollout.max_new_tokens, self.group.trajectories
        masks = torch.full((window,), self.policy.family.mask_id)
        row_ids = torch.cat([self.group.prompt_ids, masks])
        lengths = [len(row_ids)] * len(members)
        visibility = Visibility.full(lengths)
        ends = torch.tensor(lengths).cumsum(0)
        rows = (ends[:, None] - window + torch.arange(window)).flatten().to(torch.int32)
        request = ScoreRequest(
            rows=self.policy.predicting_rows(rows, visibility),
            targets=torch.cat([t.response_ids for t in members]),
            forbid_ids=self.rollout.never_drawn(self.policy.family),
        )
        output = model(row_ids.repeat(len(members)), visibility, score=request)
        return output.logprob.view(len(members), window)

    def _loss(self, new: Tensor, old: Tensor, reference: Tensor) -> Tensor:
        config, keep = self.algorithm.config, torch.ones_like(new, dtype=torch.bool)
        rewards = self.group.rewards.to(new.dtype)
        gain = objective(
            new - old, rewards - rewards.mean(), keep, level=config.ratio_level,
            mask=config.ratio_mask, clip_low=config.clip_low, clip_high=config.clip_high,
        ).gain  # fmt: skip
        terms = config.kl_weight * divergence(new, reference, keep) - gain
        return averaged(terms, keep, config.loss_agg) / agg_divisor(keep, config.loss_agg)

    def _backward(self, loss: Any) -> float:
        self.policy.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())


def compare(size: dict[str, Any], rounds: int) -> dict[str, Any]:
    stage = Stage(size)
    ways: dict[str, Callable[[], list[float]]] = {
        "shared": stage.shared,
        "per rollout": lambda: stage.per_rollout(False),
        "released": lambda: stage.per_rollout(True),
    }
    first = {name: way() for name, way in ways.items()}
    gradients = {}
    for name, way in ways.items():
        way()
        gradients[name] = torch.cat(
            [p.grad.flatten() for p in stage.policy.parameters() if p.grad is not None]
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    truth = gradients["per rollout"]
    return {
        "seconds": medians,
        "per_rollout_over_shared": medians["per rollout"] / medians["shared"],
        "released_over_shared": medians["released"] / medians["shared"],
        "loss_differs_by": max(
            abs(a - b) for a, b in zip(first["shared"], first["per rollout"], strict=True)
        ),
        "gradient_differs_by": float((gradients["shared"] - truth).norm() / truth.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way")
    arguments = parser.parse_args()
    rows = []
    for name, size in SIZES.items():
        rows.append({"size": name} | size | compare(size, arguments.rounds))
        print(rows[-1])
    result = {
        "what": "process CPU seconds of the likelihood stage of one group, median",
        "group": GROUP,
        "epochs": EPOCHS,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "versions": {"dlm_fast": dlm_fast.__version__, "torch": torch.__version__},
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "mean_field_update.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
