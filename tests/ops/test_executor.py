"""Which executor runs CUDA kernels, what CuPy is told, what is said where nothing can run them."""

from __future__ import annotations

import builtins
import contextlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_fast.cli.info import facts
from dlm_fast.ops import _executor
from dlm_fast.ops._cupy_executor import CuPy
from dlm_fast.ops._executor import cuda_executor, executor_of

GPU = torch.device("cuda", 1)
PARAMS = bytes(range(52))


class FakeCuPy(ModuleType):
    """Writes down what it is asked for; launches are (device, stream, kernel, arguments)."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.modules: list[dict] = []
        self.launches: list[tuple] = []
        self.inside: list = []
        self.limits: dict[str, int] = {}
        self.cuda = SimpleNamespace(
            Device=self.device, Stream=SimpleNamespace(from_external=self.stream)
        )

    def device(self, index: int):
        entered = self.enter(index)
        entered.attributes = {"MaxSharedMemoryPerBlockOptin": 232448}
        return entered

    def stream(self, torch_stream):
        return self.enter(torch_stream)

    def enter(self, thing):
        outer = self

        class Entered(contextlib.AbstractContextManager):
            def __enter__(self):
                outer.inside.append(thing)

            def __exit__(self, *error):
                assert outer.inside.pop() == thing

        return Entered()

    def RawModule(self, **options):
        assert self.inside, "compiled outside of the device"
        self.modules.append(options)
        return SimpleNamespace(get_function=lambda name: FakeKernel(self, name))


class FakeKernel:
    def __init__(self, cupy: FakeCuPy, name: str) -> None:
        self.cupy, self.name = cupy, name

    @property
    def max_dynamic_shared_size_bytes(self):
        raise NotImplementedError

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value):
        assert self.name not in self.cupy.limits, "asked for once"
        self.cupy.limits[self.name] = value

    def __call__(self, grid, block, args, *, shared_mem=0):
        (struct,) = args
        assert isinstance(struct, np.ndarray) and struct.size == 1
        self.cupy.launches.append(
            (*self.cupy.inside, self.name, grid, block, struct.tobytes(), shared_mem)
        )


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"stream of {index}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return FakeCuPy()


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "cuda" / "executor").mkdir(parents=True)
    for body, kernels in {"rows": ("row_a", "row_a_top"), "draws": ("draw",)}.items():
        entries = " ".join(f"KERNEL(DLM_KERNEL(256), {name}, P, f<float, 1>)" for name in kernels)
        (tmp_path / "cuda" / f"{body}.cuh").write_text(f"#define DLM_KERNELS(KERNEL) {entries}\n")
    (tmp_path / "cuda" / "executor" / "device_api.cuh").write_text("// words\n")
    return tmp_path


@pytest.fixture
def without_nvcc(monkeypatch):
    monkeypatch.setattr(_executor, "extension", lambda: SimpleNamespace())
    cuda_executor.cache_clear()
    yield
    cuda_executor.cache_clear()


def test_cupy_gets_source_options_grid_and_params(cupy, sources):
    executor = CuPy(cupy, sources)
    executor.launch(("row_a_top", (5, 2), 128, 1, 96, PARAMS), GPU)
    (module,) = cupy.modules
    assert module["code"].endswith('#include "cuda/rows.cuh"\n')
    assert module["options"] == (
        "-std=c++17",
        f"-I{sources}",
        f"-I{sources / 'cuda' / 'executor'}",
    )
    assert cupy.launches == [
        (1, "stream of 1", "row_a_top", (5, 2, 1), (128, 1, 1), PARAMS, 96),
    ]
    assert not cupy.inside and not cupy.limits


def test_cupy_compiles_once_per_kernel_and_device(cupy, sources):
    executor = CuPy(cupy, sources)
    plan = ("draw", (1, 1), 32, 1, 0, PARAMS)
    for device in (GPU, GPU, torch.device("cuda", 0), torch.device("cuda"), GPU):
        executor.launch(plan, device)
    assert [launch[0] for launch in cupy.launches] == [1, 1, 0, 3, 1]
    assert len(cupy.modules) == 3


def test_cupy_asks_once_for_large_shared_memory(cupy, sources):
    executor = CuPy(cupy, sources)
    executor.launch(("draw", (1, 1), 32, 1, 48 << 10, PARAMS), GPU)
    assert not cupy.limits
    for _ in range(2):
        executor.launch(("draw", (1, 1), 32, 1, (48 << 10) + 1, PARAMS), GPU)
    assert cupy.limits == {"draw": 232448}
    assert cupy.launches[-1][-1] == (48 << 10) + 1


def test_a_changed_header_changes_the_text_that_cupy_caches_by(cupy, sources):
    before = CuPy(cupy, sources).source_of("rows")
    assert CuPy(cupy, sources).source_of("rows") == before
    (sources / "cuda" / "executor" / "device_api.cuh").write_text("// other words\n")
    assert CuPy(cupy, sources).source_of("rows") != before


def test_cupy_refuses_unknown_kernels(cupy, sources):
    with pytest.raises(ValueError, match="no kernel is named row_b"):
        CuPy(cupy, sources).launch(("row_b", (1, 1), 32, 1, 0, PARAMS), GPU)


def test_missing_sources_are_named(monkeypatch, tmp_path):
    import dlm_fast

    monkeypatch.setattr(dlm_fast, "__path__", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"kernels/cuda.*pip install"):
        CuPy(FakeCuPy())


def test_nvcc_goes_first(monkeypatch):
    launches = []
    module = SimpleNamespace(cuda_launch=lambda plan, stream: launches.append((plan, stream)))
    monkeypatch.setattr(_executor, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234)
    )
    cuda_executor.cache_clear()
    try:
        executor = executor_of(GPU)
        assert executor is executor_of(torch.device("cuda")) and "nvcc" in executor.name
        executor.launch(("k", (1, 1), 32, 1, 0, b""), GPU)
    finally:
        cuda_executor.cache_clear()
    assert launches == [(("k", (1, 1), 32, 1, 0, b""), 1234)]


def test_cupy_comes_second(monkeypatch, without_nvcc, sources):
    monkeypatch.setitem(sys.modules, "cupy", FakeCuPy())
    monkeypatch.setattr("dlm_fast.ops._cupy_executor.packaged_sources", lambda: sources)
    assert "CuPy" in executor_of(GPU).name
    assert facts()["in force"]["kernels on CUDA"] == executor_of(GPU).name


def test_without_both_one_error_names_the_ways_out(monkeypatch, without_nvcc):
    real = builtins.__import__

    def broken(name, *args, **options):
        if name == "cupy":
            raise ImportError("libnvrtc.so.13 is missing")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ValueError, match="cuda:1") as caught:
        executor_of(GPU)
    message = str(caught.value)
    for words in (
        "built without nvcc",
        "libnvrtc.so.13 is missing",
        "DLM_CUDA=ON",
        "dlm_fast[cupy13]",
        "dlm_fast[cupy12]",
        "dlm-fast info",
    ):
        assert words in message
    assert "libnvrtc.so.13 is missing" in facts()["in force"]["kernels on CUDA"]


def test_the_cpu_has_its_own_backend():
    assert executor_of(torch.device("cpu")) is None
