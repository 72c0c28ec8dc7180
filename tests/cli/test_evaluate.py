"""``dlm-fast evaluate``: samples, files of answers, kills, broken checkers, long prompts."""

import gzip
import json
import os
import subprocess
import sys

import pytest
import torch

from dlm_fast import tasks
from dlm_fast.cli.evaluate import UNIMPORTANT
from dlm_fast.cli.main import main
from dlm_fast.rollout import Trajectory
from dlm_fast.training.answers import AnswerFile, decoding_columns

SOLVED = {"numbers": [30, 100, 93], "target": 23}
RIGHT, OTHER = "<answer>30 + 93 - 100</answer>", "<answer>30 - (100 - 93)</answer>"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def evaluated(capsys, *words):
    """The JSON summary of a command that must succeed."""
    status = main(["evaluate", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_samples_on_a_model(small_run, tmp_path, capsys):
    """Numbers of the summary from the answers' file; the first sample is that of --samples 1."""
    out = tmp_path / "a.jsonl"
    words = (small_run, "--num-examples", 5)
    summary = evaluated(capsys, *words, "--samples", 4, "--answers", out)
    rows = rows_of(out)
    assert [(r["index"], r["sample"]) for r in rows] == [(i, s) for i in range(5) for s in range(4)]
    assert len({row["sequence_id"] for row in rows}) == 20
    columns = "index sample example prompt completion reward correct answer detail tokens forwards"
    assert list(rows[0]) == [*columns.split(), "finish", "seed", "sequence_id"]
    task = tasks.get("sudoku", template="plain")
    for row in rows:
        score = task.score(row["completion"], row["example"])
        assert (score.reward, score.correct) == (row["reward"], row["correct"])
        assert row["answer"] == score.detail.get("answer")
    assert summary["correct"] == pytest.approx(sum(row["correct"] for row in rows) / 20)
    assert summary["pass@1"] == pytest.approx(summary["correct"])
    solved = [any(row["correct"] for row in rows if row["index"] == i) for i in range(5)]
    assert summary["pass@4"] == pytest.approx(sum(solved) / 5)
    assert {"pass@2", "maj@1", "maj@2", "maj@4"} <= set(summary)
    single = tmp_path / "b.jsonl"
    evaluated(capsys, *words, "--answers", single)
    assert [row["completion"] for row in rows_of(single)] == [r["completion"] for r in rows[::4]]
    beside = json.loads((tmp_path / "a.summary.json").read_text())
    assert beside["options"]["samples"] == 4 and beside["pass@4"] == summary["pass@4"]


def test_tokens_count_up_to_the_first_end_of_text():
    for ids, tokens in (([5, 6, 9, 7, 9], 3), ([9, 9], 1), ([5, 6], 2)):
        trajectory = Trajectory(prompt_ids=torch.tensor([1]), response_ids=torch.tensor(ids))
        assert decoding_columns(trajectory, (9, 8))["tokens"] == tokens


def test_a_table_for_people(small_run, capsys, tmp_path):
    out = tmp_path / "a.jsonl"
    words = ["evaluate", str(small_run), "--num-examples", "3", "--samples", "2"]
    assert main([*words, "--answers", str(out)]) == 0
    text = capsys.readouterr().out
    assert "3 examples of sudoku, test split, 2 answers each" in text
    for word in (
        "correct",
        "95 %",
        "bootstrap",
        "pass@2",
        "forwards",
        "tokens/s",
        "cells",
        str(out),
    ):
        assert word in text


def test_one_answer_many_times_is_refused(small_run, capsys):
    words = ["evaluate", str(small_run), "--samples", "3", "--rollout.temperature", "0"]
    assert main(words) == 2
    assert "set --rollout.temperature" in capsys.readouterr().err


def test_a_killed_evaluation_goes_on(small_run, tmp_path, capsys):
    """What an interrupted run leaves is kept: the answers equal those of one that was not."""
    whole = tmp_path / "whole.jsonl"
    words = (small_run, "--num-examples", 4, "--samples", 2)
    evaluated(capsys, *words, "--answers", whole)
    rows = rows_of(whole)

    killed = tmp_path / "killed.jsonl"
    evaluated(capsys, *words, "--answers", killed)
    options = json.loads((tmp_path / "killed.summary.json").read_text())["options"]
    killed.unlink()
    kept = {name: value for name, value in options.items() if name not in UNIMPORTANT}
    file = AnswerFile(killed)
    file.open({"model": str(small_run / "model"), **kept}, resume=False)
    for row in (rows[6], rows[1]):
        file.add(row | {"completion": row["completion"] + " kept"})
    file.close()
    with file.partial.open("a") as torn:
        torn.write('{"index": 3, "sam')

    changed = ["evaluate", str(small_run), "--num-examples", "5", "--samples", "2", "--resume"]
    assert main([*changed, "--answers", str(killed)]) == 2
    assert "made with other options (num_examples: 4 and 5)" in capsys.readouterr().err
    evaluated(capsys, *words, "--answers", killed, "--resume", "--batch-size", 2)
    found = rows_of(killed)
    assert [row["completion"].endswith(" kept") for row in found] == [
        place in (1, 6) for place in range(8)
    ]
    assert [row["completion"].removesuffix(" kept") for row in found] == [
        row["completion"] for row in rows
    ]
    assert not file.partial.exists()
    # without --resume it starts anew
    file.open({}, resume=False)
    file.close()
    evaluated(capsys, *words, "--answers", killed)
    assert rows_of(killed) == rows


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process by signal")
def test_sigkill_leaves_the_answers_so_far(small_run, tmp_path):
    """The checker kills the process at its fifth answer; four are on disk."""
    reward = tmp_path / "deadly.py"
    reward.write_text(
        "import os, signal\n"
        "count = 0\n"
        "def score(completion, example):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return 1.0\n"
    )
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"{i}="} for i in range(6)])
    out = tmp_path / "out.jsonl"
    words = f"{small_run / 'model'} --task {reward}:score --data {data} --answers {out}"
    sizes = "--rollout.max-new-tokens 4 --rollout.block-size 4 --rollout.steps 2 --batch-size 1"
    command = [sys.executable, "-m", "dlm_fast", "evaluate", *words.split(), *sizes.split()]
    # elsewhere: a checkout in the working directory would hide the installed package
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == -9
    partial = tmp_path / "out.jsonl.partial"
    lines = rows_of(partial)
    assert "options" in lines[0] and [row["index"] for row in lines[1:]] == [0, 1, 2, 3]
    assert not out.exists()


