"""Every packaged kernel body compiles under NVRTC, for each architecture, without a warning."""

from __future__ import annotations

import ctypes
from importlib import metadata

import pytest

from dlm_fast.ops._cupy_executor import CuPy, packaged_sources

BODIES = sorted(path.stem for path in (packaged_sources() / "cuda").glob("*.cuh"))
# as CuPy calls it, and with the architecture's own instructions
ARCHITECTURES = {
    "sm_80": ("-arch=sm_80", "-ftz=true", "--device-as-default-execution-space"),
    "sm_90": ("-arch=sm_90", "-ftz=true", "--device-as-default-execution-space"),
    "sm_90a": ("-arch=sm_90a",),
}


class NVRTC:
    """The compiler, without a toolkit or a GPU."""

    def __init__(self, files: dict[str, str]) -> None:
        # it looks for its built-in functions where the loader looks: load them before
        ctypes.CDLL(files["libnvrtc-builtins"], mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(files["libnvrtc"])

    def compile(self, source: str, options: tuple[str, ...]) -> tuple[int, str, bytes]:
        """(status, log, machine code)"""
        call = self._library
        program = ctypes.c_void_p()
        status = call.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"body.cu", 0, None, None
        )
        assert status == 0
        try:
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = call.nvrtcCompileProgram(program, len(options), words)
            log = self._text(program, call.nvrtcGetProgramLogSize, call.nvrtcGetProgramLog)
            code = b""
            if status == 0:
                code = self._text(program, call.nvrtcGetCUBINSize, call.nvrtcGetCUBIN)
            return status, log.decode().rstrip("\0").strip(), code
        finally:
            call.nvrtcDestroyProgram(ctypes.byref(program))

    @staticmethod
    def _text(program, size_of, get) -> bytes:
        size = ctypes.c_size_t()
        assert size_of(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert get(program, buffer) == 0
        return buffer.raw


@pytest.fixture(scope="module")
def nvrtc() -> NVRTC:
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed: pip install 'dlm_fast[nvrtc]'")
    found = {
        file.name.split(".")[0]: str(file.locate())
        for file in files
        if ".so" in file.name and ".alt." not in file.name
    }
    return NVRTC(found)


@pytest.fixture(scope="module")
def executor() -> CuPy:
    return CuPy(None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("body", BODIES)
def test_body_compiles_without_a_warning(nvrtc, executor, body, architecture):
    options = executor.options() + ARCHITECTURES[architecture]
    status, log, code = nvrtc.compile(executor.source_of(body), options)
    assert status == 0, log
    assert log == "", "warnings are errors"
    for entry in executor.entry_points(body):
        assert entry.encode() + b"\0" in code, f"{entry} is not in the machine code"


def test_warnings_and_errors_are_seen(nvrtc):
    source = 'extern "C" __global__ void k(float* x) { int unused; x[0] = 1.0f; }'
    status, log, code = nvrtc.compile(source, ("-arch=sm_80",))
    assert status == 0 and code and "unused" in log
    status, log, code = nvrtc.compile(source + "}", ("-arch=sm_80",))
    assert status != 0 and not code and "error" in log
