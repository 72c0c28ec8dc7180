"""The measurements of TraceRL: rows, equal results of all layouts, the committed figures."""

import json
from pathlib import Path

import make_tables
import pytest
import torch
import trace_attention
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


def test_committed_attention():
    """Twice as fast as dense at 4096 rows, exact, memory in proportion to the rows."""
    found = json.loads((RESULTS / "trace_attention.json").read_text())
    for pack in trace_attention.PACKS:
        cases = [case for case in found["cases"] if case["pack"] == pack]
        (four_thousand,) = [case for case in cases if round(case["rows"], -3) == 4000]
        errors = four_thousand["errors"]["ours"]
        assert errors["out"][0] < 1e-5  # absolute; gradients are sums over thousands of rows
        assert max(errors[name][1] for name in trace_attention.NUMBERS) < 1e-6
        by_key = {(t["threads"], t["work"], t["provider"]): t for t in four_thousand["times"]}
        for (threads, work, provider), times in by_key.items():
            if provider == "dense":
                assert seconds(times) > 2 * seconds(by_key[threads, work, "ours"])
    cases = [case for case in found["cases"] if case["pack"] == "one response"]
    assert [round(case["rows"], -3) for case in cases] == [1000, 2000, 4000, 8000]
    per_row = [case["extra_bytes"]["ours"] / case["rows"] for case in cases]
    assert max(per_row) < 2 * per_row[0]
    assert cases[-1]["extra_bytes"]["dense"] > 16 * cases[0]["extra_bytes"]["dense"]


def test_the_page_shows_both(tmp_path):
    for name in ("trace_update", "trace_attention"):
        (tmp_path / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text())
    page = make_tables.render(tmp_path)
    assert "## TraceRL's policy pass" in page and "| published, targets | 4984 | 548 |" in page
    assert "## Attention over packed traces" in page
    assert "TraceRL" not in make_tables.render(tmp_path / "nothing")
