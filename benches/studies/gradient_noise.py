"""Study: noise of the BGPO gradient over the number of masks, for every mask sampler.

Run: python benches/studies/gradient_noise.py [--out FOLDER] [--seeds 0 1 2] [--jobs 2]
Each seed is a whole warm start of the demonstration and rollouts of four prompts at its weights:
what BGPO begins with there. Measured is what `dlm-fast bench gradient-noise` measures, with more
repetitions; the slope of -1/2, which theory gives for independent masks, checks the method.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import dlm_fast
from dlm_fast.cli.info import facts
from dlm_fast.config import to_dict
from dlm_fast.training.demonstration import DemonstrationConfig
from dlm_fast.training.gradient_noise import (
    Measurement,
    NoiseConfig,
    measure,
    rollouts,
    warm_started,
)
from dlm_fast.training.noise_report import plot, report

NOISE = NoiseConfig(samples=(1, 2, 4, 8, 16), repetitions=32, prompts=4, group_size=4)
COMPARED = ("l_iid", "coupled")
"""samplers whose slope and ratio check theory, with more repetitions: they lie close together"""
MORE_REPETITIONS = 3
"""times as many"""
WARM_START_STEPS = DemonstrationConfig().warm_start_steps


def of_seed(config: NoiseConfig, steps: int, seed: int) -> Measurement:
    """One seed, in a process of its own."""
    policy, task, rollout = warm_started(seed, steps)
    groups = rollouts(policy, task, config, rollout=rollout, seed=seed)
    compared = [name for name in config.samplers if name in COMPARED]
    others = [name for name in config.samplers if name not in COMPARED]
    parts = [
        measure(policy, groups, part, rollout=rollout, seed=seed)
        for part in (
            replace(config, samplers=compared, repetitions=MORE_REPETITIONS * config.repetitions),
            replace(config, samplers=others),
        )
    ]
    by_sampler = [cell for name in config.samplers for part in parts for cell in part.of(name)]
    return replace(parts[0], cells=by_sampler)


def study(
    seeds: Sequence[int],
    jobs: int = 1,
    config: NoiseConfig = NOISE,
    steps: int = WARM_START_STEPS,
) -> dict[str, Any]:
    """All seeds, ``jobs`` at a time, with what they ran on."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )
    with pool:
        measurements = list(pool.map(partial(of_seed, config, steps), seeds))
    machine = facts()
    return {
        "command": " ".join(["python benches/studies/gradient_noise.py --seeds", *map(str, seeds)])
        + f" --jobs {jobs}",
        "versions": {"dlm_fast": dlm_fast.__version__, **machine["versions"]},
        "machine": {**machine["machine"], "cores": os.cpu_count(), "threads": threads},
        "options": {
            **to_dict(config),
            "repetitions of " + " and ".join(COMPARED): MORE_REPETITIONS * config.repetitions,
            "warm_start_steps": steps,
        },
        **report(measurements),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    arguments = parser.parse_args()
    found = study(arguments.seeds, arguments.jobs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "study_gradient_noise.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, arguments.out / "study_gradient_noise.png")
    for name, row in found["all_seeds"].items():
        print({"sampler": name, "slope": row["slope"], "to l_iid": row["ratio"]})


if __name__ == "__main__":
    main()
