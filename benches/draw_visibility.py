"""Draws the attention patterns of docs/visibility.md with the code that trains.

Run: python benches/draw_visibility.py [--out docs/images]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dlm_fast.ops import TraceNode, Visibility, trace_pack

MASK_ID = 99
HIDDEN, CLEAN, NOISY, TARGET = range(4)
COLOURS = ListedColormap(["#f4f4f2", "#4c72b0", "#dd8452", "#c44e52"])


def step(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def segments() -> dict[str, Visibility]:
    """Two sequences of five and seven tokens under the families' own attention."""
    return {
        "full([5, 7])": Visibility.full([5, 7]),
        "causal([5, 7])": Visibility.causal([5, 7]),
        "block_causal([5, 7], 3)": Visibility.block_causal([5, 7], 3),
    }


def traces() -> dict[str, list[TraceNode]]:
    """A response behind its prompt, a group of two, and a tree that forks inside a block."""
    prompt = TraceNode(parent=-1, ids=torch.arange(3))
    first = TraceNode(parent=0, ids=torch.arange(10, 15), step=step(1, 2, 1, 3, 3))
    second = TraceNode(parent=0, ids=torch.arange(20, 23), step=step(1, 2, 3))
    trunk = TraceNode(parent=0, ids=torch.arange(10, 14), step=step(1, 2, 1, 2))
    left = TraceNode(parent=1, ids=torch.arange(30, 33), step=step(3, 4, 4))
    right = TraceNode(parent=1, ids=torch.arange(40, 44), step=step(3, 3, 4, 5))
    return {
        "a response": [prompt, first],
        "a group behind its prompt": [prompt, first, second],
        "a tree": [prompt, trunk, left, right],
    }


def draw(axes: Axes, kinds: Tensor, title: str) -> None:
    """``kinds`` [Tq, Tk]: how a row (downwards) sees a key (to the right)."""
    axes.imshow(kinds.numpy(), cmap=COLOURS, vmin=0, vmax=3, interpolation="nearest")
    rows = kinds.shape[0]
    axes.set_xticks(torch.arange(-0.5, rows).tolist(), minor=True)
    axes.set_yticks(torch.arange(-0.5, rows).tolist(), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", length=0, labelsize=7)
    axes.set_title(f"{title}: {rows} rows", fontsize=9)


def draw_segments(path: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (name, visibility) in zip(figure.subplots(1, 3), segments().items(), strict=True):
        draw(axes, visibility.dense().int() * CLEAN, name)
    figure.savefig(path, dpi=120)


def draw_traces(path: Path) -> None:
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axes, (name, nodes) in zip(figure.subplots(1, 3), traces().items(), strict=True):
        pack = trace_pack(nodes, block_size=2, mask_id=MASK_ID)
        dense = pack.visibility.dense().int()
        # an interval that begins at its own row's chunk and has no second one is a noisy key
        lo0, hi0, lo1, hi1 = pack.visibility.intervals.unbind(1)
        is_noisy = (lo1 == hi1) & (lo0 > 0) & (hi0 - lo0 <= 2)
        kinds = dense * torch.where(is_noisy, NOISY, CLEAN)
        target = pack.rows.long()
        kinds[target, target] = TARGET
        draw(axes, kinds, name)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw_segments(out / "visibility_segments.png")
    draw_traces(out / "visibility_traces.png")


if __name__ == "__main__":
    main()
