"""The protocol runs every case, names what is missing, and its page is made of its files alone."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import make_tables
import protocol
import protocol_memory
import protocol_run
import pytest
import torch
from protocol_cases import LinearCase, cpu_cases, cuda_cases, shrunk
from protocol_linear import run_linear_case
from protocol_run import Bench, mark_inaccurate, run_head_case
from providers import all_providers, memory_calls, packages

from dlm_fast.benchmark.problem import HeadSize, make_head
from dlm_fast.benchmark.timing import Plan, cpu_clock
from dlm_fast.benchmark.truth import errors, truth_of

BENCHES = Path(protocol.__file__).parent
# compiling takes half a minute a case and is torch's own business
COMPILED = re.compile("compiled")


def bench_of(clock=cpu_clock):
    return Bench(
        device="cpu",
        clock=clock,
        plan=Plan(rounds=1, warm_ups=0),
        providers=[one for one in all_providers("cpu") if not COMPILED.search(one.name)],
        threads=1,
        seed=0,
    )


def run(case, bench):
    return (
        run_linear_case(case, bench) if isinstance(case, LinearCase) else run_head_case(case, bench)
    )


CASES = list(dict.fromkeys(shrunk(case) for case in [*cpu_cases(1), *cpu_cases(2), *cuda_cases()]))


@pytest.fixture(scope="module")
def measured():
    """Every case of both devices, on a handful of numbers and on CPU tensors."""
    bench = bench_of()
    return [run(case, bench) for case in CASES]


def test_every_task_is_there(measured):
    tasks = {"T1", "T1+", "T2", "T3", "T4", "T5", "T6", "T7"}
    assert {case["task"] for case in measured} == tasks | {"T2B"}
    for cases in (cpu_cases(1), cuda_cases()):
        assert {case.task for case in cases} >= tasks


def test_ours_delivers_everything_and_is_exact(measured):
    for case in measured:
        ours = case["results"][0]
        assert ours["provider"] == "dlm_fast"
        assert ours["calls"] >= 1
        assert ours["cpu_s"]["least"] >= 0
        for name, error in ours["errors"].items():
            gradient = name.endswith("grad")
            limit = 5e-3 if case["dtype"] == "bfloat16" and gradient else 1e-5
            assert error < limit, (case["task"], case["work"], name)
    steps = [case for case in measured if case["task"] in ("T2", "T3", "T5")]
    for case in steps:
        assert {"logprob", "hidden_grad", "weight_grad"} == set(case["results"][0]["errors"])


def test_nobody_is_dropped_in_silence(measured):
    """A provider has numbers with errors, or a reason in words."""
    for case in measured:
        for result in case["results"]:
            if "missing" in result:
                assert len(result["missing"]) > 5
                assert not result["missing"].startswith("failed"), result
            else:
                assert result["errors"]
                assert result["wall_s"]["median"] > 0
    first = measured[0]["results"]
    names = {result["provider"] for result in first}
    assert names == {one.name for one in bench_of().providers}
    on_gpu_only = {"quack-kernels", "liger-kernel", "cut-cross-entropy", "dlm_fast, CuPy kernels"}
    reasons = {r["provider"]: r["missing"] for r in first if r["provider"] in on_gpu_only}
    assert set(reasons) == on_gpu_only
    assert set(reasons.values()) == {"needs a CUDA device"}


def test_plain_torch_agrees(measured):
    for case in measured:
        for result in case["results"]:
            if result["provider"].startswith(("eager", "dLLM", "torch")) and "errors" in result:
                limit = 1e-5 if case["dtype"] == "float32" else 0.1
                assert all(error < limit for error in result["errors"].values()), result


def test_providers_of_a_gpu_say_why_they_are_missing():
    """Built for a GPU without one: nothing raises, each is ready or gives a reason."""
    for provider in all_providers("cuda"):
        assert provider.unavailable is None or len(provider.unavailable) > 10


def test_a_loss_summed_over_rows_is_compared_at_unit_weights():
    """The step of packages that return a sum, with plain torch in their place."""
    head = make_head(HeadSize(20, 9, 12, 50), torch.float32)
    unit = dataclasses.replace(head, row_weight=torch.ones(9))
    main_grad = torch.zeros(head.weight.shape)
    logits = unit.hidden[unit.rows] @ unit.weight.T
    loss = torch.nn.functional.cross_entropy(logits, unit.targets, reduction="sum")
    delivered = packages._summed_step(unit, main_grad, loss) | {"weight_grad": main_grad}
    assert max(errors(truth_of(unit), delivered).values()) < 1e-5
    assert max(errors(truth_of(head), delivered).values()) > 0.1


def test_a_rival_that_fails_is_a_result(monkeypatch):
    def broken(head):
        raise RuntimeError("out of tiles")

    bench = bench_of()
    index = next(i for i, p in enumerate(bench.providers) if p.name == "dLLM-style")
    bench.providers[index] = dataclasses.replace(bench.providers[index], score=broken)
    case = next(case for case in CASES if case.task == "T1")
    results = {r["provider"]: r for r in run(case, bench)["results"]}
    assert results["dLLM-style"]["missing"] == "failed: RuntimeError: out of tiles"
    bench.providers[0] = dataclasses.replace(bench.providers[0], score=broken)
    with pytest.raises(RuntimeError, match="out of tiles"):
        run(case, bench)


def test_ten_times_our_error_is_marked():
    results = {
        "dlm_fast": {"errors": {"logprob": 1e-6, "token": 0.0}},
        "a": {"errors": {"logprob": 1e-5, "token": 0.5}},
        "b": {"errors": {"logprob": 9e-6}},
        "c": {"missing": "needs a CUDA device"},
    }
    mark_inaccurate(results)
    assert results["a"]["inaccurate"] == ["logprob"]
    assert all("inaccurate" not in results[name] for name in ("dlm_fast", "b", "c"))


def test_samples_share_nothing_but_the_head():
    case = next(case for case in CASES if case.task == "T4")
    size = dataclasses.replace(
        case.size, t=case.size.t * case.samples, n=case.size.n * case.samples
    )
    head = make_head(size, torch.float32)
    parts = protocol_run.parts(head, case)
    assert [part.size.n for part in parts] == [case.size.n] * case.samples
    for part in parts:
        assert part.weight is head.weight
        assert part.hidden.is_leaf
    chosen = torch.cat([part.hidden[part.rows.long()] for part in parts])
    assert torch.equal(chosen, head.hidden[head.rows.long()])
    for name in ("targets", "row_weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(head, name))


def test_memory_is_asked_for_where_the_case_wants_it(monkeypatch, measured):
    asked = []
    monkeypatch.setattr(
        protocol_memory, "extra_bytes", lambda setup, **request: asked.append(request) or 7
    )
    cases = copy.deepcopy(measured)
    protocol_memory.add_memory(cases)
    for case in cases:
        for result in case["results"]:
            wanted = case.get("memory") and "missing" not in result
            assert result.get("extra_bytes") == (7 if wanted else None)
    assert all(request["size"] == [48, request["size"][1], 32, 100] for request in asked)


def test_memory_of_a_provider_by_name():
    """What a fresh process does for it."""
    size = [48, 20, 32, 100]
    warm_up, call = memory_calls(
        "dLLM-style", work="weighted_step", size=size, dtype="bfloat16", threads=1
    )
    warm_up()
    assert {tuple(tensor.shape) for tensor in call()} == {(20,), (48, 32)}


def test_the_page_is_what_the_generator_makes():
    assert make_tables.PAGE.read_text() == make_tables.render(), "run python benches/make_tables.py"


def found_on(device, cases):
    return {
        "device": device,
        "command": "c",
        "seed": 0,
        "rounds": 1,
        "versions": {"torch": "2"},
        "machine": {"processor": "P", "cores": 1, "instruction set": "avx2"},
        "rates": {"1": {name: {"peak": 2.0, "tile": 1.0} for name in ("float32", "bfloat16")}},
        "providers": {"dlm_fast": {"what": "w", "unavailable": None}},
        "cases": cases,
        "left_out": ["T9: the time was over"],
    }


def test_without_a_gpu_the_page_holds_no_number_of_one(tmp_path, measured):
    (tmp_path / "protocol_cpu.json").write_text(json.dumps(found_on("cpu", measured)))
    page = make_tables.render(tmp_path)
    section = page.partition("## GPU\n")[2].partition("## Providers")[0]
    assert "No GPU has been measured yet" in section
    assert not re.search(r"\d", section)
    cpu = page.partition("## GPU\n")[0]
    assert "Left out: T9" in cpu
    for task in ("T1", "T1+", "T2", "T3", "T4", "T5", "T6", "T7"):
        assert f"### {task}: " in cpu
    own = measured[0]["results"][0]["cpu_s"]["least"]
    assert f"| dlm_fast | {own * 1e3:.2f} | 1.00 |" in cpu


def test_a_gpu_has_the_same_tables(tmp_path):
    """Numbers of a device clock, as on a GPU, find their places."""
    bench = bench_of(clock=lambda call: (call(), {"device": 0.5})[1])
    cases = [run(case, bench) for case in CASES if case.dtype == "bfloat16"]
    failed = next(case for case in cases if case["task"] == "T3")["results"]
    failed[0] = {"provider": "dlm_fast", "missing": "failed: OutOfMemoryError: too much"}
    found = found_on("cuda", cases)
    found["machine"] |= {"device": "G", "driver": "1"}
    (tmp_path / "protocol_cuda.json").write_text(json.dumps(found))
    page = make_tables.render(tmp_path)
    assert "Not measured yet." in page  # the CPU
    assert "G, driver 1; P" in page
    for task in ("T1", "T1+", "T2", "T3", "T4", "T5", "T6", "T7"):
        assert f"### {task}: " in page
    assert "| dlm_fast | 500.0 | 1.00 |" in page
    assert "dlm_fast failed: OutOfMemoryError: too much" in page
    assert "| eager, gather first | 500.0 | - |" in page


def test_the_page_shows_the_update(tmp_path):
    row = {
        "size": "wide",
        "precision": "fp32",
        "seconds": {"torch": 0.4, "autograd": 0.25, "in_place": 0.2},
        "torch_over_in_place": 2.0,
        "autograd_over_in_place": 1.25,
        "metrics_differ_by": 2e-7,
        "error": {"torch": 3e-4, "in_place": 2.5e-4},
    }
    found = {"rows": [row], "rounds": 9, "threads": 1, "versions": {"torch": "2"}}
    (tmp_path / "bgpo_update.json").write_text(json.dumps(found))
    page = make_tables.render(tmp_path)
    assert (
        "| wide | fp32 | 400.0 | 250.0 | 200.0 | 2.00 | 1.25 | 2.0e-07 | 3.00e-04 / 2.50e-04 |"
        in page
    )
    assert "bgpo_update" not in make_tables.render(tmp_path / "nothing")


def test_the_command_line(tmp_path):
    """One process for all: two threads' cases, rates and providers in one file."""
    out = tmp_path / "new" / "found.json"
    words = ["--device", "cpu", "--shrink", "--tasks", "T6", "--rounds", "1", "--no-memory"]
    words += ["--providers", "dLLM-style", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(BENCHES / "protocol.py"), *words]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    found = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert found["command"].startswith("python benches/protocol.py --device cpu --shrink")
    assert found["rates"]["1"]["float32"]["peak"] > 0
    assert found["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
    assert {case["task"] for case in found["cases"]} == {"T6"}
    shown = {r["provider"] for case in found["cases"] for r in case["results"]}
    assert shown == {"dlm_fast", "dLLM-style"}
    make_tables.render(out.parent)


def test_words_without_options():
    words = ["--a", "1", "--out", "x", "--threads", "1", "2", "--b"]
    assert protocol._without(words, "--out", "--threads") == ["--a", "1", "--b"]
