"""Curves of one run, or of several against each other, drawn from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from dlm_fast.training.metrics import read_metrics

Rows = list[dict[str, Any]]

_BLUE, _ORANGE, _GREY = "#1f6fb2", "#d9731a", "#8a8a8a"
COLOURS = (_BLUE, _ORANGE, "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#846358", "#5c5c5c")

PANELS = (
    ("reward of the training rollouts", ("reward/mean",)),
    ("solved, held-out examples", ("eval/correct",)),
    ("gradient norm", ("*/grad_norm",)),
    ("loss", ("loss", "*/loss")),
    ("response tokens", ("rollout/length",)),
    ("tokens per network evaluation", ("rollout/tokens_per_step",)),
    ("seconds per step", ("time/rollout_s", "time/update_s")),
)
"""title and metrics of each panel; a star stands for the name of a module"""

_FLAT_LOSS = 1e-6
"""on-policy losses are 0 by construction (group advantages add up to 0): not worth a panel"""


def plot_run(run_dir: str | Path, target: str | Path | None = None) -> Path:
    """Draws ``curves.png`` of a run folder."""
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    path = Path(target) if target is not None else run_dir / "curves.png"
    return save(run_figure(rows, run_dir.resolve().name), path)


def run_figure(rows: Rows, name: str) -> Figure:
    """One panel per kind of number that the rows hold."""
    panels = [panel for panel in PANELS if _names(rows, panel[1])]
    figure, axes = _grid(len(panels))
    for axis, (title, patterns) in zip(axes, panels, strict=True):
        _draw_panel(axis, title, rows, _names(rows, patterns))
    last = int(rows[-1]["step"]) if rows else 0
    figure.suptitle(f"{name}: {last} steps", fontsize=12)
    return figure


def plot_runs(run_dirs: Sequence[str | Path], target: str | Path) -> Path:
    """Draws several runs into one picture, one colour each, named after their folders."""
    if not run_dirs:
        raise ValueError("plot_runs needs at least one run folder")
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    runs = [read_metrics(path / "metrics.jsonl") for path in paths]
    return save(comparison_figure(runs, _labels(paths)), Path(target))


def comparison_figure(runs: Sequence[Rows], labels: Sequence[str]) -> Figure:
    """One panel per kind of number, one line per run."""
    panels = [p for p in PANELS if any(_names(rows, p[1]) for rows in runs)]
    figure, axes = _grid(len(panels))
    for axis, (title, patterns) in zip(axes, panels, strict=True):
        if title == "seconds per step":
            title, patterns = "seconds per step, all phases", ("time/step_s",)
        name = next(n for rows in runs for n in _names(rows, patterns))
        for number, (rows, label) in enumerate(zip(runs, labels, strict=True)):
            steps, values = _series(rows, name)
            _line(axis, steps, values, COLOURS[number % len(COLOURS)], label)
        _finish(axis, title if len(patterns) == 1 and "*" not in patterns[0] else name, name)
    if len(axes) and len(runs) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    return figure


def _draw_panel(axis: Axes, title: str, rows: Rows, names: list[str]) -> None:
    for number, name in enumerate(names):
        steps, values = _series(rows, name)
        _line(axis, steps, values, COLOURS[number % len(COLOURS)], name)
    if names == ["eval/correct"]:
        steps, values = _series(rows, "eval/correct")
        if steps[0] == 0:
            axis.axhline(values[0], color=_GREY, linestyle="--", label="before training")
            title += f": {values[0]:.3f} before, {values[-1]:.3f} after"
            axis.legend(fontsize=8, frameon=False)
    if len(names) > 1:
        axis.legend(fontsize=8, frameon=False)
    _finish(axis, title, names[0])


def _line(axis: Axes, steps: list[float], values: list[float], colour: str, label: str) -> None:
    """Few points as dots and line; many as a faint line under its running mean."""
    if len(steps) <= 40:
        axis.plot(steps, values, color=colour, linewidth=1.5, marker="o", markersize=3, label=label)
        return
    width = max(5, len(steps) // 20)
    smooth = [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axis.plot(steps, smooth, color=colour, linewidth=1.8, label=label)


def _finish(axis: Axes, title: str, name: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(True, linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if name.endswith("grad_norm"):
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    elif name in ("eval/correct", "reward/correct"):
        axis.set_ylim(0, 1.02)
    elif name.startswith(("rollout/", "time/")):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])


def _names(rows: Rows, patterns: Sequence[str]) -> list[str]:
    """Metrics of the rows that a panel shows, in the order of its patterns."""
    present = {name for row in rows for name, value in row.items() if value is not None}
    names: list[str] = []
    for pattern in patterns:
        if pattern.startswith("*"):
            names += sorted(name for name in present if name.endswith(pattern[1:]))
        elif pattern in present:
            names.append(pattern)
    if patterns[0] == "loss":
        names = [n for n in names if max(map(abs, _series(rows, n)[1])) > _FLAT_LOSS]
    return list(dict.fromkeys(names))


def _series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _labels(paths: Sequence[Path]) -> list[str]:
    """Folder names, with their parents where names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{path.parent.name}/{path.name}" for path in paths]


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = 2 if count > 1 else 1
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(5.2 * columns, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def save(figure: Figure, path: Path) -> Path:
    # the Agg canvas draws without a display and without matplotlib's global state
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.stem}.png")
    try:
        figure.savefig(temporary, dpi=110, format="png")
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
