"""The measurements of TraceRL: rows, equal results of all layouts, the committed figures."""

import json
from pathlib import Path

import make_tables
import pytest
import torch
import trace_layouts
import trace_update

RESULTS = Path(__file__).parents[2] / "benches" / "results"
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def seconds(case):
    return case["cpu_s"]["least"] if case["threads"] == 1 else case["wall_s"]["median"]


def test_rows_of_the_published_pattern():
    made = trace_update.trajectory()
    step = made.step_map
    assert step.unique().numel() == int(step.max()) == 240
    block = (150 + torch.arange(548)) // 4
    rounds = torch.stack([block, step.long()]).unique(dim=1)[0].unique(return_counts=True)[1]
    assert int(rounds.max()) == 4 and int(rounds.sum()) == 240
    assert trace_layouts.published_rows(made, 4, 0).num_rows == 4 * (150 + 2 * 548) == 4984


@pytest.mark.parametrize("update", trace_update.UPDATES)
def test_all_layouts_give_the_same_losses_and_gradients(monkeypatch, update):
    monkeypatch.setattr(trace_update, "MODEL", SMALL)
    monkeypatch.setattr(trace_update, "PROMPT", 7)
    monkeypatch.setattr(trace_update, "RESPONSE", 20)
    monkeypatch.setattr(trace_update, "STEPS", 12)
    found = trace_update.passes(update)
    assert found["dlm_fast"].num_rows == found["packed, eager"].num_rows
    assert found["dlm_fast"].num_rows < found["published"].num_rows
    assert found["dlm_fast"].head_rows == found["published, targets"].head_rows == 20
    for wrong in trace_update.differences(found).values():
        assert wrong["loss"] < 1e-5 and wrong["gradient"] < 1e-4


def test_committed_update():
    """The figures of the page: fewer rows, the same numbers, at least 2.5 times as fast."""
    found = json.loads((RESULTS / "trace_update.json").read_text())
    assert found["pattern"] == {"prompt": 150, "response": 548, "block_size": 4, "steps": 240}
    keys = {(case["update"], case["threads"]) for case in found["cases"]}
    assert {(update, 1) for update in trace_update.UPDATES} <= keys
    for key in keys:
        cases = {
            case["provider"]: case
            for case in found["cases"]
            if (case["update"], case["threads"]) == key
        }
        ours, published = cases["dlm_fast"], cases["published"]
        assert ours["rows"] <= 1658 and ours["head_rows"] == 548
        assert published["rows"] == published["head_rows"] == 4984
        for name in ("published", "published, targets"):
            assert cases[name]["difference"]["loss"] < 1e-5
            assert cases[name]["difference"]["gradient"] < 1e-5
            assert seconds(cases[name]) > 2.5 * seconds(ours)


def test_the_page_shows_the_update(tmp_path):
    (tmp_path / "trace_update.json").write_text((RESULTS / "trace_update.json").read_text())
    page = make_tables.render(tmp_path)
    assert "## TraceRL's policy pass" in page and "| published, targets | 4984 | 548 |" in page
    assert "TraceRL" not in make_tables.render(tmp_path / "nothing")
