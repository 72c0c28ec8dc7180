"""The task code: known right and wrong programs in each published form, prompts, data errors."""

import csv
import json
import threading
import time

import pytest
from code_problems import HUMANEVAL, MBPP, PROGRAMS
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import tasks
from dlm_fast.tasks import code, code_text
from dlm_fast.tasks.sandbox.isolation import SandboxError
from dlm_fast.tasks.sandbox.verdicts import working_mode


@pytest.fixture(autouse=True)
def sandbox():
    try:
        working_mode()
    except SandboxError as error:
        pytest.skip(str(error))


def fenced(program):
    return f"I would write this.\n```python\n{program}\n```\nThat is all."


def write_rows(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder, rows, **options):
    task = tasks.get("code", **options)
    return task, task.load(write_rows(folder, rows), "test")


STYLES = {"humaneval": HUMANEVAL, "mbpp": MBPP, "programs": PROGRAMS}


@pytest.mark.parametrize("style", STYLES)
def test_right_solutions_pass_and_wrong_ones_fail(style, tmp_path):
    rows = STYLES[style]
    task, examples = load(tmp_path, rows)
    assert len(examples) == 10
    right = tasks.score_batch(task, [task.demonstration(e) for e in examples], examples)
    assert [(score.reward, score.correct) for score in right] == [(1.0, True)] * 10, right
    wrong = [
        fenced(row.get("prompt", "") + row["wrong"] if style == "humaneval" else row["wrong"])
        for row in rows
    ]
    scores = tasks.score_batch(task, wrong, examples)
    assert [(score.reward, score.correct) for score in scores] == [(0.0, False)] * 10, scores
    assert not any("checker_error" in score.detail for score in scores)


def test_a_body_goes_on_with_the_prompt(tmp_path):
    task, examples = load(tmp_path, HUMANEVAL, template="plain")
    answers = []
    for row, example in zip(HUMANEVAL, examples, strict=True):
        assert task.prompt(example) == row["prompt"]
        assert task.demonstration(example) == row["canonical_solution"]
        body = row["canonical_solution"] + "\n\nprint('more text')\nand prose\n"
        answers += [body, row["wrong"]]
    answers.append(fenced(HUMANEVAL[-1]["canonical_solution"]))
    asked = [example for example in examples for _ in range(2)] + [examples[-1]]
    scores = tasks.score_batch(task, answers, asked)
    assert [score.correct for score in scores] == [True, False] * 10 + [True]


def test_functions_of_the_prompt_are_the_tests_own(tmp_path):
    """A snippet that replaces the helper must not choose what the tests compare with."""
    cheat = "def encode_shift(text): return text\ndef decode_shift(text): return text"
    row = next(row for row in HUMANEVAL if row["entry_point"] == "decode_shift")
    task, [example] = load(tmp_path, [row])
    assert not task.score(fenced(cheat), example).correct


def test_the_library_in_the_tests_is_pythons():
    example = {"question": "Root.", "tests": ["assert math.isclose(root(4), 2.0)"]}
    task = tasks.get("code")
    assert task.score(fenced("import math\nroot = math.sqrt"), example).correct
    cheat = "class math: isclose = lambda *_: True\ndef root(x): return 0.0"
    assert not task.score(fenced(cheat), example).correct
    # a function of the snippet's may have the name of a module
    example = {"question": "Queue.", "tests": ["assert queue(2) == [0, 1]"]}
    assert task.score(fenced("def queue(n): return list(range(n))"), example).correct


def test_emptying_an_argument_wins_nothing():
    example = {"question": "Sort.", "tests": ["v = [2, 1]\nassert order(v) == sorted(v)"]}
    cheat = "def order(v):\n    v.clear()\n    return []"
    assert not tasks.get("code").score(fenced(cheat), example).correct
    assert tasks.get("code").score(fenced("order = sorted"), example).correct


