"""All tensors of a call lie on one device, and somebody there can run kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlm_fast.ops import _executor
from dlm_fast.ops._device import check_device


def test_one_device():
    here = torch.zeros(2)
    check_device("op", a=here, b=None, c=here)
    with FakeTensorMode():
        there = [torch.zeros(2, device=f"cuda:{index}") for index in (0, 1)]
    check_device("op", a=there[0], b=None, c=there[0])
    for wrong in (here, there[1]):
        with pytest.raises(ValueError, match=rf"^op: b lies on {wrong.device} but a on cuda:0"):
            check_device("op", a=there[0], b=wrong)
    with pytest.raises(ValueError, match=r"^op: b lies on meta; move it to the CPU or to a CUDA"):
        check_device("op", a=here, b=here.to("meta"))


def test_a_device_without_an_executor_names_the_ways_out(monkeypatch):
    def nobody():
        raise ImportError("nobody here")

    monkeypatch.setattr(_executor, "cuda_executor", nobody)
    tensor = SimpleNamespace(device=torch.device("cuda", 0), is_cpu=False)
    with pytest.raises(ValueError, match=r"nobody here.*nvcc.*cupy13"):
        check_device("op", a=tensor)