def test_responses_with_verdicts(tmp_path, capsys):
    """Answers from elsewhere: two agree, one does not and is listed with its line."""
    rows = [
        SOLVED | {"response": RIGHT, "correct_by_d1": True},
        SOLVED | {"response": "<answer>1</answer>", "correct_by_d1": False},
        SOLVED | {"response": OTHER, "correct_by_d1": False},
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    words = ("--task", "countdown", "--responses", path)
    found = evaluated(capsys, *words)["agreement"]
    assert (found["agree"], found["rows"], found["compared"]) == (2, 3, "correct")
    [case] = found["disagreements"]
    assert case["where"] == f"{path}, line 3" and (case["ours"], case["theirs"]) == (1, 0)
    assert case["answer"] == "30 - (100 - 93)" and case["reference"] == "[[30, 100, 93], 23]"
    assert main(["evaluate", *words]) == 0
    text = capsys.readouterr().out
    assert "2 of 3 verdicts agree with correct_by_d1 (0.6667)" in text and "line 3" in text


def test_responses_with_graded_verdicts_of_a_named_column(tmp_path, capsys):
    rows = [SOLVED | {"text": RIGHT, "score": 1.0}, SOLVED | {"text": "<answer>x", "score": "0.25"}]
    path = write_rows(tmp_path / "r.jsonl", rows)
    columns = ("--response-column", "text", "--verdict-column", "score")
    summary = evaluated(capsys, "--task", "countdown", "--responses", path, *columns)
    assert summary["agreement"]["compared"] == "reward"
    assert [case["ours"] for case in summary["agreement"]["disagreements"]] == [0.1]


def test_responses_of_our_own_file_score_the_same(small_run, tmp_path, capsys):
    out, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    words = ("--num-examples", 3, "--samples", 2)
    first = evaluated(capsys, small_run, *words, "--answers", out)
    options = ("--task", "sudoku", "--task-options.template", "plain", "--answers", again)
    second = evaluated(capsys, "--responses", out, *options)
    assert second["agreement"]["fraction"] == 1.0
    for name in ("correct", "correct_interval", "pass@2", "maj@2", "reward", "samples"):
        assert second[name] == first[name]
    for row, other in zip(rows_of(out), rows_of(again), strict=True):
        assert all(row[name] == value for name, value in other.items())


def test_responses_to_the_examples_of_a_data_file(tmp_path, capsys):
    data = write_rows(tmp_path / "d.jsonl", [SOLVED, {"numbers": [1, 2], "target": 3}])
    task = ("--task", "countdown", "--data", data, "--responses")
    texts = [{"completion": RIGHT}, {"completion": "<answer>1 + 2</answer>"}]
    ordered = write_rows(tmp_path / "r.jsonl", texts)
    assert evaluated(capsys, *task, ordered)["correct"] == 1.0
    indexed = [row | {"index": i} for row, i in zip([*texts, texts[0]], (0, 1, 1), strict=True)]
    summary = evaluated(capsys, *task, write_rows(tmp_path / "i.jsonl", indexed))
    assert summary["examples"] == 2 and summary["correct"] == pytest.approx(3 / 4)
    own = [{"example": SOLVED, "completion": RIGHT, "index": i} for i in (4, 9, 4)]
    path = write_rows(tmp_path / "own.jsonl", own)
    summary = evaluated(capsys, "--task", "countdown", "--responses", path)
    assert summary["examples"] == 2, "equal examples of different numbers are different examples"
    path = write_rows(tmp_path / "own.jsonl", [{**row, "index": None} for row in own])
    assert evaluated(capsys, "--task", "countdown", "--responses", path)["examples"] == 1
    for rows, message in (
        ([*texts, texts[0]], "has 3 answers and"),
        ([{"completion": "a", "index": 2}], r"line 1: index must lie in 0..1"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", rows)
        assert main(["evaluate", *task, path]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"puzzle": "1"}], [], "line 1: no column with the answers"),
        ([SOLVED | {"response": 3}], [], "line 1: response must be a text, got 3"),
        ([SOLVED | {"response": "a"}, SOLVED], [], "line 2: response must be a text, got None"),
        ([{"response": "a"}], [], "line 1: no column for 'numbers'"),
        (
            [SOLVED | {"response": "a", "v": "maybe"}],
            ["--verdict-column", "v"],
            "v must be a verdict",
        ),
        ([SOLVED | {"response": "a"}], ["--verdict-column", "v"], "no column with the verdicts"),
        ([], [], "has no rows"),
    ],
)
def test_unreadable_responses(tmp_path, capsys, rows, words, message):
    path = write_rows(tmp_path / "r.jsonl", rows)
    assert main(["evaluate", "--task", "countdown", "--responses", path, *words]) == 2
    assert message in capsys.readouterr().err


