"""Tasks by name: options, suggestions, documented examples."""

import doctest
import importlib

import pytest

from dlm_fast import tasks


@pytest.mark.parametrize("name", ["sudoku", "countdown", "gsm8k", "math"])
def test_tasks_keep_the_protocol(name):
    task = tasks.get(name)
    assert isinstance(task, tasks.Task)
    assert task.name == name
    assert task == tasks.make(name, tasks.config_type(name)())


def test_options_reach_the_config():
    assert tasks.get("sudoku", min_empty=3).config.min_empty == 3
    assert tasks.make("sudoku", tasks.SudokuConfig(min_empty=3)) == tasks.get("sudoku", min_empty=3)


def test_options_may_come_as_text():
    task = tasks.get(
        "sudoku",
        min_empty="3",
        solved_weight="0.5",
        template="plain",
        columns="puzzle=p, solution=s",
    )
    expected = tasks.SudokuConfig(
        min_empty=3, solved_weight=0.5, template="plain", columns={"puzzle": "p", "solution": "s"}
    )
    assert task.config == expected
    assert tasks.get("sudoku", solved_weight=1).config.solved_weight == 1.0
    assert tasks.get("sudoku", min_empty=4.0).config.min_empty == 4


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("min_empty", "many", "a whole number"),
        ("min_empty", 8.5, "a whole number"),
        ("min_empty", True, "a whole number"),
        ("min_empty", float("inf"), "a whole number"),
        ("min_empty", None, "a whole number"),
        ("cell_weight", "heavy", "a number"),
        ("cell_weight", [1], "a number"),
        ("template", "d2", "one of d1, plain"),
        ("columns", "puzzle", "a map of field to column"),
        ("columns", {"puzzle": 3}, "a map of field to column"),
        ("columns", 3, "a map of field to column"),
    ],
)
def test_options_of_a_wrong_type_are_named(option, value, what):
    with pytest.raises(ValueError, match=f"option {option} of task sudoku must be {what}"):
        tasks.get("sudoku", **{option: value})


def test_truth_values_as_text(tmp_path):
    (tmp_path / "r.py").write_text("def f(completion, example): return 1")
    name = f"{tmp_path}/r.py:f"
    assert tasks.get(name, conversational="true").config.conversational is True
    assert tasks.get(name, conversational="No").config.conversational is False
    with pytest.raises(ValueError, match="true or false"):
        tasks.get(name, conversational="perhaps")


def test_unknown_options_get_a_suggestion():
    with pytest.raises(ValueError, match="no option 'min_emtpy'; did you mean min_empty"):
        tasks.get("sudoku", min_emtpy=3)
    with pytest.raises(ValueError, match=r"no option 'zzz'; there are .*num_train"):
        tasks.get("countdown", zzz=3)


def test_unknown_tasks_get_a_suggestion():
    with pytest.raises(ValueError, match="unknown task 'sudoko'; did you mean sudoku"):
        tasks.get("sudoko")
    with pytest.raises(
        ValueError, match=r"unknown task 'chess'; there are sudoku, countdown.*\.py"
    ):
        tasks.get("chess")


def test_a_config_of_another_task_is_refused():
    with pytest.raises(TypeError, match="takes a SudokuConfig, got CountdownConfig"):
        tasks.make("sudoku", tasks.CountdownConfig())


DOCUMENTED = (
    "answer_text arithmetic sudoku sudoku_grid countdown registry "
    "math_answer math_text math_numbers math_equality math_task"
)


@pytest.mark.parametrize("name", DOCUMENTED.split())
def test_documented_examples_hold(name):
    result = doctest.testmod(importlib.import_module(f"dlm_fast.tasks.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
