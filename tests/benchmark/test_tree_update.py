"""The bench of packed trees compares like with like, and the page shows it."""

from __future__ import annotations

import json

import make_tables
import pytest
import tree_update
from tree_update import Shape


def test_both_sides_make_one_gradient():
    policy = tree_update.make_policy()
    shape = Shape(prompt=8, segment=4, depth=6)
    group = tree_update.full_tree(shape)
    mean = float(group.rewards.mean())
    packed, unique = tree_update.pass_of(policy, [group], mean)
    separate, flat = tree_update.pass_of(policy, tree_update.separated(group), mean)
    # 2, 4, 8 and three times 16 segments, against six for each of 16 leaves
    assert (unique, flat) == (8 + 4 * (2 + 4 + 8 + 3 * 16), 16 * (8 + 6 * 4))
    (loss, ours), (other, theirs) = (
        tree_update.gradient(policy, run) for run in (packed, separate)
    )
    assert loss == pytest.approx(other, abs=1e-6)
    assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm()) > 0


def test_the_page_shows_it(tmp_path):
    seconds = {name: {"cpu_s": {"least": s}} for name, s in (("packed", 0.25), ("separate", 0.5))}
    case = {
        "shape": "prompt 8", "unique": 100, "flat": 220, "sharing": 2.2, "seconds": seconds,
        "over_proportional": 1.1, "difference": {"loss": 0.0, "gradient": 1e-6},
    }  # fmt: skip
    found = {
        "leaves": 16, "rounds": 7, "model": tree_update.MODEL, "command": "python it",
        "machine": {"processor": "P", "cores": 2, "instruction set": "avx2"},
        "versions": {"torch": "2"}, "cases": [case],
    }  # fmt: skip
    (tmp_path / "tree_update.json").write_text(json.dumps(found))
    page = make_tables.render(tmp_path)
    assert "| prompt 8 | 220 | 100 | 2.20 | 500.0 | 250.0 | 1.10 | 0.0e+00, 1.0e-06 |" in page
