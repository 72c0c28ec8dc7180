"""Study: TreePO on trees against independent rollouts at equal decoded tokens, Countdown.

Run: OMP_NUM_THREADS=1 python benches/studies/treepo_countdown.py [--out FOLDER] [--seeds 0 1 2]

A tiny causal model is taught Countdown with three numbers (autoregressive fine-tuning), once per
seed. From there two arms train with TreePO's advantages, loss and options; one samples trees of 16
leaves, the other 16 independent rollouts per prompt (``rollouts=flat``). They are compared at the
last evaluation before ``TOKENS`` tokens are decoded, a token that leaves share counted once; so the
trees take more optimizer steps. Held-out problems, answers drawn at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

import dlm_fast
from dlm_fast import tasks
from dlm_fast.algorithms import sft, treepo
from dlm_fast.rollout import SamplerConfig, TreeConfig
from dlm_fast.training import TrainConfig, Trainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TASK = {
    "template": "plain", "min_numbers": 3, "max_numbers": 3, "max_number": 9, "max_target": 40,
}  # fmt: skip
ROLLOUT = SamplerConfig(max_new_tokens=12, block_size=4, steps=12, temperature=1.0)
TREE = TreeConfig(leaves=16, segment=3, max_depth=4, answer="none", repetition="none")
TOKENS = 80_000
PROMPTS = 16
STEPS = {"tree": 88, "flat": 33}
"""enough for so many tokens"""
EVALUATED_EVERY = {"tree": 13, "flat": 5}
WARM_STEPS, WARM_LR, LR, EVALUATED = 300, 2e-3, 3e-4, 256


def train_config(**options: Any) -> TrainConfig:
    return TrainConfig(device="cpu", save_every=0, eval_examples=EVALUATED, **options)


def warm_start(seed: int) -> dict[str, torch.Tensor]:
    """Weights after fine-tuning on worked examples."""
    policy = dlm_fast.load("tiny", kind="causal", seed=seed)
    config = train_config(
        max_steps=WARM_STEPS, prompts_per_step=64, micro_batch=64, lr=WARM_LR, eval_every=0
    )
    task = tasks.get("countdown", **TASK)
    Trainer(policy, task, sft.Config(variant="ar"), config, rollout=ROLLOUT, seed=seed).run()
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def arm(rollouts: str, seed: int, weights: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """Evaluations up to ``TOKENS``: tokens decoded until then, optimizer steps, solved share."""
    policy = dlm_fast.load("tiny", kind="causal", seed=seed)
    policy.load_state_dict(weights)
    config = train_config(
        max_steps=STEPS[rollouts],
        prompts_per_step=PROMPTS,
        lr=LR,
        eval_every=EVALUATED_EVERY[rollouts],
    )
    algorithm = treepo.Config(tree=TREE, rollouts=rollouts)
    task = tasks.get("countdown", **TASK)
    trainer = Trainer(policy, task, algorithm, config, rollout=ROLLOUT, seed=seed)
    tokens, curve = 0.0, []
    for row in trainer.run().history:
        tokens += PROMPTS * row.get("tree/decoded_tokens", 0.0)
        if "eval/correct" in row:
            curve.append({"tokens": tokens, "step": row["step"], "solved": row["eval/correct"]})
    if tokens < TOKENS:
        raise RuntimeError(f"{rollouts}: only {tokens} tokens in {STEPS[rollouts]} steps")
    return [point for point in curve if point["tokens"] <= TOKENS]


def study(seeds: Sequence[int]) -> dict[str, Any]:
    """Both arms of every seed, from one warm start each."""
    results = []
    for seed in seeds:
        weights = warm_start(seed)
        curves = {rollouts: arm(rollouts, seed, weights) for rollouts in ("tree", "flat")}
        results.append({"seed": seed, "curves": curves, "rise": {
            name: curve[-1]["solved"] - curve[0]["solved"] for name, curve in curves.items()
        }})  # fmt: skip
        print(results[-1], flush=True)
    rises = {name: [r["rise"][name] for r in results] for name in ("tree", "flat")}
    return {
        "command": "OMP_NUM_THREADS=1 python benches/studies/treepo_countdown.py --seeds "
        + " ".join(map(str, seeds)),
        "versions": {
            "dlm_fast": dlm_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "tokens": TOKENS,
        "evaluated": EVALUATED,
        "mean_rise": {name: statistics.fmean(values) for name, values in rises.items()},
        "results": results,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Solved problems over decoded tokens, every seed."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for i, result in enumerate(found["results"]):
        for name, colour, label in (
            ("tree", "#1f6fb2", "trees of 16 leaves"),
            ("flat", "#d9731a", "16 independent rollouts"),
        ):
            points = result["curves"][name]
            x, y = [p["tokens"] / 1000 for p in points], [p["solved"] for p in points]
            axis.plot(x, y, color=colour, marker="o", ms=3, label=None if i else label)
    axis.set(
        xlabel="thousand decoded tokens",
        ylabel="solved, held-out problems",
        title="Countdown with three numbers, tiny causal model, three seeds",
    )
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent.parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = study(arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "study_treepo_countdown.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.out / "study_treepo_countdown.png")


if __name__ == "__main__":
    main()
