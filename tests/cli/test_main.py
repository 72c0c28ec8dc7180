"""The commands are found, fast, helpful, and wrong words meet a suggestion."""

import subprocess
import sys

import pytest

from dlm_fast import __version__
from dlm_fast.cli.main import COMMANDS, main


def run_process(*words, cwd):
    command = [sys.executable, "-m", "dlm_fast", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_without_heavy_imports(tmp_path):
    code = """if True:
        import sys
        from dlm_fast.cli.main import main
        status = main(["--help"])
        heavy = {"torch", "transformers", "numpy", "matplotlib", "tyro"} & set(sys.modules)
        sys.exit(status or (str(heavy) if heavy else 0))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_module_and_exit_status(tmp_path):
    done = run_process("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"dlm_fast {__version__}\n")
    done = run_process("trian", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "dlm-fast: error: unknown command 'trian'; did you mean train?\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m dlm_fast --help | true",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""


HELP = {
    "train": ["--warm-start-steps", "--seed", "dlm-fast train bgpo", "--resume"],
    "train bgpo": ["--train.max-steps", "--algorithm.num-samples", "--task-options.template"],
    "train sft": ["--rollout.temperature", "--algorithm.", "--model-options.layers"],
    "train bgpo --task countdown": ["--task-options."],
    "sample": ["--num-samples", "--rollout.steps", "PROMPT"],
    "evaluate": ["--num-examples", "--rollout.block-size", "--answers", "--split"],
    "plot": ["--out"],
    "bench": ["--rows", "--save"],
    "info": ["--json"],
}


@pytest.mark.parametrize("command", HELP)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for word in HELP[command]:
        assert word in out


def test_every_option_has_help(capsys):
    """No option of the longest help stands without a text."""
    with pytest.raises(SystemExit):
        main(["train", "bgpo", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    options = [i for i, line in enumerate(lines) if line.startswith("--")]
    assert len(options) > 50
    for i in options:
        following = lines[i + 1 : i + 3]
        assert any(line and not line.startswith(("--", "╰")) for line in following), lines[i]


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["train", "bgpo", "--train.max-step", "5"], "--train.max-steps"),
        (["train", "bgpo", "--task-options.templte", "plain"], "--task-options.template"),
        (["evaluate", "tiny", "--num-example", "5"], "--num-examples"),
        (["info", "--jsn"], "--json"),
    ],
)
def test_unknown_option_meets_a_suggestion(words, suggestion, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "Unrecognized" in err
    assert suggestion in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "bgop"], "unknown algorithm 'bgop'; did you mean bgpo?"),
        (
            ["train", "unmasking-policy"],
            "unmasking-policy is not in this version yet; it has bgpo, coupled-grpo, diffu-grpo",
        ),
        (["train", "bgpo", "--task", "sudko"], "unknown task 'sudko'; did you mean sudoku?"),
        (["train", "bgpo", "--task", "chess"], "unknown task 'chess'; there are sudoku"),
        (["train", "bgpo", "--train.lr", "-1"], "train.lr must be between 0 and 1, got -1.0"),
        (["train", "bgpo", "--seed", "-1"], "seed must be 0 or more, got -1"),
        (["train", "--resume"], "resume needs run_dir"),
        (["train", "--max-steps", "0"], "max_steps must be at least 1, got 0"),
        (["train", "--config", "no.yaml"], "--config no.yaml: there is no such file"),
        (["train", "--config"], "--config needs a value"),
        (["train", "bgpo", "--model", "nowhere"], "nowhere is no directory"),
        (["evaluate"], "name the model first: dlm-fast evaluate MODEL"),
        (["evaluate", "tiny", "--num-examples", "-1"], "--num-examples must be at least 0"),
        (["sample", "tiny"], "nothing to complete"),
        (["sample", "tiny", "--prompt-file", "no.txt"], "--prompt-file no.txt"),
        (["plot"], "name at least one run"),
        (["plot", "nowhere"], "nowhere is no folder of a run"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith(f"dlm-fast {words[0]}: error: ")


def test_traceback_on_request():
    with pytest.raises(ValueError, match="unknown algorithm"):
        main(["train", "bgop", "--traceback"])
