"""A folder holds one run; what a user meets when it is another's, and what a run leaves there."""

import errno
import json
import logging
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from safetensors import SafetensorError
from train_in_processes import fake

import dlm_fast
from dlm_fast import config as config_io
from dlm_fast.training import RunConfig, TrainConfig, plot_run, run_config
from dlm_fast.training.metrics import MetricsFile
from dlm_fast.training.run_config import run_config_type
from dlm_fast.training.run_folder import RunFolder


def config(**train):
    return RunConfig(train=TrainConfig(**train))


@pytest.fixture
def folder(tmp_path):
    started = RunFolder(tmp_path / "run")
    started.start(config(lr=1e-4))
    return started


def test_a_folder_with_a_run_is_not_taken(folder):
    message = r"already holds a run; continue it with --resume, or choose another --run-dir"
    with pytest.raises(ValueError, match=message):
        RunFolder(folder.path).start(config())
    folder.config.unlink()
    folder.metrics.write({"step": 1})
    with pytest.raises(ValueError, match=message):
        RunFolder(folder.path).start(config())


def test_a_folder_with_other_files_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).start(config())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        RunFolder(tmp_path / "run").start(config())


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume; leave out --resume"):
        RunFolder(tmp_path / "run").resume(config())
    assert not (tmp_path / "run").exists()


def test_resume_names_the_options_that_differ(folder):
    with pytest.raises(ValueError) as error:
        folder.resume(config(lr=1e-3, max_grad_norm=2.0, save_every=7))
    text = str(error.value)
    assert "train.lr: 0.0001 and 0.001" in text and "train.max_grad_norm: 1.0 and 2.0" in text
    assert "save_every" not in text, "harmless options may change"
    assert config_io.parse_yaml(folder.config.read_text())["train"]["lr"] == 1e-4


def test_harmless_options_may_change(folder, caplog):
    caplog.set_level(logging.INFO)
    asked = config(lr=1e-4, max_steps=777, micro_batch=3)
    folder.resume(replace(asked, run_dir=str(folder.path), resume=True))
    assert "train.max_steps: 100 and 777" in caplog.text and "resume:" not in caplog.text
    written = config_io.parse_yaml(folder.config.read_text())
    assert written["train"]["max_steps"] == 777
    assert written["resume"] is False, "a word of the call, not of the run"


