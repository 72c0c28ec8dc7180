"""``dlm-fast bench gradient-noise`` on a small run: table, JSON and picture; what it refuses."""

import json

import pytest

from dlm_fast.cli.main import main

FAST = ["--samples", "1", "2", "4", "--samplers", "l_iid", "coupled"]
FAST += ["--repetitions", "2", "--group-size", "2", "--reference-samples", "16"]


@pytest.fixture(scope="module")
def rewarded_run(tmp_path_factory, small_options):
    """Folder of a run whose rewards differ from answer to answer."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "reward.py").write_text(
        "def distinct(completion, example):\n    return len(set(completion)) / 16\n"
    )
    rows = [{"prompt": f"{i}="} for i in range(6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "bgpo", *small_options, "--train.max-steps", "1", "--train.eval-every", "0"]
    words = [word for word in words if word not in ("--task-options.template", "plain")]
    words += ["--task", f"{folder / 'reward.py'}:distinct", "--data", str(folder / "data.jsonl")]
    words += ["--algorithm.num-samples", "2", "--algorithm.group-size", "2"]
    assert main([*words, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_measures_the_model_of_a_run(rewarded_run, tmp_path, capsys):
    saved, drawn = tmp_path / "deep" / "noise.json", tmp_path / "deep" / "noise.png"
    words = ["bench", "gradient-noise", *FAST, "--model", str(rewarded_run), "--seeds", "0", "1"]
    assert main([*words, "--save", str(saved), "--plot", str(drawn)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["sampler"][1:4] == ["n=1", "n=2", "n=4"]
    assert lines["coupled"][1] == "-", "pairs need two masks"
    found = json.loads(saved.read_text())
    assert [result["seed"] for result in found["seeds"]] == [0, 1]
    assert found["options"]["samplers"] == ["l_iid", "coupled"]
    assert found["facts"]["versions"]["torch"]
    for name, row in found["all_seeds"].items():
        assert lines[name][-1] and lines[name][3] == f"{row['cells'][-1]['noise'][0]:.2f}"
        value, low, high = row["slope"]
        assert low <= value <= high
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "gradient-noise", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "dlm-fast bench gradient-noise" in out and "--warm-start-steps" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "4"], "needs two numbers of samples for a slope"),
        (["--seeds", "1", "1"], "--seeds must be different from each other"),
        (["--warm-start-steps", "0"], "--warm-start-steps must be at least 1, got 0"),
        (["--plot", "noise.pdf"], "--plot must end in .png, got noise.pdf"),
        (["--model", "nowhere"], "--model must be tiny or the folder of a run"),
    ],
)
def test_refuses(words, message, capsys):
    assert main(["bench", "gradient-noise", *words]) == 2
    assert message in capsys.readouterr().err