TWO_OF_THREE = {
    "question": "Square.",
    "tests": ["assert f(2) == 4", "assert f(3) == 9", "assert f(0) == 0"],
}


def test_the_fraction_of_tests_passed_can_be_the_reward():
    program = fenced("def f(x): return x * x if x != 3 else 0")
    score = tasks.get("code", reward="fraction").score(program, TWO_OF_THREE)
    assert (score.reward, score.correct) == (pytest.approx(2 / 3), False)
    assert tasks.get("code").score(program, TWO_OF_THREE).reward == 0
    for failure in ("while True: pass", "import os; os._exit(0)", "raise SystemExit"):
        program = fenced(f"def f(x):\n    if x == 3:\n        {failure}\n    return x * x")
        task = tasks.get("code", reward="fraction", time_limit=1)
        score = task.score(program, TWO_OF_THREE)
        assert score.reward == pytest.approx(2 / 3), failure
        assert score.detail["timed_out"] == ("while" in failure)


def test_the_fraction_counts_programs_outputs(tmp_path):
    row = PROGRAMS[0] | {"test_input": ["1 2", "1 1", "x"], "test_output": ["3", "5", "3"]}
    task, [example] = load(tmp_path, [row], reward="fraction")
    score = task.score(fenced(row["solution"]), example)
    assert score.reward == pytest.approx(1 / 3)


def test_the_rows_time_limit_counts(tmp_path):
    slow = "import time\ntime.sleep(1)\nprint(3)"
    row = PROGRAMS[0] | {"test_input": ["1 2"], "test_output": ["3"]}
    task, [short, long] = load(
        tmp_path, [row | {"test_time_limit": 0.5}, row | {"test_time_limit": 30}]
    )
    assert task.score(fenced(slow), short).detail["timed_out"]
    assert task.score(fenced(slow), long).correct


def test_all_tests_together_have_a_time_limit():
    example = {"question": "Wait.", "tests": ["wait()"] * 50}
    task = tasks.get("code", reward="fraction", time_limit=2, total_time_limit=2)
    score = task.score(fenced("import time\ndef wait(): time.sleep(0.5)"), example)
    assert 0 < score.reward < 1


@pytest.mark.parametrize(
    ("completion", "answered"),
    [
        ("no code", False),
        ("```python\n```", False),
        ("```json\n{}\n```", False),
        ("```\ndef f(x): return x * x\n```", True),
        ("```Python\ndef f(x): return x * x\n", True),
        ("````py\ndef f(x): return x * x\n````\n```\noutput\n```", True),
        ("1. So:\n   ```python title=f.py\n   def f(x):\n     return x * x\n   ```", True),
        ("```python\nwrong\n```\n```python\ndef f(x): return x * x\n```", True),
        ("```python\ndef f(x): return x * x\n```<|eot_id|>```python\nwrong\n```", True),
        ("def f(x): return x * x", False),
    ],
)
def test_where_the_program_is_found(completion, answered):
    score = tasks.get("code").score(completion, TWO_OF_THREE)
    assert score.detail["answered"] == answered
    assert score.correct == answered


def test_unfenced_programs_are_an_option():
    program = "[BEGIN]\ndef f(x): return x * x\n[DONE]\nand more"
    assert not tasks.get("code").score(program, TWO_OF_THREE).detail["answered"]
    for options in ({"unfenced": True}, {"template": "mbpp"}):
        assert tasks.get("code", **options).score(program, TWO_OF_THREE).correct


def test_equal_programs_are_equal_answers():
    task = tasks.get("code")
    answers = [
        task.score(fenced(program), TWO_OF_THREE).detail["answer"]
        for program in ("def f(x):\n    return x * x", "\ndef f(x):  \n\n    return x * x\n\n")
    ]
    assert answers[0] == answers[1]


