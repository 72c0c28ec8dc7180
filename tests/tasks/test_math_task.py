"""The tasks gsm8k and math: data, prompts, rewards, hostile answers."""

import json
import logging
import sys
import threading
from pathlib import Path

import pytest

from dlm_fast import tasks
from dlm_fast.tasks import math_equality, math_rewards, math_task
from dlm_fast.tasks.worker_pool import WorkerPool

EXAMPLE = {"question": "What is 9 + 9?", "answer": "18"}
FULL = "<reasoning>\n9 + 9\n</reasoning>\n<answer>\n\\boxed{18}\n</answer>"


def get(name="math", **options):
    return tasks.get(name, symbolic="off", **options)


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_zero_one_rewards(name):
    task = get(name)
    right, wrong, silent = task.score_many([FULL, "\\boxed{17}", "no answer here"], [EXAMPLE] * 3)
    assert (right.reward, right.correct) == (1.0, True)
    assert (wrong.reward, wrong.correct) == (0.0, False)
    assert (silent.reward, silent.correct) == (0.0, False)
    assert right.detail["answer"] == "18"
    assert right.detail["mark"] == "boxed"
    assert "answer" not in silent.detail
    assert task.score(FULL, EXAMPLE) == right
    means = task.metrics([right, wrong, silent])
    assert means == {"answered": 2 / 3, "boxed": 2 / 3, "limits": 0.0}


def test_equal_answers_have_one_text():
    task = get()
    texts = ["18", "18.0", r"\$18", "18 eggs", r"\frac{36}{2}", r"18\%"]
    answers = {task.score(f"\\boxed{{{text}}}", EXAMPLE).detail["answer"] for text in texts}
    assert answers == {"18"}
    for text in ("2, 1", "1, 2", r"\{2, 1\}"):
        assert task.score(f"\\boxed{{{text}}}", EXAMPLE).detail["answer"] == "1,2"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (FULL, [2.0, 0.5, 0.5, 0.5, 0.5]),
        (FULL + "\n", [2.0, 0.5, 0.5, 0.5, 0.5]),
        (FULL + "abcde", [2.0, 0.5, 0.0, 0.5, 0.495]),
        (FULL.replace("18", "17.5"), [0.0, 0.0, 0.5, 0.5, 0.5]),
        ("<reasoning>a</reasoning> <answer>18</answer>", [2.0, 0.5, 0.0, 0.5, 0.0]),
        ("so " + FULL, [2.0, 0.5, 0.0, 0.0, 0.5]),
        ("\\boxed{18}", [2.0, 0.5, 0.0, 0.0, 0.0]),
        ("\\boxed{18} eggs</answer>", [2.0, 0.5, 0.0, 0.0, 0.0]),
        ("", [0.0, 0.0, 0.0, 0.0, 0.0]),
        ("</reasoning>\n<answer>\n", [0.0, 0.0, 0.0, 0.0, 0.125]),
        ("x\n</answer>" + "y" * 2000, [0.0] * 5),
    ],
)
def test_shaped_rewards_of_gsm8k(text, parts):
    score = get("gsm8k", reward="d1").score(text, EXAMPLE)
    assert list(score.detail["parts"].values()) == pytest.approx(parts)
    assert score.reward == pytest.approx(sum(parts))
    assert score.correct == (parts[0] > 0)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (FULL, 3.0),
        ("<answer>18</answer>", 2.75),
        ("\\boxed{18}", 2.5),
        ("#### 18", 2.25),
        ("<answer>\\boxed{17}</answer>", 1.0),
        ("<answer>17</answer>", 0.75),
        ("\\boxed{17}", 0.5),
        ("17", 0.25),
        ("</answer><answer>\\boxed{17}", 0.5),
    ],
)
def test_shaped_rewards_of_math(text, reward):
    assert get("math", reward="d1").score(text, EXAMPLE).reward == reward


