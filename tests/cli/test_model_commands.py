"""``dlm-fast evaluate``, ``sample`` and ``plot`` on a small run."""

import json

import pytest

from dlm_fast import tasks
from dlm_fast.cli.main import main


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluate_scores_real_puzzles(small_run, shared_data, capsys):
    """The 500 published puzzles, with the run's own task and rollout settings."""
    data = shared_data / "sudoku_4x4_test.csv"
    assert main(["evaluate", str(small_run), "--data", str(data), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    rows = rows_of(small_run / "evaluations" / "sudoku_4x4_test.jsonl")
    assert summary["examples"] == len(rows) == 500
    assert [row["index"] for row in rows] == list(range(500))
    task = tasks.get("sudoku", template="plain")
    for row in rows[:50]:  # every answer's verdict can be checked from the file alone
        score = task.score(row["completion"], row["example"])
        assert (score.reward, score.correct) == (row["reward"], row["correct"])
        assert row["prompt"] == task.prompt(row["example"])
    assert summary["correct"] == pytest.approx(sum(row["correct"] for row in rows) / 500)
    assert summary["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 500)
    tokens, forwards = (sum(row[name] for row in rows) for name in ("tokens", "forwards"))
    assert summary["tokens_per_step"] == pytest.approx(tokens / forwards)
    low, high = summary["correct_interval"]
    assert 0 <= low <= summary["correct"] <= high <= 1
    assert summary["tokens_per_second"] > 0
    saved = json.loads((small_run / "evaluations" / "sudoku_4x4_test.summary.json").read_text())
    assert saved.pop("options")["data"] == str(data)
    assert saved == summary


def test_evaluate_repeats_itself_whatever_the_batch(small_run, capsys, tmp_path):
    words = ["evaluate", str(small_run), "--num-examples", "6", "--answers"]
    for name, size in (("a", "6"), ("b", "2")):
        assert main([*words, str(tmp_path / name), "--batch-size", size]) == 0
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    out = capsys.readouterr().out
    assert "6 examples of sudoku, test split" in out
    for word in ("correct", "reward", "tokens per step", "tokens/s", str(tmp_path / "b")):
        assert word in out


def test_evaluate_a_checkpoint_with_options_of_its_own(small_run, capsys):
    model = str(small_run / "model")
    options = "--task sudoku --task-options.template plain --num-examples 2 --rollout.steps 3"
    sizes = "--rollout.max-new-tokens 16 --rollout.block-size 16"
    assert main(["evaluate", model, *options.split(), *sizes.split(), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["forwards"] == 3
    assert "answers" not in summary


def test_an_unfinished_run_is_no_model(small_run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((small_run / "config.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "has no model yet" in capsys.readouterr().err


def test_evaluate_names_the_line_that_cannot_be_read(small_run, tmp_path, capsys):
    data = tmp_path / "bad.csv"
    data.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n31022,3142243142131324\n")
    assert main(["evaluate", str(small_run), "--data", str(data)]) == 2
    err = capsys.readouterr().err
    assert "bad.csv" in err
    assert "3" in err.partition("bad.csv")[2]


def test_sample_prompts(small_run, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("third prompt\n\nfourth\n")
    words = ["sample", str(small_run), "3102200002100320=", "1+1=", "--prompt-file", str(file)]
    assert main([*words, "--num-samples", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompts = ["3102200002100320=", "1+1=", "third prompt", "fourth"]
    assert [row["prompt"] for row in rows] == [p for p in prompts for _ in range(2)]
    assert all(row["tokens"] <= 16 and row["forwards"] == 4 for row in rows)
    assert main([*words, "--num-samples", "2", "--json"]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again == rows


def test_sample_examples_of_the_task(small_run, capsys):
    assert main(["sample", str(small_run), "--num-examples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count(">> ") == 2
    assert out.count("reward ") == 2
    example = tasks.get("sudoku", template="plain").load(None, "test")[0]
    assert example["puzzle"] + "=" in out


def test_plot_of_one_run_and_of_several(small_run, tmp_path, capsys):
    for runs in ([small_run], [small_run, small_run]):
        image = tmp_path / f"{len(runs)}" / "curves.png"
        assert main(["plot", *map(str, runs), "--out", str(image)]) == 0
        assert capsys.readouterr().out == f"{image}\n"
        assert image.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(small_run), "--out", str(tmp_path / "x.pdf")]) == 2
    assert "must end in .png" in capsys.readouterr().err