def test_prompts(tmp_path):
    task, examples = load(tmp_path, [HUMANEVAL[0], MBPP[1]])
    completion, function = map(task.prompt, examples)
    assert f"```python\n{HUMANEVAL[0]['prompt'].rstrip()}\n```" in completion
    assert "candidate" not in completion
    assert MBPP[1]["text"] in function
    assert all(test in function for test in MBPP[1]["test_list"])
    hidden = tasks.get("code", shown_tests=1).prompt(examples[1])
    assert "is_not_prime(2)" in hidden
    assert "is_not_prime(10)" not in hidden
    task, [program] = load(tmp_path, PROGRAMS[:1])
    assert "standard input" in task.prompt(program)
    assert "1 2" not in task.prompt(program)


def test_few_shot_prompts_in_mbpps_form(tmp_path):
    shots = write_rows(tmp_path, MBPP[:2], "shots.jsonl")
    task, [example] = load(tmp_path, MBPP[2:3], template="mbpp", shots=shots)
    prompt = task.prompt(example)
    assert prompt.count("[BEGIN]\n") == 3
    assert prompt.count("[DONE]\n") == 2
    assert prompt.endswith("[BEGIN]\n")
    assert MBPP[0]["code"] in prompt
    assert task.score(MBPP[2]["code"] + "\n[DONE]\nYour task", example).correct


def test_an_own_template(tmp_path):
    task, [example] = load(
        tmp_path, PROGRAMS[:1], prompt_template="Do: {question} ({tests}{prefix})"
    )
    assert task.prompt(example) == "Do: Add. ()"
    with pytest.raises(ValueError, match=r"code.prompt_template asks for the unknown field"):
        tasks.get("code", prompt_template="{puzzle}")


def test_sets_in_csv_and_with_other_columns(tmp_path):
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "test_list"])
        writer.writerow(["Square.", json.dumps(TWO_OF_THREE["tests"])])
    task = tasks.get("code", columns="question=task")
    [example] = task.load(str(path), "train")
    assert example == TWO_OF_THREE
    pairs = {"problem": "Add.", "tests": json.dumps([{"input": "1 2", "output": "3"}])}
    task, [example] = load(tmp_path, [pairs])
    assert task.score(fenced(PROGRAMS[0]["solution"]), example).correct
    lists = {"problem": "Add.", "tests": {"inputs": ["1 2"], "outputs": [["3"]]}}
    task, [example] = load(tmp_path, [lists])
    assert task.score(fenced(PROGRAMS[0]["solution"]), example).correct


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tests": ["assert f()"]}, "no column for 'question'"),
        ({"question": "x"}, "no tests"),
        ({"question": " ", "tests": ["assert f()"]}, "the question is empty"),
        ({"question": "x", "tests": []}, "no tests"),
        ({"question": "x", "tests": ["assert f("]}, "not valid Python"),
        ({"question": "x", "tests": ["f()", {"input": 1}]}, "all be Python texts, or all objects"),
        ({"question": "x", "tests": {"inputs": [1], "outputs": []}}, "1 inputs for 0 outputs"),
        ({"question": "x", "tests": {"inputs": [1], "fn_name": "f"}}, "fn_name"),
        ({"question": "x", "test_method": "magic", "tests": ["f()"]}, "function, stdio"),
        ({"question": "x", "test_method": "stdio"}, "lists of inputs and outputs"),
        ({"question": "x", "tests": ["f()"], "test_time_limit": "soon"}, "number of seconds"),
        ({"question": "x", "tests": ["f()"], "prefix": 3}, "prefix must be a text"),
        ({"prompt": "x", "test": "def check(c): pass", "entry_point": "a b"}, "name of a function"),
    ],
)
def test_rows_that_cannot_be_used(row, message, tmp_path):
    path = write_rows(tmp_path, [TWO_OF_THREE, row])
    with pytest.raises(ValueError, match=message) as caught:
        tasks.get("code").load(path, "test")
    assert "line 2" in str(caught.value)


