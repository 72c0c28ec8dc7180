"""The check of every op that a GPU machine runs finds right values right, and wrong ones wrong."""

import subprocess
import sys
import textwrap
from pathlib import Path

import every_kernel
import pytest
import torch

from dlm_fast import ops
from dlm_fast.ops._executor import emulated

STAND_INS = Path(__file__).resolve().parent.parent / "stand_ins"


def test_every_op_is_right_on_the_cpu(capsys):
    assert every_kernel.run("cpu") == 0
    out = capsys.readouterr().out
    for op in ("token_logprob", "weighted_logprob_", "token_stats", "mask_tokens", "unmask_select"):
        assert op in out
    assert "0 wrong" in out


@pytest.mark.cuda
def test_every_op_is_right_on_a_gpu(capsys):
    assert every_kernel.run("cuda") == 0


def test_a_wrong_value_is_found(monkeypatch, capsys):
    right = ops.unmask_select
    monkeypatch.setattr(ops, "unmask_select", lambda *a, **k: ~right(*a, **k))
    assert every_kernel.run("cpu") == 1
    assert "unmask_select: FAILED" in capsys.readouterr().out


def test_the_emulated_path_is_right():
    """The smallest head, as the kernels of a GPU compute it."""
    pytest.importorskip("dlm_fast._C_emulated")
    head = every_kernel.make_head(every_kernel.SIZES[0], torch.bfloat16)
    with emulated():
        every_kernel._accumulating(head)
        every_kernel._token_logprob(head)


def test_hypothesis_can_be_missing(tmp_path):
    """Its tests are skipped, the others of the same file run."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(
            """
            import pytest
            from hypothesis import given, settings
            from hypothesis import strategies as st

            @settings(max_examples=3)
            @given(st.integers(0, 3) | st.lists(st.floats(), min_size=2).map(len), b=st.data())
            def test_drawn(a, b):
                raise AssertionError

            @pytest.mark.parametrize("c", [1, 2])
            @given(st.integers())
            def test_both(a, c):
                raise AssertionError

            def test_plain():
                pass
            """
        )
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p"]
    command += ["no:hypothesispytest", "test_it.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(STAND_INS), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert "1 passed, 3 skipped" in done.stdout, done.stdout