def test_a_box_is_really_looked_for():
    r"""The published test compares with a backspace and "oxed", which no answer holds."""
    with_box, without = (math_rewards.math(text, "1", False) for text in (r"\boxed{1}", "1"))
    assert with_box.reward - without.reward == 0.25


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_gsm8k_as_published(tmp_path):
    row = {"question": "Eggs?", "answer": "9 + 9 = <<9+9=18>>18 eggs.\n#### 1,800"}
    (example,) = get("gsm8k").load(write(tmp_path / "a.jsonl", [row]), "train")
    trace = "9 + 9 = <<9+9=18>>18 eggs."
    assert example == {"question": "Eggs?", "answer": "1,800", "trace": trace}
    shown = get("gsm8k").demonstration(example)
    assert shown == (f"<reasoning>\n{trace}\n</reasoning>\n<answer>\n\\boxed{{1,800}}\n</answer>")
    assert get("gsm8k").score(shown, example).correct


def test_math_as_published(tmp_path):
    solution = r"As $x=\frac{1}{2}$, it is $\boxed{\frac{1}{2}}$."
    rows = [
        {"problem": "x?", "solution": solution, "level": "Level 1", "type": "Algebra"},
        {"problem": "x?", "solution": solution, "answer": r"\frac12"},
        {"Question": "x?", "Answer": 0.5, "trace": "halve it"},
    ]
    first, second, third = get("math").load(write(tmp_path / "a.jsonl", rows), "test")
    assert first == {"question": "x?", "answer": r"\frac{1}{2}", "trace": solution}
    assert second == {"question": "x?", "answer": r"\frac12", "trace": solution}
    assert third == {"question": "x?", "answer": "0.5", "trace": "halve it"}
    for example in (first, second, third):
        assert get("math").score(r"\boxed{1/2}", example).correct
        assert get("math").score(get("math").demonstration(example), example).correct