def test_other_errors_speak_to_people():
    task = tasks.get("code")
    with pytest.raises(ValueError, match="generates no data"):
        task.load(None, "test")
    with pytest.raises(ValueError, match="needs a column solution"):
        task.demonstration(TWO_OF_THREE)
    with pytest.raises(ValueError, match="needs the field 'tests'"):
        task.score("", {"question": "x"})
    with pytest.raises(ValueError, match="has no option"):
        tasks.get("code", timelimit=3)


@pytest.mark.parametrize(
    "options",
    [
        {"template": "d2"},
        {"reward": "some"},
        {"isolation": "prayer"},
        {"memory_mb": 0},
        {"shown_tests": -1},
        {"time_limit": 0.0},
        {"time_limit": 70.0},
        {"total_time_limit": float("nan")},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=f"code.{next(iter(options))}"):
        code.CodeConfig(**options)


def test_installed_packages_are_an_option():
    program = fenced("import numpy\ndef f(x): return numpy.int64(x) * x")
    example = TWO_OF_THREE | {"setup": "import numpy"}
    score = tasks.get("code", packages=True, time_limit=60).score(program, example)
    assert score.correct, score
    with pytest.raises(SandboxError, match="No module named 'numpy'"):
        tasks.get("code").score(fenced("def f(x): return x * x"), example)


def test_metrics():
    task = tasks.get("code", reward="fraction")
    scores = task.score_many(
        [fenced("def f(x): return x * x if x != 3 else 0"), "nothing"], [TWO_OF_THREE] * 2
    )
    means = task.metrics(scores)
    assert means == {"answered": 0.5, "passed": pytest.approx(1 / 3), "timed_out": 0.0}


def test_tests_that_no_program_could_pass_are_a_failure_of_the_checker():
    missing = {"question": "x", "tests": ["import no_such_module\nassert f(2) == 4"]}
    odd = {"question": "x", "tests": ["class A: pass\nassert f(A()) is None"]}
    for example in (missing, odd):
        [score] = tasks.score_batch(tasks.get("code"), [fenced("def f(x): return x")], [example])
        assert "the tests do not run" in score.detail["checker_error"]
    # whereas a snippet that misses a module has failed
    [score] = tasks.score_batch(tasks.get("code"), [fenced("import missing")], [TWO_OF_THREE])
    assert "checker_error" not in score.detail
    assert "missing" in score.detail["reason"]


@given(
    text=st.lists(st.sampled_from(["```", "````", "python", "py", "\n", " ", "x = 1", "[DONE]"]))
)
@settings(max_examples=300)
def test_any_text_has_a_program_or_none(text):
    for unfenced in (False, True):
        found = code_text.find_code("".join(text), unfenced=unfenced)
        assert found is None or found.strip()


@pytest.mark.parametrize("piece", ["```\n", "```python\n", "`", "```py\nx\n```\n", " \n", "[DONE]"])
def test_a_megabyte_is_read_in_one_pass(piece):
    text = piece * (1_000_000 // len(piece))
    begun = time.process_time()
    code_text.find_code(text, unfenced=True)
    assert time.process_time() - begun < 20


def test_as_many_at_a_time_as_there_are_workers(monkeypatch):
    running, most = set(), []

    def check(source, *_, **__):
        running.add(source)
        most.append(len(running))
        time.sleep(0.01)
        running.discard(source)
        return [code.Outcome(True)]

    monkeypatch.setattr(code, "check_functions", check)
    task = tasks.get("code", workers=2)
    programs = [fenced(f"x = {number}") for number in range(12)]

    def score_all():
        assert all(score.correct for score in task.score_many(programs, [TWO_OF_THREE] * 12))

    threads = [threading.Thread(target=score_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 36
    assert max(most) <= 2


def test_a_weak_isolation_is_said(caplog):
    try:
        working_mode("process")
    except SandboxError as error:
        pytest.skip(str(error))
    score = tasks.get("code", isolation="process").score(
        fenced("def f(x): return x * x"), TWO_OF_THREE
    )
    assert score.correct
    assert "the sandbox for code is weak here (process: resource limits" in caplog.text
