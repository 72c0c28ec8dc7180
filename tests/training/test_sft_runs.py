"""Whole runs of supervised variants: trained, stopped, resumed, refused."""

import json

import pytest
import torch
from family_directories import write_family_directory

from dlm_fast.cli.main import main
from dlm_fast.training.checkpoint import newest_checkpoint

SETTINGS = (
    *("--rollout.max-new-tokens", "16", "--rollout.block-size", "4", "--rollout.steps", "16"),
    *("--train.prompts-per-step", "2", "--train.eval-every", "0", "--train.lr", "1e-3"),
    *("--train.device", "cpu"),
)
TINY = ("--model-options.width", "16", "--model-options.layers", "1", "--model-options.heads", "2")
VARIANTS = {
    "random_masking full": ("--algorithm.num-samples", "2"),
    "semi_ar full": ("--algorithm.num-pads", "2"),
    "semi_ar block": ("--algorithm.num-samples", "2", "--algorithm.num-pads", "0"),
    "trace full": ("--algorithm.shrink", "4"),
    "trace block": ("--algorithm.rows-per-forward", "64"),
    "ar causal": ("--algorithm.fill-to", "12", "--algorithm.num-pads", "1"),
    "elbo full": ("--algorithm.length-curriculum", "1", "4", "2", "10"),
}


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """Curves take a second each and are tested elsewhere."""
    monkeypatch.setattr("dlm_fast.training.run_folder.RunFolder.write_curves", lambda self: None)


@pytest.fixture
def train(tmp_path):
    """train(variant, run, steps, *words) on texts of a file is the command's exit status."""
    (tmp_path / "reward.py").write_text("def reward(completion, example):\n    return 1.0\n")
    rows = [json.dumps({"prompt": f"question {i}", "completion": "yes" * i}) for i in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    task = ["--task", f"{tmp_path}/reward.py:reward", "--data", f"{tmp_path}/data.jsonl"]

    def run(variant, run_dir, steps, *words):
        options = ["--algorithm.variant", variant, "--train.max-steps", str(steps)]
        return main(["train", "sft", *SETTINGS, *task, *options, "--run-dir", str(run_dir), *words])

    return run


def rows_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    skipped = ("time/", "memory/")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(skipped)} for x in lines]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, train, name):
    straight, run = tmp_path / "straight", tmp_path / "run"
    variant, kind = name.split()
    words = [*TINY, "--model-options.kind", kind, *VARIANTS[name]]
    assert train(variant, straight, 3, *words) == 0
    assert train(variant, run, 1, *words) == 0
    assert train(variant, run, 3, *words, "--resume") == 0
    rows = rows_of(run)
    assert rows == rows_of(straight) and [row["step"] for row in rows] == [1, 2, 3]
    found, expected = (newest_checkpoint(folder / "checkpoints") for folder in (run, straight))
    assert all(torch.equal(found.tensor(n), expected.tensor(n)) for n in expected.names)
    if name == "elbo full":
        assert all("sft/left_out" in row for row in rows)
        return
    for row in rows:
        assert row["loss"] > 0 and row["sft/logprob"] < 0 and row["policy/grad_norm"] > 0
        assert row["trace/rows_per_response"] > row["trace/targets_per_response"] > 0


@pytest.mark.parametrize(
    ("family", "variant"),
    [("Dream", "ar"), ("Dream", "trace"), ("sdar", "trace"), ("qwen2", "ar")],
)
def test_families(tmp_path, train, family, variant):
    """Checkpoints of every kind."""
    model = write_family_directory(tmp_path / "model", family)
    assert train(variant, tmp_path / "run", 1, "--model", str(model)) == 0
    (row,) = rows_of(tmp_path / "run")
    assert row["loss"] > 0 and row["policy/grad_norm"] > 0


def test_help_shows_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["train", "sft", "--help"])
    out = capsys.readouterr().out
    for word in ("--algorithm.variant", "--algorithm.num-pads", "--algorithm.length-curriculum"):
        assert word in out


def test_a_dry_run_tries_the_variant(tmp_path, train, capsys):
    words = [*TINY, "--model-options.kind", "block", "--dry-run"]
    assert train("trace", tmp_path / "run", 1, *words) == 0
    assert "dry run: nothing was written" in capsys.readouterr().err
