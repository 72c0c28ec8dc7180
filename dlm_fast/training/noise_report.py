"""What measurements of gradient noise come to: numbers for JSON and tables, and their plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from dlm_fast.training.gradient_noise import Measurement
from dlm_fast.training.noise_statistics import Cell, Estimate, log_ratio, mean, slope
from dlm_fast.training.plot import COLOURS, save

BASELINE = "l_iid"
"""the sampler that others are compared with: independent samples, unbiased, bounded weights"""


def report(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Per seed and over the seeds. Noise, distance and bias are relative to the gradient's norm;
    triples are an estimate and its 95 % interval."""
    samplers = list(dict.fromkeys(c.sampler for m in measurements for c in m.cells))
    return {
        "baseline": BASELINE if BASELINE in samplers else None,
        "seeds": [_of_seed(measurement, samplers) for measurement in measurements],
        "all_seeds": {name: _of_all(measurements, name) for name in samplers},
    }


def _of_seed(measurement: Measurement, samplers: Sequence[str]) -> dict[str, Any]:
    norm = measurement.gradient_norm
    found = {}
    for name in samplers:
        cells = measurement.of(name)
        ratio = _ratio(measurement, name)
        found[name] = {
            "slope": _triple(slope(cells)),
            "ratio": list(ratio.exp()) if ratio else None,
            "cells": [_of_cell(cell, norm) for cell in cells],
        }
    return {
        "seed": measurement.seed,
        "parameters": measurement.parameters,
        "responses": measurement.responses,
        "rewards": measurement.rewards,
        "gradient_norm": norm,
        "reference_noise": measurement.reference_noise / norm,
        "samplers": found,
    }


def _of_cell(cell: Cell, norm: float) -> dict[str, Any]:
    return {
        "num_samples": cell.num_samples,
        "repetitions": cell.repetitions,
        "noise": [value / norm for value in cell.log_noise.exp()],
        "distance": cell.distance / norm,
        "bias_squared": cell.bias_squared / norm**2,
        "bias_squared_unseen": cell.unseen / norm**2,
    }


def _of_all(measurements: Sequence[Measurement], name: str) -> dict[str, Any]:
    """Geometric means over the seeds; of squares of the bias, plain ones."""
    by_n: dict[int, list[tuple[Cell, float]]] = {}
    for m in measurements:
        for cell in m.of(name):
            by_n.setdefault(cell.num_samples, []).append((cell, m.gradient_norm))
    ratios = [ratio for m in measurements if (ratio := _ratio(m, name)) is not None]
    cells = []
    for n, members in by_n.items():
        noise = mean([_relative(cell, norm) for cell, norm in members])
        cells.append(
            {
                "num_samples": n,
                "noise": list(noise.exp()),
                "bias_squared": _average(c.bias_squared / norm**2 for c, norm in members),
                "bias_squared_unseen": _average(c.unseen / norm**2 for c, norm in members),
            }
        )
    return {
        "slope": _triple(mean([slope(m.of(name)) for m in measurements])),
        "ratio": list(mean(ratios).exp()) if ratios else None,
        "cells": cells,
    }


def _relative(cell: Cell, norm: float) -> Estimate:
    noise = cell.log_noise
    return Estimate(value=noise.value - math.log(norm), error=noise.error)


def _ratio(measurement: Measurement, name: str) -> Estimate | None:
    """To the baseline; none of the baseline to itself."""
    baseline = measurement.of(BASELINE)
    return log_ratio(measurement.of(name), baseline) if name != BASELINE and baseline else None


def _triple(estimate: Estimate) -> list[float]:
    return [estimate.value, *estimate.interval]


def _average(values: Any) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def bias_text(cell: dict[str, Any]) -> str:
    """The bias, or below what it must lie to have stayed unseen."""
    squared, unseen = cell["bias_squared"], cell["bias_squared_unseen"]
    # noise alone gives squared = 0 with a deviation of about `unseen`
    if squared > 2 * unseen:
        return f"{math.sqrt(squared):.2f}"
    return f"< {math.sqrt(2 * unseen):.2f}"


def plot(found: dict[str, Any], path: str | Path) -> Path:
    """Noise over n, and beside it the noise of every sampler over that of the baseline."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    with_ratio = found["baseline"] is not None
    axes = figure.subplots(1, 2 if with_ratio else 1, squeeze=False)[0]
    _draw_noise(axes[0], found["all_seeds"])
    if with_ratio:
        _draw_ratios(axes[1], found["all_seeds"], found["baseline"])
    seeds = ", ".join(str(result["seed"]) for result in found["seeds"])
    figure.suptitle(f"noise of the BGPO gradient over its masks, seeds {seeds}", fontsize=11)
    return save(figure, Path(path))


def _draw_noise(axis: Axes, all_seeds: dict[str, Any]) -> None:
    for name, colour in zip(all_seeds, COLOURS, strict=False):
        cells = all_seeds[name]["cells"]
        n = [cell["num_samples"] for cell in cells]
        value, low, high = zip(*(cell["noise"] for cell in cells), strict=True)
        axis.plot(n, value, color=colour, marker="o", ms=3, lw=1.4, label=name)
        axis.fill_between(n, low, high, color=colour, alpha=0.12, lw=0)
    n = sorted({cell["num_samples"] for found in all_seeds.values() for cell in found["cells"]})
    top = max(cell["noise"][0] for found in all_seeds.values() for cell in found["cells"])
    guide = [1.15 * top * (k / n[0]) ** -0.5 for k in n]
    axis.plot(n, guide, color="#8a8a8a", lw=1, ls="--", label="slope -1/2")
    axis.set(xscale="log", yscale="log", title="standard deviation / norm of the gradient")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _finish(axis, n)
    axis.legend(fontsize=8, frameon=False, loc="lower left")


def _draw_ratios(axis: Axes, all_seeds: dict[str, Any], baseline: str) -> None:
    under = {cell["num_samples"]: cell["noise"] for cell in all_seeds[baseline]["cells"]}
    shift = 2 ** (1 / 40)  # error bars beside each other
    for number, (name, colour) in enumerate(zip(all_seeds, COLOURS, strict=False)):
        if name == baseline:
            axis.axhline(1, color=colour, lw=1.4)
            continue
        cells = [c for c in all_seeds[name]["cells"] if c["num_samples"] in under]
        ratios = [_quotient(c["noise"], under[c["num_samples"]]) for c in cells]
        value, low, high = zip(*ratios, strict=True)
        axis.errorbar(
            [cell["num_samples"] * shift ** (number - len(all_seeds) / 2) for cell in cells],
            value,
            yerr=(
                [v - x for v, x in zip(value, low, strict=True)],
                [x - v for v, x in zip(value, high, strict=True)],
            ),
            color=colour,
            marker="o",
            ms=3,
            lw=1.2,
            elinewidth=0.8,
        )
    axis.set(xscale="log", title=f"over that of {baseline} with as many masks")
    _finish(axis, sorted(under))


def _quotient(noise: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Of two independent noises, with the interval that theirs give."""
    spread = math.hypot(math.log(noise[2] / noise[0]), math.log(other[2] / other[0]))
    ratio = noise[0] / other[0]
    return ratio, ratio * math.exp(-spread), ratio * math.exp(spread)


def _finish(axis: Axes, n: Sequence[int]) -> None:
    axis.set_xlabel("masks per response, n")
    axis.set_xticks(n, [str(k) for k in n])
    axis.minorticks_off()
    axis.grid(True, lw=0.4, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
