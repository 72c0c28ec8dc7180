"""Study: TraceRL on a tiny block model, against drawn masks at equal compute, and with values.

Run: python benches/studies/tracerl_estimators.py [--out FOLDER] [--runs FOLDER] [--seeds 0 1 2]
Each seed warms a tiny block model up on solutions of 4x4 Sudoku in which a third of the cells is
wrong. Every arm starts from it and takes the same steps as `dlm-fast train tracerl` on the same
prompts; the arms differ in the states that tokens are scored in. Two masks a response give drawn
masks as many noisy rows as the trace's two steps a block, and as many targets: each token once
(coupled) or once on average (random masking). Held-out grids, decoded as in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

import dlm_fast
from dlm_fast.algorithms import sft, tracerl
from dlm_fast.cli.info import facts
from dlm_fast.config import to_dict
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.training.metrics import read_metrics
from dlm_fast.training.run import train
from dlm_fast.training.run_config import TrainConfig, run_config_type

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLOCK = 4
TASK = {"template": "plain", "min_empty": 8, "max_empty": 12, "cell_weight": 0.5}
TASK |= {"solved_weight": 0.5}
ROLLOUT = SamplerConfig(
    max_new_tokens=17, block_size=BLOCK, steps=9, temperature=1.0, cache="block"
)
"""two tokens a step in whole blocks"""
WARM_START_STEPS, STEPS, EVALUATED_EVERY = 300, 60, 10
ARMS: dict[str, dict[str, Any]] = {
    "trace": {},
    "trace, value model": {"value": "own"},
    "coupled": {"estimator": "coupled", "num_masks": 2},
    "random masking": {"estimator": "random_masking", "num_masks": 2},
}
COLOURS = {
    "trace": "#1f6fb2",
    "trace, value model": "#5aa469",
    "coupled": "#d9731a",
    "random masking": "#8a8a8a",
}
COUNTED = ("trace/rows_per_response", "trace/targets_per_response")


def run(name: str, seed: int, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Rows of the metrics file of one training run."""
    make: Any = run_config_type(name)
    about = {"task": "sudoku", "rollout": ROLLOUT, "seed": seed, "run_dir": str(folder)}
    train(make(**about, **options))
    return read_metrics(folder / "metrics.jsonl")


def warm_start(seed: int, folder: Path, steps: int) -> Path:
    """Folder of a model that knows the form of an answer and little more."""
    run(
        "sft",
        seed,
        folder,
        algorithm=sft.Config(variant="semi_ar"),
        model="tiny",
        model_options={
            "kind": "block", "block_size": BLOCK, "seed": seed, "learned_positions": True,
            "max_length": 64,
        },
        task_options={**TASK, "demonstration_noise": 0.35},
        train=TrainConfig(
            max_steps=steps, prompts_per_step=128, micro_batch=128, lr=4e-3, betas=(0.9, 0.98),
            weight_decay=0.0, warmup_steps=20, schedule="linear", eval_every=0, save_every=0,
            device="cpu",
        ),
    )  # fmt: skip
    return folder / "model"


def arm(
    options: dict[str, Any], model: Path, seed: int, folder: Path, steps: int
) -> dict[str, Any]:
    """Curves and counts of one arm; ``seconds``: processor time of its run, evaluations too."""
    begun = time.process_time()
    rows = run(
        "tracerl",
        seed,
        folder,
        algorithm=tracerl.Config(group_size=8, **options),
        model=str(model),
        task_options=TASK,
        train=TrainConfig(
            max_steps=steps, prompts_per_step=16, micro_batch=128, lr=2e-4,
            eval_every=EVALUATED_EVERY, eval_examples=256, save_every=0, device="cpu",
        ),
    )  # fmt: skip
    evaluated = [row for row in rows if "eval/correct" in row]
    trained = [row for row in rows if COUNTED[0] in row]
    return {
        "curve": [(int(row["step"]), float(row["eval/correct"])) for row in evaluated],
        "reward": [(int(row["step"]), float(row["reward/mean"])) for row in trained],
        "counts": {name: statistics.fmean(row[name] for row in trained) for name in COUNTED},
        "updates": sum(int(row["train/updates"]) for row in trained),
        "seconds": time.process_time() - begun,
    }


