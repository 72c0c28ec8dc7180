"""The measurements of TraceRL: rows, and equal results of all layouts."""

import pytest
import torch
import trace_layouts
import trace_update

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


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
