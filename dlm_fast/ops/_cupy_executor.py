"""Runs kernel bodies that CuPy compiles with NVRTC at first use: a GPU, but no CUDA toolkit."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

# Every kernel may use this much shared memory; more must be asked for.
ALWAYS_ALLOWED_BYTES = 48 << 10
ENTRY = re.compile(r"\bKERNEL\((?:[^(),]|\([^()]*\))+,[\s\\]*(\w+)\s*,")


def packaged_sources() -> Path:
    """The folder of kernel bodies and their headers that the installation put into the package."""
    import dlm_fast

    for place in dlm_fast.__path__:
        folder = Path(place) / "kernels"
        if (folder / "cuda").is_dir():
            return folder
    raise FileNotFoundError(
        "dlm_fast has no folder kernels/cuda: the CUDA sources that CuPy would compile were not "
        "installed; run `pip install .` in the source of dlm_fast"
    )


class CuPy:
    """CuPy keeps the compiled kernels on disk; it names them by the text it is given."""

    name = "CuPy (compiled at first use)"

    def __init__(self, cupy: ModuleType | Any, sources: Path | None = None) -> None:
        self._cupy = cupy
        self._sources = packaged_sources() if sources is None else sources
        self._kernels: dict[tuple[str, int, bool], Any] = {}

    def options(self) -> tuple[str, ...]:
        """CuPy adds the device's architecture and -ftz=true: subnormal floats count as zero."""
        return (
            "-std=c++17",
            f"-I{self._sources}",
            f"-I{self._sources / 'cuda' / 'executor'}",
        )

    def source_of(self, body: str) -> str:
        """The digest: CuPy does not look into included files when it asks its cache."""
        return f'// sources {self._digest}\n#include "cuda/{body}.cuh"\n'

    def entry_points(self, body: str) -> list[str]:
        """The kernels in the body's list, KERNEL(qualifier, name, ...)."""
        return ENTRY.findall((self._sources / "cuda" / f"{body}.cuh").read_text())

    def launch(self, plan: Any, device: torch.device) -> None:
        kernel, grid, threads, _, shared_bytes, params = plan  # the cluster is compiled in
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = self._cupy.cuda.Stream.from_external(torch.cuda.current_stream(index))
        # an array of one element is how CuPy passes a struct by value
        struct = np.frombuffer(params, dtype=np.dtype((np.void, len(params))))
        with self._cupy.cuda.Device(index), stream:
            compiled = self._kernel(kernel, index, shared_bytes > ALWAYS_ALLOWED_BYTES)
            compiled((*grid, 1), (threads, 1, 1), (struct,), shared_mem=shared_bytes)

    def _kernel(self, name: str, index: int, large: bool) -> Any:
        """The kernel on the current device, compiled or from CuPy's cache."""
        key = (name, index, large)
        if key not in self._kernels:
            if name not in self._body_of:
                raise ValueError(f"no kernel is named {name} in {self._sources / 'cuda'}")
            source = self.source_of(self._body_of[name])
            module = self._cupy.RawModule(code=source, options=self.options())
            compiled = module.get_function(name)
            if large:
                limits = self._cupy.cuda.Device(index).attributes
                compiled.max_dynamic_shared_size_bytes = limits["MaxSharedMemoryPerBlockOptin"]
            self._kernels[key] = compiled
        return self._kernels[key]

    @functools.cached_property
    def _body_of(self) -> dict[str, str]:
        """Entry point to body."""
        bodies = sorted(path.stem for path in (self._sources / "cuda").glob("*.cuh"))
        return {kernel: body for body in bodies for kernel in self.entry_points(body)}

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(p for p in self._sources.rglob("*") if p.is_file()):
            digest.update(path.relative_to(self._sources).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
        return digest.hexdigest()
