"""The drawing of a tree of completions: one page of HTML that needs nothing else."""

from __future__ import annotations

import html
from typing import Any

_ROW, _WIDTH, _LABEL = 22, 900, 440
"""height of a leaf's line, width of the drawing, room for a leaf's facts; pixels"""
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1400px;padding:0 1em;color:#222}
pre{white-space:pre-wrap;background:#f5f5f5;padding:.6em;margin:.3em 0;border-radius:4px}
svg text{font:12px system-ui,sans-serif}rect:hover{stroke:#000}td,th{padding:.2em .7em;
text-align:right;border-bottom:1px solid #ddd}td:last-child,th:last-child{text-align:left}
table{border-collapse:collapse}
"""


def tree_page(data: dict[str, Any]) -> str:
    """HTML of the tree that ``tree_report.tree_data`` made. A bar is a node: as wide as its tokens,
    as high as its leaves, coloured by their mean advantage, or reward; pointing at it shows its
    text."""
    facts = (
        f"{len(data['leaves'])} leaves, {data['flat_tokens']} response tokens, "
        f"{data['unique_tokens']} of them decoded"
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>Tree of completions</title><style>{_STYLE}</style></head><body>",
        f"<h1>Tree of completions</h1><pre>{html.escape(data['prompt'])}</pre><p>{facts}</p>",
        _drawing(data),
        _table(data),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _drawing(data: dict[str, Any]) -> str:
    rows, order = _rows(data)
    end_of = {leaf["node"]: leaf for leaf in data["leaves"]}
    longest = max((leaf["tokens"] for leaf in data["leaves"]), default=1)
    scale = (_WIDTH - 2) / max(longest, 1)
    below = _leaves_below(data)
    bars = []
    for node in data["nodes"]:
        first, last = rows[node["id"]]
        x, width = node["start"] * scale, max(len(node["tokens"]) * scale - 1.5, 1)
        y, height = first * _ROW, (last - first) * _ROW - 2
        title = f"{len(node['tokens'])} tokens, {last - first} leaves\n{node['text']}"
        bars.append(
            f"<rect x='{x:.1f}' y='{y}' width='{width:.1f}' height='{height}' rx='3' "
            f"fill='{_colour(below[node['id']], data)}'><title>{html.escape(title)}</title></rect>"
        )
    for node_id in order:
        leaf = end_of[node_id]
        y = rows[node_id][0] * _ROW + _ROW - 8
        label = html.escape(f"{data['leaves'].index(leaf)}: {leaf_facts(leaf)}")
        bars.append(f"<text x='{leaf['tokens'] * scale + 6:.1f}' y='{y}'>{label}</text>")
    size = f"width='{_WIDTH + _LABEL}' height='{max(len(order), 1) * _ROW}'"
    return f"<svg {size} role='img' aria-label='tree'>{''.join(bars)}</svg>"


def _rows(data: dict[str, Any]) -> tuple[dict[int, tuple[int, int]], list[int]]:
    """Node -> its first and behind its last line; nodes of the leaves from top to bottom."""
    ends = {leaf["node"] for leaf in data["leaves"]}
    order = [node["id"] for node in data["nodes"] if node["id"] in ends]  # depth first already
    rows = {node_id: (line, line + 1) for line, node_id in enumerate(order)}
    for node in reversed(data["nodes"]):
        first, last = rows.get(node["id"], (0, 0))
        parent = node["parent"]
        above = rows.get(parent)
        rows[parent] = (
            (first, last) if above is None else (min(first, above[0]), max(last, above[1]))
        )
    return rows, order


def _leaves_below(data: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    below: dict[int, list[dict[str, Any]]] = {node["id"]: [] for node in data["nodes"]}
    below[-1] = []
    for leaf in data["leaves"]:
        below[leaf["node"]].append(leaf)
    for node in reversed(data["nodes"]):
        below[node["parent"]] += below[node["id"]]
    return below


def _colour(leaves: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """Red below zero, green above, by the largest advantage of the tree; grey without rewards."""
    if not leaves or "advantage" not in leaves[0]:
        return "#c9d4e3"
    largest = max(abs(leaf["advantage"]) for leaf in data["leaves"]) or 1.0
    mean = sum(leaf["advantage"] for leaf in leaves) / len(leaves)
    return f"hsl({130 if mean >= 0 else 5} 60% {92 - 42 * min(abs(mean) / largest, 1):.0f}%)"


def leaf_facts(leaf: dict[str, Any]) -> str:
    """How a path ended, in a few words."""
    facts = [leaf["reason"].replace("_", " "), f"{leaf['tokens']} tokens"]
    if leaf["fallback"]:
        facts.append("fallback")
    if "reward" in leaf:
        facts += [f"reward {leaf['reward']:.3g}", f"advantage {leaf['advantage']:+.3g}"]
    return ", ".join(facts)


def _table(data: dict[str, Any]) -> str:
    scored = any("reward" in leaf for leaf in data["leaves"])
    names = [
        "leaf",
        "tokens",
        "ended by",
        *(["reward", "advantage"] if scored else []),
        "completion",
    ]
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for number, leaf in enumerate(data["leaves"]):
        cells = [str(number), str(leaf["tokens"]), leaf["reason"].replace("_", " ")]
        if scored:
            cells += [f"{leaf['reward']:.3g}", f"{leaf['advantage']:+.4g}"]
        text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr>{text}<td><pre>{html.escape(leaf['completion'])}</pre></td></tr>")
    return "\n".join([*lines, "</table>"])
