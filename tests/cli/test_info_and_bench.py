"""``dlm-fast info`` and ``dlm-fast bench`` say what is true of this build."""

import json

import pytest

from dlm_fast import _C, __version__
from dlm_fast.cli.info import driver_warning, facts
from dlm_fast.cli.main import main


def test_info_prints_the_build(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    build = _C.build_info()
    for word in (__version__, build["compiler"], build["simd_built"], "transformers", "threads"):
        assert word in out


def test_info_names_the_instruction_set_in_force():
    best = _C.best_simd_level()
    _C.set_simd_level(0)
    try:
        lowered = facts()["in force"]["kernels on the CPU"]
    finally:
        _C.set_simd_level(best)
    assert lowered.startswith("C++, scalar")
    assert "lowered" not in facts()["in force"]["kernels on the CPU"]


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["build"]["OpenMP"] == _C.build_info()["openmp"]
    assert isinstance(found["warnings"], list)


@pytest.mark.parametrize(
    ("runtime", "driver", "warned"),
    [(13000, 12080, True), (13000, 13000, False), (12080, 13000, False), (13000, 0, False)],
)
def test_an_old_driver_is_warned_of(runtime, driver, warned):
    message = driver_warning(runtime, driver)
    assert (message is not None) == warned
    assert not message or ("12.8" in message and "13.0" in message)


TINY = ["--rows", "4", "--width", "8", "--vocab", "11", "--seconds", "0.01"]


def test_bench_compares_every_op_and_saves(capsys, tmp_path):
    file = tmp_path / "new" / "bench.json"
    assert main(["bench", *TINY, "--save", str(file)]) == 0
    out = capsys.readouterr().out
    saved = json.loads(file.read_text())
    ops = {result["op"] for result in saved["results"]}
    assert {"token_logprob", "weighted_logprob", "token_stats", "unmask_select"} <= ops
    for result in saved["results"]:
        assert f"{result['op']} {result['phase']}" in out
        assert set(result["median_s"]) == {"dlm_fast", "definition", "eager"}
        assert all(seconds > 0 for seconds in result["median_s"].values())
        assert result["calls"] >= 3
    assert saved["options"]["vocab"] == 11
    assert saved["facts"]["build"]["compiler"] == _C.build_info()["compiler"]


def test_bench_of_token_logprob_is_thorough(capsys, tmp_path):
    """Both types, forward and three forms of the step, each with rate and error."""
    file = tmp_path / "bench.json"
    assert main(["bench", "token_logprob", *TINY, "--no-memory", "--save", str(file)]) == 0
    out = capsys.readouterr().out
    for form in ("weighted_logprob ", "weighted_logprob_ ", "token_logprob, then backward"):
        assert out.count(f"  dlm_fast {form}") == 2
    assert out.count("  eager, gather first") == out.count("  eager, all positions") == 6
    assert "our register tile" in out
    saved = json.loads(file.read_text())["results"]
    assert saved["size"] == {"t": 512, "n": 4, "d": 8, "v": 11}
    assert saved["gflops"]["float32"]["peak"] > 0
    for result in saved["results"]:
        assert result["errors"]["logprob"] < (1e-5 if "dlm" in result["provider"] else 0.1)
        assert result["flop"] == (2 if result["work"] == "score" else 6) * 4 * 8 * 11
        assert result["calls"] >= 3
        assert "extra_bytes" not in result


def test_bench_of_token_logprob_shows_memory(capsys, monkeypatch):
    asked = []

    def extra_bytes(setup, **request):
        asked.append(request)
        return 1234567

    monkeypatch.setattr("dlm_fast.benchmark.memory.extra_bytes", extra_bytes)
    assert main(["bench", "token_logprob", *TINY, "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16:" not in out
    assert sum(line.endswith(" 1.2") for line in out.splitlines()) == len(asked) == 10
    assert all(request["size"] == [512, 4, 8, 11] for request in asked)


def test_bench_takes_the_ops_it_is_told(capsys):
    assert main(["bench", "unmask_select", *TINY]) == 0
    out = capsys.readouterr().out
    assert "unmask_select top_k" in out
    assert "token_logprob" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["token_logprop"], "did you mean token_logprob?"),
        (["x"], "unknown op 'x'; there are token_logprob"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bench_refuses(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
