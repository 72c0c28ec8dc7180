"""Reasons for disagreements with other checkers, on answers made for each of them."""

import json

import pytest

from dlm_fast import tasks
from dlm_fast.cli.evaluate import EvaluateOptions
from dlm_fast.cli.evaluate_responses import score_responses
from dlm_fast.tasks.disagreement import why

CASES = [
    (r"\boxed{6,277}", "6277", True, "a thousands separator"),
    ("\\boxed{12\n</answer>", "12", True, "the box is not closed"),
    (r"<answer>boxed{4}</answer>", "4", True, "the backslash before boxed"),
    (r"\boxed{1,000} \boxed{24}", "24", True, "boxes that differ"),
    (r"\boxed{15.5}", r"\frac{31}{2}", True, "the same number, written otherwise"),
    (r"\boxed{7, 3}", "3, 7", True, "in a list whose order does not count"),
    (r"\boxed{x \text{ cm}}", "x", True, "the unit or the words around it"),
    (r"\boxed{y=x}", "x", True, "LaTeX's layout or a name in front"),
    (r"\boxed{16} no \boxed{17}", "16", False, "boxes that differ"),
    (r"\boxed{\frac{2}{3}}", "2", False, "not the first number in it"),
    (r"\boxed{blue}", "green", False, None),
]


@pytest.mark.parametrize(("text", "reference", "correct", "reason"), CASES)
def test_reasons(text, reference, correct, reason):
    example = {"question": "?", "answer": reference}
    score = tasks.get("math", symbolic="off").score(text, example)
    assert score.correct == correct
    found = why("math", text, reference, {"correct": score.correct, "detail": score.detail})
    assert (found is None) if reason is None else (reason in found)
    assert why("sudoku", text, reference, {"correct": correct, "detail": score.detail}) is None


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return EvaluateOptions(task="gsm8k", responses=str(path), task_options={"symbolic": "off"})


def test_rows_without_a_reference_are_left_out_and_counted(tmp_path):
    row = {"question": "?", "response": r"\boxed{1,800}", "correct_by_d1": False}
    rows = [row | {"answer": answer} for answer in (1800.0, None, "18")]
    summary = score_responses(write(tmp_path / "a.jsonl", rows))
    assert summary["data"].endswith("(1 more have no reference and are left out)")
    assert summary["agreement"]["rows"] == 2
    (case,) = summary["agreement"]["disagreements"]
    assert case["where"].endswith("a.jsonl, line 1")
    assert case["reason"] == "a thousands separator does not end a number"
    assert (case["found"], case["reference"]) == ("1,800", "1800")
    with pytest.raises(ValueError, match="every answer is null"):
        score_responses(write(tmp_path / "b.jsonl", rows[1:2]))
