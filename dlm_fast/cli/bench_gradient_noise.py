"""``dlm-fast bench gradient-noise``: noise of BGPO's gradient against masks and mask sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_fast.cli.arguments import parse, read_config
from dlm_fast.cli.chosen_model import choose_model
from dlm_fast.cli.output import table, write, write_json
from dlm_fast.config import to_dict
from dlm_fast.training.gradient_noise import NoiseConfig

if TYPE_CHECKING:
    from dlm_fast.training.gradient_noise import Measurement
    from dlm_fast.training.noise_statistics import Cell

PROG = "dlm-fast bench gradient-noise"


@dataclass(frozen=True, kw_only=True)
class GradientNoiseOptions(NoiseConfig):
    """Measures how noisy the BGPO gradient of a fixed batch is over the choice of its masks.

    For every mask sampler and number of masks per response: the standard deviation over the norm of
    the gradient, the slope over the number of masks (-1/2 where masks are independent), and the
    ratio to independent masks. Weights and rollouts stay as they are, nothing is trained on them.
    """

    model: str = "tiny"
    """tiny: the demonstration's model after a part of its warm start. Or the folder of a run: its
    model, task, data and rollout settings"""
    warm_start_steps: int = 100
    """steps of the warm start of tiny; without any, gradients say nothing"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one measurement each: of tiny's warm start, the prompts, the rollouts and the masks"""
    save: str | None = None
    """write the result to this JSON file as well"""
    plot: str | None = None
    """draw it into this PNG"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warm_start_steps < 1:
            raise ValueError(f"--warm-start-steps must be at least 1, got {self.warm_start_steps}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("--seeds must be different from each other and at least one")
        if self.plot is not None and Path(self.plot).suffix != ".png":
            raise ValueError(f"--plot must end in .png, got {self.plot}")


def run(argv: list[str]) -> int:
    options = parse(GradientNoiseOptions, argv, prog=PROG)
    measure = _tiny if options.model == "tiny" else _of_run(options)

    from dlm_fast.cli.info import facts
    from dlm_fast.training.noise_report import plot, report

    with _progress(options) as progress:
        measurements = [measure(options, seed, progress) for seed in options.seeds]
    found = report(measurements)
    write(_table(found))
    write(f"\n{_legend(options, measurements)}")
    if options.save is not None:
        data = {"options": to_dict(options), **found, "facts": facts()}
        write(f"saved to {write_json(options.save, data)}")
    if options.plot is not None:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        write(f"drawn into {plot(found, options.plot)}")
    return 0


Progress = Callable[["Cell"], None]
Measure = Callable[[GradientNoiseOptions, int, Progress], "Measurement"]


def _tiny(options: GradientNoiseOptions, seed: int, progress: Progress) -> Measurement:
    from dlm_fast.training.gradient_noise import measure_tiny

    return measure_tiny(options, options.warm_start_steps, seed=seed, progress=progress)


def _of_run(options: GradientNoiseOptions) -> Measure:
    """Measures the model of a run; the folder is checked now."""
    if not (Path(options.model) / "config.yaml").is_file():
        raise ValueError(
            f"--model must be tiny or the folder of a run, which says how to sample and score; "
            f"{options.model} has no config.yaml"
        )
    chosen, _ = choose_model([options.model], PROG)
    data = read_config(options.model).get("data")

    from dlm_fast import tasks
    from dlm_fast.models.load import load
    from dlm_fast.training.gradient_noise import measure, rollouts

    policy = load(chosen.path, **chosen.model_options)
    task = tasks.get(chosen.task or "sudoku", **chosen.task_options)

    def measured(options: GradientNoiseOptions, seed: int, progress: Progress) -> Measurement:
        rollout = chosen.rollout
        groups = rollouts(policy, task, options, rollout=rollout, seed=seed, data=data)
        return measure(policy, groups, options, rollout=rollout, seed=seed, progress=progress)

    return measured


@contextmanager
def _progress(options: GradientNoiseOptions) -> Iterator[Progress]:
    """A line on the terminal that says what is done."""
    import sys

    cells = sum(len(options.samples_of(sampler)) for sampler in options.samplers)
    total, done = cells * len(options.seeds), 0

    def show(cell: Cell) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            text = f"{done} of {total} measured: {cell.sampler}, {cell.num_samples} masks"
            sys.stderr.write(f"\r{text:<60}")
            sys.stderr.flush()

    yield show
    if done and sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 60 + "\r")


def _table(found: dict[str, Any]) -> str:
    from dlm_fast.training.noise_report import bias_text

    every = found["all_seeds"]
    samples = sorted({cell["num_samples"] for row in every.values() for cell in row["cells"]})
    rows = []
    for name, row in every.items():
        noise = {cell["num_samples"]: f"{cell['noise'][0]:.2f}" for cell in row["cells"]}
        rows.append(
            [
                name,
                *[noise.get(n, "-") for n in samples],
                _interval(row["slope"]),
                "-" if row["ratio"] is None else _interval(row["ratio"]),
                bias_text(row["cells"][-1]),
            ]
        )
    header = ("sampler", *[f"n={n}" for n in samples], "slope", "to l_iid", "bias")
    return table(header, rows)


def _interval(triple: list[float]) -> str:
    value, low, high = triple
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _legend(options: GradientNoiseOptions, measurements: list[Measurement]) -> str:
    responses = [m.responses for m in measurements]
    return (
        "noise at n masks per response: standard deviation of the batch's gradient over its norm; "
        f"seeds {', '.join(map(str, options.seeds))}, {options.repetitions} repetitions, "
        f"{', '.join(map(str, responses))} responses with an advantage. slope: of log noise over "
        "log n. to l_iid: noise over that of l_iid at the same n. bias: distance of the mean "
        "gradient from the reference at the largest n, over its norm; <: not told from noise. "
        "In brackets 95 % intervals over repetitions, too narrow where few of them missed the rare "
        "large gradients: raise --repetitions for numbers to rely on"
    )
