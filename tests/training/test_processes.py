"""Two processes make the run that one process makes, replicated (DDP) or sharded (FSDP2)."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_in_processes import fake, real, trace, trees

from dlm_fast.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "train_in_processes.py"
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
"""
TOLERANCE = 1e-5


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(folder, jobs, *options):
    """The jobs, one after the other, in two processes."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        f"--main_process_port={free_port()}", *options, str(SCRIPT), json.dumps(jobs),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same runs in this process."""
    folder = tmp_path_factory.mktemp("single")
    torch.set_num_threads(1)
    histories = {
        "fake": fake(str(folder / "fake"), {}).run().history,
        "longer": fake(str(folder / "longer"), {"max_steps": 5}).run().history,
        "bgpo": real(str(folder / "bgpo"), {}).run().history,
        "two_pass": real(str(folder / "two_pass"), {"bound": "exact_two_pass"}).run().history,
        "early": real(str(folder / "early"), {"early": True}).run().history,
        "statistics": real(str(folder / "statistics"), STATISTICS).run().history,
        "adapters": real(str(folder / "adapters"), ADAPTERS).run().history,
        "values": trace(str(folder / "values"), VALUES).run().history,
        "value_head": trace(str(folder / "value_head"), VALUE_HEAD).run().history,
        "trees": trees(str(folder / "trees"), {}).run().history,
    }
    return folder, histories


# of single rollouts: other micro-batches are other samples in another layout
STATISTICS = {"gradient_statistics": True, "micro_batch": 1}
ADAPTERS = {"lora": {"rank": 2}}
VALUES = {"value": "own", "old_logprob": "decoupled"}
VALUE_HEAD = {"value": "shared", "shrink": 2}
JOBS = [
    ["fake", "fake", {}],
    ["bgpo", "bgpo", {}],
    ["bgpo", "two_pass", {"bound": "exact_two_pass"}],
    ["bgpo", "early", {"early": True}],
    ["bgpo", "adapters", ADAPTERS],
    ["tracerl", "values", VALUES],
    ["tracerl", "value_head", VALUE_HEAD],
    ["treepo", "trees", {}],
    ["fake", "taken_up", {"resume": True, "max_steps": 5}],
]


RUNS = [*(name for _, name, _ in JOBS if name != "taken_up"), "statistics"]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def pair(request, tmp_path_factory, single):
    """Runs in two processes; ``taken_up`` continues at step 2 what one process began."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(single[0] / "fake", folder / "taken_up")
    shutil.rmtree(folder / "taken_up" / "checkpoints" / "step-00000003")
    if request.param == "ddp":
        jobs = [*JOBS, ["bgpo", "statistics", STATISTICS]]
        launch(folder, jobs, "--multi_gpu")
    else:
        jobs = JOBS
        (folder / "fsdp.yaml").write_text(FSDP)
        launch(folder, JOBS, f"--config_file={folder / 'fsdp.yaml'}")
    reports = {
        job[1]: [json.loads((folder / f"{job[1]}-rank{r}.json").read_text()) for r in (0, 1)]
        for job in jobs
    }
    return request.param, folder, reports


def steady(row):
    return {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}


def assert_same_history(history, expected):
    for row, twin in zip(history, expected, strict=True):
        assert steady(row) == pytest.approx(steady(twin), abs=TOLERANCE, rel=TOLERANCE)


def test_the_layout_is_as_asked(pair):
    kind, _, reports = pair
    for ranks in reports.values():
        assert [report["world"] for report in ranks] == [2, 2]
        assert all(report["sharded"] == (kind == "fsdp2") for report in ranks)
        local = [report["local_elements"] for report in ranks]
        elements = ranks[0]["elements"]
        if kind == "fsdp2":
            assert sum(local) == elements and max(local) < 0.6 * elements
        else:
            assert local == [elements, elements]


@pytest.mark.parametrize("run", RUNS)
def test_metrics_equal_those_of_one_process(pair, single, run):
    """Three steps; ranks hold 3 and 2 prompts of different lengths, or unequal micro-batches."""
    kind, folder, reports = pair
    if run == "statistics" and kind == "fsdp2":
        pytest.skip("FSDP2 refuses statistics of samples")
    for report in reports[run]:
        assert_same_history(report["history"], single[1][run])
    written = [json.loads(x) for x in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert_same_history(written, single[1][run])


def test_ranks_make_unequal_numbers_of_forwards(pair, single):
    """In the run ``early`` some rollouts stop before the window is full, on one rank and not on
    the other: nothing in a rollout may wait for the other rank."""
    per_step = [row["rollout/nfe"] for row in single[1]["early"] if "rollout/nfe" in row]
    assert all(2 < nfe < 8 for nfe in per_step), per_step
    _, _, reports = pair
    first, second = (report["forwards"] for report in reports["early"])
    assert first != second


@pytest.mark.parametrize("run", ["fake", "bgpo", "adapters", "values", "value_head"])
def test_checkpoints_do_not_know_the_layout(pair, single, run):
    """Same tensors under the same names, whole; AdamW's moments are compared relatively."""
    _, folder, _ = pair
    one = newest_checkpoint(single[0] / run / "checkpoints")
    two = newest_checkpoint(folder / run / "checkpoints")
    assert one.step == two.step == 3 and sorted(one.names) == sorted(two.names)
    for name in one.names:
        torch.testing.assert_close(two.tensor(name), one.tensor(name), rtol=1e-3, atol=2e-5)
    assert one.state == two.state
    model = [(f / run / "model" / "config.json").read_bytes() for f in (single[0], folder)]
    assert model[0] == model[1]


def test_two_processes_take_up_the_run_of_one(pair, single):
    _, _, reports = pair
    for report in reports["taken_up"]:
        assert [row["step"] for row in report["history"]] == [3, 4, 5]
        assert_same_history(report["history"], single[1]["longer"][3:])


def test_one_process_takes_up_the_run_of_two(pair, single, tmp_path):
    _, folder, _ = pair
    shutil.copytree(folder / "fake", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    history = fake(str(tmp_path / "run"), {"resume": True, "max_steps": 5}).run().history
    assert_same_history(history, single[1]["longer"][3:])
