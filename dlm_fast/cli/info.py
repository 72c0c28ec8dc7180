"""``dlm-fast info``: what was built, what this machine has, what is in force."""

from __future__ import annotations

import importlib
import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from dlm_fast import __version__
from dlm_fast.cli.arguments import parse
from dlm_fast.cli.output import write

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "tyro",
    "dacite",
    "pyyaml",
    "rich",
    "matplotlib",
)
SIMD_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """What was built, what this machine has, what is in force; put it into every bug report.

    With a model, as in ``dlm-fast info DIR``: what the checkpoint or the run's model is. Everything
    but its weights is read and checked.
    """

    json: bool = False
    """print JSON for programs"""


def run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        return _about_model(argv)
    options = parse(InfoOptions, argv, prog="dlm-fast info")
    found = facts()
    if options.json:
        write(json.dumps(found, indent=2))
        return 0
    for section in ("package", "build", "in force", "machine", "versions"):
        write(section)
        for name, value in found[section].items():
            write(f"  {name:<22}{value}")
    for warning in found["warnings"]:
        write(f"warning: {warning}")
    return 0


def _about_model(argv: list[str]) -> int:
    # not above: info also says why a package without its compiled part cannot load models
    from dlm_fast.cli.chosen_model import choose_model
    from dlm_fast.models.summary import summarise

    model, words = choose_model(argv, "dlm-fast info")
    options = parse(InfoOptions, words, prog="dlm-fast info MODEL")
    found = summarise(model.path, **model.model_options)
    if options.json:
        write(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        write(f"{name:<20}{value}")
    return 0


def facts() -> dict[str, Any]:
    """Everything ``info`` prints, by section."""
    extension, missing = _extension()
    build = dict(extension.build_info()) if extension else {}
    cuda = extension.cuda_device_info() if hasattr(extension, "cuda_device_info") else None  # type: ignore[union-attr]
    in_force, warnings = _in_force(extension, cuda)
    if missing:
        warnings.insert(0, missing)
    return {
        "package": {"version": __version__, "folder": str(Path(__file__).resolve().parent.parent)},
        "build": {
            "compiler": build.get("compiler", "none"),
            "instruction sets": build.get("simd_built", "none"),
            "OpenMP": build.get("openmp", "none"),
            "CUDA toolkit": build.get("cuda", "none"),
            "CUDA architectures": build.get("cuda_architectures", "none"),
        },
        "in force": in_force,
        "machine": _machine(cuda),
        "versions": {"python": platform.python_version(), **_versions()},
        "warnings": warnings,
    }


def driver_warning(runtime: int, driver: int) -> str | None:
    """CUDA versions as 1000 * major + 10 * minor; a driver runs every runtime up to its own."""
    if 0 < driver < runtime:
        return (
            f"the CUDA driver supports {_cuda_version(driver)}, older than the runtime "
            f"{_cuda_version(runtime)} this package was built with: kernels may fail to start; "
            "update the driver, or build with an older toolkit"
        )
    return None


def _extension() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("dlm_fast._C"), None
    except ImportError as error:
        return None, f"the compiled part is missing ({error}): run `pip install .` in the source"


def _in_force(extension: ModuleType | None, cuda: Any) -> tuple[dict[str, str], list[str]]:
    import torch

    from dlm_fast.ops._common import CUDA_WAYS

    warnings = []
    on_cpu, on_cuda = "none", "none: tensors on a GPU are refused"
    if extension is not None:
        level, best = extension.simd_level(), extension.best_simd_level()
        on_cpu = f"C++, {SIMD_LEVELS[level]}"
        if level < best:
            on_cpu += f" (lowered from {SIMD_LEVELS[best]})"
        on_cuda = _on_cuda()
    if cuda is not None:
        outdated = driver_warning(cuda["runtime_version"], cuda["driver_version"])
        warnings += [outdated] if outdated else []
    if torch.cuda.is_available() and on_cuda.startswith("none"):
        warnings.append(f"nothing runs kernels on the GPU here; {CUDA_WAYS}")
    return {
        "kernels on the CPU": on_cpu,
        "kernels on CUDA": on_cuda,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "isolation of code": _isolation(),
    }, warnings


def _isolation() -> str:
    from dlm_fast.tasks.sandbox.isolation import SandboxError, meaning
    from dlm_fast.tasks.sandbox.verdicts import working_mode

    try:
        return meaning(working_mode())
    except SandboxError as error:
        return f"none: {error}"


def _on_cuda() -> str:
    from dlm_fast.ops._executor import cuda_executor

    try:
        return cuda_executor().name
    except (ImportError, FileNotFoundError) as error:
        return f"none: {error}"


def _machine(cuda: Any) -> dict[str, str]:
    import torch

    devices = list(cuda["devices"]) if cuda is not None else []
    if not devices and torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = cuda["driver_version"] if cuda is not None else 0
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "CUDA devices": "; ".join(devices) or "none",
        "CUDA driver": _cuda_version(driver) if driver else "none found",
        "CUDA of torch": str(torch.version.cuda or "none"),
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