def test_the_length_of_a_schedule_is_not_harmless(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start(config(schedule="cosine"))
    with pytest.raises(ValueError, match=r"train\.max_steps: 100 and 200"):
        folder.resume(config(schedule="cosine", max_steps=200))


def test_a_lost_config_is_named(folder):
    folder.metrics.write({"step": 1})
    folder.config.unlink()
    with pytest.raises(ValueError, match=r"config\.yaml is missing"):
        folder.resume(config())


def test_what_a_run_leaves(tmp_path):
    run_dir = tmp_path / "run"
    trainer = fake(str(run_dir), {})
    result = trainer.run()
    names = sorted(path.name for path in run_dir.iterdir())
    assert names == [
        "checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "model", "samples.txt",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history and [row["step"] for row in rows] == [0, 1, 2, 3]
    samples = (run_dir / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("====")] == [
        f"==== step {step} ====" for step in (0, 2, 3)
    ]
    assert samples.count("-- example") == 3 * 4 and "reward 0" in samples
    written = config_io.parse_yaml((run_dir / "config.yaml").read_text())
    assert written["train"]["lr"] == 3e-3 and written["seed"] == 3
    assert written["name"] == "fake_training" and written["rollout"]["max_new_tokens"] == 8
    for line in ("checkpoint", "model", "plot", "metrics", "config", "continue"):
        assert line in result.closing_words
    loaded = dlm_fast.load(run_dir / "model")
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(dict(trainer.policy.named_parameters())[name])


def test_no_folder_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fake(None, {}).run()
    assert result.step == 3 and list(tmp_path.iterdir()) == []


def test_train_makes_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = dlm_fast.train(
        run_config_type("sft")(
            model_options={"width": 16, "layers": 1, "heads": 2},
            task_options={"template": "plain"},
            rollout=dlm_fast.SamplerConfig(max_new_tokens=17, block_size=17, steps=2),
            train=TrainConfig(max_steps=1, prompts_per_step=2, eval_every=0, lr=1e-3),
        )
    )
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("sft-sudoku-") and result.run_dir.resolve() == run
    text = (run / "config.yaml").read_text()
    read = config_io.from_yaml(text, run_config_type("sft"))
    assert read.train.max_steps == 1 and read.run_dir == str(result.run_dir)


def test_a_line_that_the_disk_refuses_costs_that_line_only(folder, monkeypatch, caplog):
    folder.metrics.write({"step": 1, "loss": 2.0})
    path_type = type(folder.path)
    real = path_type.open

    def refusing(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if mode == "ab":
            file.write(b'{"step": 2, "lo')
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(path_type, "open", refusing)
    folder.metrics.write({"step": 2, "loss": 3.0})
    monkeypatch.undo()
    folder.metrics.write({"step": 3, "loss": float("nan")})
    lines = folder.metrics.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.0},
        {"step": 3, "loss": None},
    ]
    assert "step 2 is missing" in caplog.text


def test_a_model_that_the_disk_refuses(tmp_path, monkeypatch):
    """Its files are written by a library with an error of its own; the checkpoint is there."""
    run_dir = tmp_path / "run"
    trainer = fake(str(run_dir), {})

    def full(path, *, state_dict):
        path.mkdir()
        (path / "config.json").write_text("{")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trainer.policy, "save", full)
    with pytest.raises(OSError, match=r"model could not be written .*checkpoint of step 3"):
        trainer.run()
    assert not (run_dir / "model").exists() and not (run_dir / ".writing-model").exists()
    fake(str(run_dir), {"resume": True}).run()
    assert (run_dir / "model" / "model.safetensors").exists()


def test_half_a_picture_is_removed(tmp_path, monkeypatch):
    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, "loss": 1.0})
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plot_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_plot_and_samples_do_not_stop_a_run(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dlm_fast.training.plot.plot_run", full)
    monkeypatch.setattr("dlm_fast.training.run_folder._append", full)
    assert fake(str(tmp_path / "run"), {}).run().step == 3
    assert "curves.png not written" in caplog.text and "samples.txt not written" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, r"train\.max_steps must be at least 1, got 0"),
        ({"lr": 0.0}, r"train\.lr must be between 0 and 1, got 0\.0"),
        ({"lr": float("nan")}, r"train\.lr"),
        ({"betas": (0.9,)}, r"train\.betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, r"train\.betas"),
        ({"schedule": "step"}, r"train\.schedule must be one of"),
        ({"precision": "fp16"}, r"train\.precision must be one of"),
        ({"eval_temperature": -1.0}, r"train\.eval_temperature must be 0 or more"),
        ({"keep_checkpoints": -1}, r"train\.keep_checkpoints must be 0 or more"),
        ({"weight_decay": float("inf")}, r"train\.weight_decay"),
        ({"max_grad_norm": float("nan")}, r"train\.max_grad_norm"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_run_config_is_checked():
    with pytest.raises(ValueError, match="resume needs run_dir"):
        RunConfig(resume=True)
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        RunConfig(seed=-1)
    with pytest.raises(
        ValueError, match=r"unknown algorithm 'ppo'; known: bgpo, .*treepo, grpo, sft"
    ):
        run_config.run_config_type("ppo")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rates(schedule, expected):
    train = TrainConfig(lr=0.1, warmup_steps=2, max_steps=6, schedule=schedule)
    rates = [train.lr_at(step) / 0.1 for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_two_trainers_of_one_process_do_not_disturb_each_other(tmp_path):
    first, second = (fake(str(tmp_path / name), {}) for name in ("a", "b"))
    histories = [first.run().history, second.run().history]
    steady = [[(r["step"], r.get("loss"), r.get("reward/mean")) for r in h] for h in histories]
    assert steady[0] == steady[1]
