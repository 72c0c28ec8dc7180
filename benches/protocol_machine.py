"""What a measurement must name: versions, machine, devices, and the ceilings measured beside it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from providers.availability import version

import dlm_fast
from dlm_fast import _C

PACKAGES = (
    "numpy",
    "cut-cross-entropy",
    "liger-kernel",
    "quack-kernels",
    "opacus",
    "triton",
    "cupy-cuda13x",
    "cupy-cuda12x",
)
SIMD = ("scalar", "avx2", "avx512", "avx512bf16")


def facts(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "versions": {
            "dlm_fast": dlm_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "instruction set": SIMD[_C.simd_level()],
            "compiler": _C.build_info()["compiler"],
        },
        "commit": _commit(),
    }
    if device == "cuda":
        found["machine"]["device"] = torch.cuda.get_device_name()
        found["machine"]["driver"] = _driver()
        found["versions"]["CUDA of torch"] = torch.version.cuda
        found["versions"]["CUDA toolkit"] = _C.build_info()["cuda"]
    return found


def rates(threads: int, seconds: float = 0.5) -> dict[str, dict[str, float]]:
    """GFLOP/s of the cores: multiply-adds alone, and the tile of our products."""
    wide = _C.fma_peak(False, seconds, threads)
    pairs = _C.fma_peak(True, seconds, threads)
    return {"float32": wide, "bfloat16": pairs if pairs["peak"] else wide}


def _processor() -> str:
    """The model where the system names it, and its numbers, which clouds do not hide."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine()
    known = dict(
        (part.strip() for part in line.split(":", 1))
        for line in path.read_text(errors="replace").partition("\n\n")[0].splitlines()
        if ":" in line
    )
    name = known.get("model name", platform.machine())
    return f"{name}, family {known.get('cpu family', '?')} model {known.get('model', '?')}"


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def _commit() -> str | None:
    """Of the source tree beside this file; with a plus where it was changed."""
    here = str(Path(__file__).resolve().parent)
    head = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    if not head:
        return None
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