def test_responses_need_no_model(tmp_path, capsys, small_run):
    path = write_rows(tmp_path / "r.jsonl", [SOLVED | {"response": RIGHT}])
    words = ["evaluate", str(small_run), "--task", "countdown", "--responses", path]
    assert main(words) == 2
    assert "without a model" in capsys.readouterr().err


def test_published_responses(shared_data, capsys):
    """The d1 checker's verdicts: at least 98 % agree, and the table names the others."""
    for task, name in (("countdown", "correct_by_d1"), ("sudoku", "cell_accuracy_by_d1")):
        path = shared_data / "responses" / f"{task}_llada8b_256.jsonl"
        summary = evaluated(capsys, "--task", task, "--responses", path)
        assert summary["agreement"]["column"] == name
        assert summary["agreement"]["rows"] == 256 and summary["agreement"]["agree"] >= 251


USER_FILE = """
import json

def length(completion, example):
    if "fail" in example:
        raise KeyError("no such key")
    return min(1.0, len(completion) / example["wanted"])
"""


@pytest.fixture
def user_task(tmp_path):
    (tmp_path / "mine.py").write_text(USER_FILE)
    return f"{tmp_path / 'mine.py'}:length"


def test_a_users_function_end_to_end(user_task, small_run, tmp_path, capsys, small_options):
    """Column mapping, template, samples and training, all with the user's own file."""
    rows = [{"q": f"{i}+1=", "wanted": 4 + i} for i in range(6)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    task = ["--task", user_task, "--data", data, "--task-options.columns", "prompt", "q"]
    sampled = ["--samples", "3", "--rollout.temperature", "1"]
    out = tmp_path / "o.jsonl"
    sizes = ["--rollout.max-new-tokens", "8", "--rollout.block-size", "8", "--rollout.steps", "4"]
    summary = evaluated(capsys, small_run / "model", *task, *sampled, *sizes, "--answers", out)
    assert summary["examples"] == 6 and summary["samples"] == 3 and "pass@2" in summary
    assert "maj@3" not in summary, "the task names no answers"
    for row in rows_of(out):
        assert row["prompt"] == row["example"]["q"]
        assert row["reward"] == min(1.0, len(row["completion"]) / row["example"]["wanted"])

    options = [word for word in small_options if "template" not in word and word != "plain"]
    folder = tmp_path / "run"
    words = ["train", "bgpo", *options, *task, "--eval-data", data, "--run-dir", str(folder)]
    assert main([*words, "--train.max-steps", "2", "--algorithm.group-size", "3"]) == 0
    trained = evaluated(capsys, folder, "--data", data)
    assert trained["examples"] == 6 and trained["data"] == data


def test_a_broken_checker_stops_an_evaluation(user_task, small_run, tmp_path, capsys):
    rows = [{"prompt": "1=", "wanted": 3} | ({"fail": 1} if i % 2 else {}) for i in range(6)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    out = tmp_path / "o.jsonl"
    words = f"evaluate {small_run / 'model'} --task {user_task} --data {data} --answers {out}"
    words += " --rollout.max-new-tokens 4 --rollout.block-size 4 --rollout.steps 2"
    assert main([*words.split(), "--max-checker-failures", "0.4"]) == 2
    err = capsys.readouterr().err
    assert "failed on 3 of 6 completions, first with KeyError" in err
    assert "answers are in" in err and (tmp_path / "o.jsonl.partial").exists()
    summary = evaluated(capsys, *words.split()[1:])
    assert summary["checker_failures"] == 3 and summary["correct"] <= 0.5


def test_long_prompts(small_run, tmp_path, capsys):
    rows = [{"prompt": "1" * n, "wanted": 1} for n in (4, 9, 5)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    (tmp_path / "mine.py").write_text(USER_FILE)
    words = ["evaluate", str(small_run / "model"), "--task", f"{tmp_path / 'mine.py'}:length"]
    words += ["--data", data, "--max-prompt-tokens", "6", "--rollout.max-new-tokens", "4"]
    words += ["--rollout.block-size", "4", "--rollout.steps", "2"]
    assert main(words) == 2
    assert "d.jsonl, line 2: the prompt has 9 tokens" in capsys.readouterr().err
    for policy, counts in (("drop", (1, 0, 2)), ("truncate", (0, 1, 3))):
        summary = evaluated(capsys, *words[1:], "--long-prompts", policy)
        found = (*summary["prompts"].values(), summary["examples"])
        assert found == counts


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_every_format_with_a_column_mapping(ending, user_task, small_run, tmp_path, capsys):
    rows = [{"q": f"{i}+1=", "wanted": 4} for i in range(3)]
    path = tmp_path / f"d.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="the optional reader pyarrow is absent")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "csv":
        path.write_text("q,wanted\n" + "".join(f"{r['q']},{r['wanted']}\n" for r in rows))
    else:
        pack = gzip.compress if ending.endswith("gz") else bytes
        path.write_bytes(pack("".join(json.dumps(row) + "\n" for row in rows).encode()))
    out = tmp_path / "o.jsonl"
    words = [small_run / "model", "--task", user_task, "--data", path, "--answers", out]
    words += ["--task-options.columns", "prompt", "q", "--rollout.max-new-tokens", "4"]
    words += ["--rollout.block-size", "4", "--rollout.steps", "2", "--max-checker-failures", "1"]
    evaluated(capsys, *words)
    assert [row["prompt"] for row in rows_of(out)] == [row["q"] for row in rows]
    failed = ["checker_error" in row["detail"] for row in rows_of(out)]
    assert failed == [ending == "csv"] * 3, "CSV holds texts, by which a length cannot be divided"


def test_a_broken_checker_stops_a_run_that_goes_on_once_it_is_mended(
    user_task, small_options, tmp_path, capsys
):
    rows = [{"prompt": "1=", "wanted": 3} | ({"fail": 1} if i % 2 else {}) for i in range(6)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    options = [word for word in small_options if "template" not in word and word != "plain"]
    folder = tmp_path / "run"
    words = ["train", "bgpo", *options, "--task", user_task, "--data", data, "--eval-data", data]
    words += ["--run-dir", str(folder), "--algorithm.group-size", "2", "--train.max-steps", "2"]
    words += ["--train.prompts-per-step", "6", "--train.eval-every", "0"]
    assert main([*words, "--train.max-checker-failures", "0.4"]) == 2
    err = capsys.readouterr().err
    assert "failed on 6 of 12 completions, first with KeyError" in err
    assert f"dlm-fast train --run-dir {folder} --resume" in err, "the state is saved"
    [row] = rows_of(folder / "metrics.jsonl")
    assert row["reward/checker_failures"] == 6
    (tmp_path / "mine.py").write_text(USER_FILE.replace("raise", "return 0.0 #"))
    assert main(["train", "--run-dir", str(folder), "--resume"]) == 0
    found = rows_of(folder / "metrics.jsonl")
    assert [row["reward/checker_failures"] for row in found] == [0, 0]