def study(
    seeds: Sequence[int], runs: Path, warm_steps: int = WARM_START_STEPS, steps: int = STEPS
) -> dict[str, Any]:
    """All seeds and arms, one after the other, with what they ran on."""
    results = []
    for seed in seeds:
        model = warm_start(seed, runs / f"warm{seed}", warm_steps)
        arms = {}
        for name, options in ARMS.items():
            folder = runs / f"{name.replace(', ', '_').replace(' ', '_')}{seed}"
            arms[name] = arm(options, model, seed, folder, steps)
            print({"seed": seed, "arm": name, "curve": arms[name]["curve"]}, flush=True)
        results.append({"seed": seed, "arms": arms})
    machine = facts()
    return {
        "command": " ".join(
            ["python benches/studies/tracerl_estimators.py --seeds", *map(str, seeds)]
        ),
        "versions": {"dlm_fast": dlm_fast.__version__, **machine["versions"]},
        "machine": {**machine["machine"], "threads": torch.get_num_threads()},
        "options": {
            "task": TASK, "rollout": to_dict(ROLLOUT), "arms": ARMS, "steps": steps,
            "warm_start_steps": warm_steps,
        },
        "results": results,
        "summary": summary(results),
    }  # fmt: skip


def summary(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By arm: solved boards before and at the end, their rise, mean over the seeds and the half
    width of a 95 % interval (Student's t); and the distance of the end from the trace's, in pairs
    of a seed."""
    found = {}
    for name in results[0]["arms"]:
        curves = [result["arms"][name]["curve"] for result in results]
        trace = [result["arms"]["trace"]["curve"] for result in results]
        found[name] = {
            "start": interval([curve[0][1] for curve in curves]),
            "end": interval([curve[-1][1] for curve in curves]),
            "rise": interval([curve[-1][1] - curve[0][1] for curve in curves]),
            "mean_of_curve": interval([area(curve) for curve in curves]),
            "end_less_trace": interval(
                [c[-1][1] - t[-1][1] for c, t in zip(curves, trace, strict=True)]
            ),
            "mean_of_curve_less_trace": interval(
                [area(c) - area(t) for c, t in zip(curves, trace, strict=True)]
            ),
        }
    return found


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Mean of the evaluations after the start: how early and how far it rises."""
    return statistics.fmean(value for _, value in curve[1:])


STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""97.5 % quantiles by degrees of freedom"""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval; 0 where there is one value."""
    if len(values) < 2:
        return values[0], 0.0
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), STUDENT[len(values) - 1] * spread


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Solved boards over the steps: every seed thin, the mean and its interval."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name in results[0]["arms"]:
        curves = [result["arms"][name]["curve"] for result in results]
        steps = [step for step, _ in curves[0]]
        for curve in curves:
            axis.plot(steps, [v for _, v in curve], color=COLOURS[name], lw=0.6, alpha=0.5)
        of_step = [interval([curve[i][1] for curve in curves]) for i in range(len(steps))]
        means = [mean for mean, _ in of_step]
        axis.plot(steps, means, color=COLOURS[name], lw=2, marker="o", ms=3, label=name)
        axis.fill_between(
            steps,
            [mean - half for mean, half in of_step],
            [mean + half for mean, half in of_step],
            color=COLOURS[name],
            alpha=0.12,
            lw=0,
        )
    axis.set(
        xlabel="optimizer steps of the policy",
        ylabel="solved boards, held-out grids",
        ylim=(0, 1),
        title=f"4x4 Sudoku, tiny block model, {len(results)} seeds, 95 % intervals",
    )
    axis.legend(frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    parser.add_argument("--runs", type=Path, help="where the runs go; default: a temporary folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="tracerl_estimators_"))
    found = study(arguments.seeds, runs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "study_tracerl_estimators.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found["results"], arguments.out / "study_tracerl_estimators.png")
    for name, row in found["summary"].items():
        print({"arm": name, **row})


if __name__ == "__main__":
    main()