def test_columns_may_be_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,a,why\nWhat?,7,because\n", encoding="utf-8")
    task = get("math", columns={"question": "q", "answer": "a", "trace": "why"})
    assert task.load(str(path), "test") == [
        {"question": "What?", "answer": "7", "trace": "because"}
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "18"}, None),
        ({"question": "a", "answer": 18}, None),
        ({"question": "a"}, "no column for 'answer'"),
        ({"answer": "1"}, "no column for 'question'"),
        ({"question": " ", "answer": "1"}, "question must be a text"),
        ({"question": 3, "answer": "1"}, "question must be a text"),
        ({"question": "a", "answer": None}, "answer must be a text or a number"),
        ({"question": "a", "answer": True}, "answer must be a text or a number"),
        ({"question": "a", "answer": " "}, "answer must have 1 to"),
        ({"question": "a", "answer": "x" * 1001}, "answer must have 1 to"),
        ({"question": "a", "answer": "because ####"}, "answer must have 1 to"),
        ({"question": "a", "answer": float("inf")}, "answer must be finite"),
        ({"question": "a", "answer": "many"}, "a gsm8k answer must be a number"),
    ],
)
def test_unusable_rows_are_named_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [EXAMPLE, row])
    task = get("gsm8k")
    if message is None:
        assert task.load(path, "test")[1]["answer"] == "18"
        return
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}"):
        task.load(path, "test")


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="generates no data"):
        get("math").load(None, "train")
    with pytest.raises(ValueError, match="split"):
        get("math").load("a.jsonl", "dev")
    with pytest.raises(ValueError, match="needs the field 'question'"):
        get("math").prompt({"answer": "1"})
    with pytest.raises(ValueError, match="answer must be a text, got 18"):
        get("gsm8k").score("18", {"question": "a", "answer": 18})
    with pytest.raises(ValueError, match="needs a column trace or solution"):
        get("math").demonstration(EXAMPLE)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"template": "d2"}, "template"),
        ({"reward": "shaped"}, "reward"),
        ({"symbolic": "maybe"}, "symbolic"),
        ({"seconds": 0}, "math.seconds"),
        ({"seconds": float("inf")}, "math.seconds"),
        ({"workers": -1}, "math.workers"),
        ({"boxed": False, "answer_tags": False, "hashes": False}, "turn one on"),
        ({"prompt_template": "{puzzle}"}, "unknown field {puzzle}"),
        ({"shots": '[{"question": "a"}]'}, "shots, item 1: no column for 'answer'"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        tasks.get("math", **options)


def test_prompts_ask_for_what_is_scored():
    prompt = get("math").prompt(EXAMPLE)
    for part in (EXAMPLE["question"], "<reasoning>", "<answer>", "</answer>", "\\boxed{"):
        assert part in prompt
    assert "{{" not in prompt
    assert get("math", template="plain").prompt(EXAMPLE) == "What is 9 + 9?\n"
    assert get("math", prompt_template="Q: {question}\nA:").prompt(EXAMPLE) == (
        "Q: What is 9 + 9?\nA:"
    )


def test_few_shot_examples_stand_before_the_prompt():
    shots = [EXAMPLE | {"trace": "9 + 9 = 18"}, {"question": "1 + 1?", "answer": "2"}]
    prompt = get("gsm8k", shots=shots, prompt_template="{question} ").prompt(EXAMPLE)
    first, second, last = prompt.split("\n\n")
    assert first.startswith("What is 9 + 9? <reasoning>\n9 + 9 = 18\n")
    assert second == "1 + 1? \\boxed{2}"
    assert last == "What is 9 + 9? "


def test_a_missing_extra_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    monkeypatch.setattr(math_task, "math_verify_is_installed", lambda: False)
    math_equality.say_that_math_verify_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("math", "gsm8k", "math"):
            task = tasks.get(name)
            assert task.score(r"\boxed{36/2}", EXAMPLE).correct
            assert not task.score(r"\boxed{2 \cdot 3^2}", EXAMPLE).correct
    (record,) = caplog.records
    assert "dlm_fast[math]" in record.getMessage()
    with pytest.raises(ValueError, match="pip install"):
        tasks.get("math", symbolic="on")


@pytest.fixture(scope="module")
def live_task():
    pytest.importorskip("math_verify", reason="needs the extra math")
    task = tasks.get("math", symbolic="on", seconds=1.0, workers=2)
    yield task
    task.close()


def test_expressions_are_compared_in_a_batch(live_task):
    texts = [r"2 \cdot 3^2", r"\frac{54}{\sqrt{9}}", r"3 \cdot 5", "x", "18", r"2 \cdot 3^2"]
    scores = live_task.score_many([f"\\boxed{{{text}}}" for text in texts], [EXAMPLE] * 6)
    assert [score.correct for score in scores] == [True, True, False, False, True, True]


# Each of these keeps math-verify, its parser or sympy busy or hungry far beyond any limit.
ENDLESS = {
    "power of a sum": r"(x+1)^{100000}",
    "sum": r"\sum_{n=1}^{\infty} \frac{\sin(n^2)}{n^3+n}",
    "power of a power": r"2^{10^{10}}",
}


def test_hanging_expressions_are_ended_and_harm_no_other(live_task):
    texts = [r"2 \cdot 3^2", *ENDLESS.values(), r"3^2 \cdot 2"]
    scores = live_task.score_many([f"\\boxed{{{t}}}" for t in texts], [EXAMPLE] * len(texts))
    assert [score.correct for score in scores] == [True, *[False] * len(ENDLESS), True]
    for score in scores[1:-1]:
        assert score.detail["by"] in math_task.LIMITS
        assert score.detail["limits"]
    assert live_task.metrics(scores)["limits"] == len(ENDLESS) / len(scores)
    assert len(live_task._equality.pool.processes()) <= 2


@pytest.mark.parametrize(
    "text",
    [
        r"9^{9^{9^9}}",
        "9**9**9**9",
        r"10^{10000000}",
        r"x^{-123456789}",
        "100000000!",
        "((9!)!)!",
        "(" * 25 + "x" + ")" * 25,
        "x^2" * 25,
        "9" * 41,
    ],
)
def test_expressions_beyond_all_bounds_cost_nothing(live_task, text):
    score = live_task.score(f"\\boxed{{{text}}}", {"question": "?", "answer": "y^2"})
    assert (score.correct, score.detail["by"]) == (False, "refused")
    # Written like the reference they are right all the same.
    assert live_task.score(f"\\boxed{{{text}}}", {"question": "?", "answer": text}).correct


def test_hungry_expressions_harm_no_other():
    pytest.importorskip("math_verify", reason="needs the extra math")
    path = Path(math_equality.__file__).with_name("math_worker.py")
    pool = WorkerPool(path, "same", workers=1, seconds=1, memory=400 << 20)
    try:
        for text in (r"2^{2^{36}}", r"\lfloor 10^{2000000000}/3 \rfloor"):
            assert pool.call(text, "y^2").value is not True
            assert pool.call("y y", "y^2").value is True
    finally:
        pool.close()


MB = 1_000_000
HOSTILE = {
    "python tower": "9**9**9**9",
    "negated power tower": "-" * 20 + "9^{9}" * 20,
    "parentheses": "(" * 12 + "x" + ")" * 12,
    "many parentheses": "(" * 400 + "x" + ")" * 400,
    "fractions": r"\frac{1}{" * 12 + "x" + "}" * 12,
    "many fractions": r"\frac{1}{" * 90 + "x" + "}" * 90,
    "open braces": "{" * 900,
    "closed braces": "}{" * 400,
    "roots": r"\sqrt{" * 20 + "x" + "}" * 20,
    "bars": "|" * 300 + "x" + "|" * 300,
    "signs": "-" * 900 + "1",
    "sums": "+".join("x" * 300),
    "equations": "=".join("x" * 300),
    "dollars": "$" * 900,
    "texts": r"\text{" * 100,
    "lefts": r"\left(" * 100,
    "nul": "\x00" * 100,
    "surrogates": "\ud800\udfff\udc00",
    "digits": "9" * 900,
    "exponent": "1e99999999",
    "import": "__import__('os').system('exit 1')",
    "attribute": "().__class__.__bases__",
    "lambda": "(lambda: 18)()",
    "escape": "\\" * 500,
    "shotgun": ", ".join(map(str, range(100))),
    "shotgun in words": " or ".join(map(str, range(15, 20))),
    "set of all": r"\mathbb{R}",
    "interval": r"(-\infty, \infty)",
    "tautology": "x = x",
    "reference": r"\text{answer} = \text{answer}",
    "megabyte": "1" * MB,
    "megabyte of boxes": r"\boxed{" * (MB // 7),
    "megabyte of spaces": " " * MB + "18" + "x" * 2000,
    "megabyte of tags": "</answer><answer>" * (MB // 17),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_answers_score_zero(live_task, text):
    for example in (EXAMPLE, {"question": "?", "answer": r"\frac{x}{2}"}):
        for completion in (f"\\boxed{{{text}}}", f"<answer>{text}</answer>", f"#### {text}", text):
            score = live_task.score(completion, example)
            assert (score.reward, score.correct) == (0.0, False)
            json.dumps(score.detail)
    assert live_task.score(r"\boxed{2 \cdot 3^2}", EXAMPLE).correct


def test_threads_share_a_task(live_task):
    results = {}

    def work(number):
        example = {"question": "?", "answer": str(number**2)}
        completions = [rf"\boxed{{{number} \cdot {n}}}" for n in range(12)]
        results[number] = [s.correct for s in live_task.score_many(completions, [example] * 12)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(1, 9):
        assert results[number] == [n == number for n in range(12)]


def test_a_broken_worker_is_counted_and_stops_a_run(monkeypatch, tmp_path):
    pytest.importorskip("math_verify", reason="needs the extra math")
    task = tasks.get("math", workers=1)
    command = task._equality.pool._command
    monkeypatch.setattr(
        task._equality.pool, "_command", [*command[:3], str(tmp_path / "gone.py"), *command[4:]]
    )
    texts = [f"\\boxed{{x+{n}}}" for n in range(8)]
    with pytest.raises(tasks.CheckerError, match="a worker cannot start"):
        tasks.score_batch(task, texts, [EXAMPLE | {"answer": "y^2"}] * 8)
