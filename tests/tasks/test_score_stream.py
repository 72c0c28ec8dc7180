"""Scoring in threads: the verdicts of serial scoring, failures counted, users' functions safe."""

import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import tasks
from dlm_fast.tasks import Score, ScoreStream, score_batch

EXAMPLE = {"numbers": [30, 100, 93], "target": 23}
ANSWERS = ["<answer>30 + 93 - 100</answer>", "<answer>1</answer>", "", "\\boxed{30+93-100}"]


class Lengths:
    """Reward: the number of characters; texts with an x break the checker."""

    name = "lengths"
    thread_safe = True

    def score(self, completion, example):
        if "x" in completion:
            raise RuntimeError(f"cannot judge {completion}")
        return Score(float(len(completion)), "a" in completion, {"n": example["n"]})


class Batches(Lengths):
    """The same for whole parts, and none of a part that has an x."""

    def score_many(self, completions, examples):
        return [self.score(*pair) for pair in zip(completions, examples, strict=True)]


def streamed(task, completions, examples, cuts=(), threads=3):
    """Scored in parts, the later parts first."""
    edges = [0, *sorted(cuts), len(completions)]
    parts = [range(a, b) for a, b in itertools.pairwise(edges)]
    with ScoreStream(task, threads=threads) as stream:
        for part in reversed(parts):
            stream.add(part, [completions[i] for i in part], [examples[i] for i in part])
        early = stream.ready()
        scores = stream.finish()
    assert all(scores[number] == score for number, score in early.items())
    return scores


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="abx", max_size=4), min_size=1, max_size=9),
    data=st.data(),
    threads=st.integers(0, 3),
)
def test_verdicts_equal_serial_scoring(texts, data, threads):
    cuts = data.draw(st.lists(st.integers(0, len(texts)), max_size=3))
    examples = [{"n": i} for i in range(len(texts))]
    for task in (Lengths(), Batches()):
        expected = score_batch(task, texts, examples, give_up_after=1000)
        assert streamed(task, texts, examples, cuts, threads) == expected
        failed = [score for score in expected if "checker_error" in score.detail]
        assert len(failed) == sum("x" in text for text in texts)


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_tasks_of_ours_score_in_threads(name):
    task = tasks.get(name)
    example = EXAMPLE if name == "countdown" else task.load(None, "test")[0]
    texts = ANSWERS * 5
    assert task.thread_safe
    examples = [example] * len(texts)
    assert streamed(task, texts, examples, (3, 11)) == score_batch(task, texts, examples)


def test_a_users_function_stays_in_the_callers_thread_and_sees_the_whole_batch(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import threading\n"
        "calls = []\n"
        "def batch(completions, **_):\n"
        "    calls.append((threading.current_thread().name, list(completions)))\n"
        "    return [len(c) - len(completions) for c in completions]\n"
    )
    task = tasks.get(f"{file}:batch")
    examples = [{"prompt": "p"}] * 3
    scores = streamed(task, ["a", "bb", "ccc"], examples, (1,))
    assert [score.reward for score in scores] == [-2, -1, 0]
    calls = task.function.__globals__["calls"]
    assert calls == [(threading.current_thread().name, ["a", "bb", "ccc"])]
    allowed = tasks.get(f"{file}:batch", thread_safe=True)
    assert [score.reward for score in streamed(allowed, ["a", "bb"], examples[:2], (1,))] == [0, 1]
    assert all(
        name.startswith("dlm_fast-score") for name, _ in allowed.function.__globals__["calls"]
    )


def test_an_error_on_the_way_does_not_wait_for_verdicts():
    gate = threading.Event()

    class Slow(Lengths):
        def score(self, completion, example):
            gate.wait(60)
            return super().score(completion, example)

    with pytest.raises(KeyError), ScoreStream(Slow(), threads=1) as stream:
        stream.add([0, 1], ["a", "b"], [{"n": 0}, {"n": 1}])
        raise KeyError
    gate.set()


def test_failures_are_logged_once(caplog):
    streamed(Lengths(), ["x1", "ab", "x2"], [{"n": 0}] * 3, (1, 2))
    assert len(caplog.records) == 1
    assert "failed on 2 of 3 completions, first: RuntimeError: cannot judge x1" in caplog.text


@pytest.mark.parametrize(
    ("failures", "count", "limit", "stops"),
    [(0, 0, 0.0, False), (0, 9, 0.0, False), (1, 9, 0.0, True), (4, 8, 0.5, False),
     (5, 8, 0.5, True), (7, 7, 1.0, False), (8, 8, 1.0, True), (8, 9, 1.0, False)],
)  # fmt: skip
def test_when_a_checker_counts_as_broken(failures, count, limit, stops):
    if not stops:
        return tasks.refuse_broken_checker(Lengths(), failures, count, limit)
    with pytest.raises(tasks.CheckerError, match="checker of task lengths failed on"):
        tasks.refuse_broken_checker(Lengths(), failures, count, limit)
    return None
