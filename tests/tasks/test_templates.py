"""Prompt templates: named fields, wording of the user's own, few-shot examples."""

import json
import re

import pytest

from dlm_fast import tasks
from dlm_fast.tasks.templates import Template, own_or, shot_rows, shots_text

GRID = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
SUM = {"numbers": [30, 100, 93], "target": 23}


def test_fields_are_filled_and_doubled_braces_stay():
    template = Template(r"{b} \boxed{{{a}}} {{}} {b}", "x.template")
    assert template.fields() == ["b", "a", "b"]
    assert template.fill({"a": 1, "b": "{a}"}) == r"{a} \boxed{1} {} {a}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{puzle}", "sudoku.prompt_template asks for the unknown field {puzle}; did you mean"),
        ("{solution}", "unknown field {solution}; there are puzzle"),
        (r"\boxed{} {puzzle}", "{} is not a field"),
        ("{puzzle", "not a template"),
        ("puzzle}", "not a template"),
        ("{puzzle!r}", "{puzzle!r} is not a field"),
        ("{puzzle:>20}", "{puzzle:>20} is not a field"),
        ("{puzzle.__class__}", "{puzzle.__class__} is not a field"),
        ("{0}", "{0} is not a field"),
        ("missing.txt", "cannot read missing.txt"),
    ],
)
def test_a_wrong_template_is_an_error_when_the_task_is_made(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.get("sudoku", prompt_template=text)


def test_own_wording_as_text_and_from_a_file(tmp_path):
    text = "Fill in {puzzle}.\n{{reason}} first:\n"
    file = tmp_path / "mine.txt"
    file.write_text(text + "\n", encoding="utf-8")
    for given in (text, str(file)):
        task = tasks.get("sudoku", prompt_template=given)
        assert task.prompt(GRID) == f"Fill in {GRID['puzzle']}.\n{{reason}} first:\n"
    task = tasks.get("countdown", prompt_template="{target} from {numbers}")
    assert task.prompt(SUM) == "23 from 30, 100, 93"
    assert own_or("", "{a}", "x").text == "{a}"


def test_a_field_without_a_value_is_an_error():
    with pytest.raises(ValueError, match=r"x\.template asks for the unknown field \{b\}"):
        Template("{a} {b}", "x.template").fill({"a": 1})


def test_a_users_task_has_templates_over_its_own_columns(tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def trl(prompts, completions, **columns):\n    return [float(len(p)) for p in prompts]\n"
    )
    data = tmp_path / "d.csv"
    data.write_text("q,unit,completion\n1+1,eggs,2\n2+1,days,3\n")
    template = "{q} {unit}? "
    task = tasks.get(f"{reward}:trl", prompt_template=template)
    first, second = task.load(str(data), "train")
    assert (task.prompt(first), second["prompt"]) == ("1+1 eggs? ", "2+1 days? ")
    assert task.score("x", first).reward == len("1+1 eggs? ")
    shots = tasks.get(f"{reward}:trl", prompt_template=template, shots=str(data))
    assert shots.prompt(first) == "1+1 eggs? 2\n\n2+1 days? 3\n\n1+1 eggs? "
    wrong = tasks.get(f"{reward}:trl", prompt_template="{question}")
    with pytest.raises(
        ValueError, match=r"d\.csv, line 2: .*unknown field \{question\}; there are q"
    ):
        wrong.load(str(data), "train")
    with pytest.raises(ValueError, match="is not a template"):
        tasks.get(f"{reward}:trl", prompt_template="{q")
    with pytest.raises(ValueError, match="has no demonstrations"):
        tasks.get(f"{reward}:trl", shots='[{"prompt": "1"}]')


def test_few_shot_examples_stand_before_every_prompt(tmp_path):
    file = tmp_path / "shots.jsonl"
    file.write_text(json.dumps(GRID) + "\n", encoding="utf-8")
    for shots in (str(file), json.dumps([GRID]), [GRID]):
        plain = tasks.get("sudoku", template="plain", shots=shots, demonstration_noise=0.9)
        asked = f"{GRID['puzzle']}="
        assert plain.prompt(GRID) == f"{asked}{GRID['solution']}\n\n{asked}"
    d1 = tasks.get("countdown", shots=[SUM, SUM])
    bare = tasks.get("countdown")
    shot = bare.prompt(SUM) + bare.demonstration(SUM) + "\n\n"
    assert d1.prompt(SUM) == shot + shot + bare.prompt(SUM)


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ("[1]", "sudoku.shots, item 1: expected an object, got 1"),
        ("[{]", r"sudoku.shots begins with [ but is no JSON list"),
        ("shots.xml", "suffix must be one of"),
        ('[{"puzzle": "3102200002100320"}]', "sudoku.shots, item 1: no column for 'solution'"),
    ],
)
def test_wrong_shots_are_an_error_when_the_task_is_made(shots, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.get("sudoku", shots=shots)


def test_no_shots_add_nothing():
    assert shot_rows("", "x.shots") == [] and shots_text([]) == ""


@pytest.mark.parametrize(
    ("name", "text", "example", "answer"),
    [
        ("sudoku", "<answer>3142 2431 4213 1324</answer>", GRID, GRID["solution"]),
        ("sudoku", "no digits", GRID, None),
        ("countdown", r"<answer>\boxed{(30+93) - (100)}</answer>", SUM, "30 + 93 - 100"),
        ("countdown", "<answer>-(100 - 93) + 30 = 23</answer>", SUM, "0 - (100 - 93) + 30"),
        ("countdown", "<answer>-3 + +4</answer>", SUM, "-3 + 4"),
        ("countdown", "<answer>none</answer>", SUM, None),
    ],
)
def test_the_answer_is_named_for_votes(name, text, example, answer):
    assert tasks.get(name).score(text, example).detail.get("answer") == answer
