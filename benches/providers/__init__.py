"""All providers of the protocol: ours, plain torch, and other packages where they can run."""

from __future__ import annotations

from dlm_fast.benchmark import memory, works
from dlm_fast.benchmark.providers import Provider
from providers import cupy_kernels, dllm_style, packages, torch_forms

FACTORIES = (
    *works.PLAIN,
    cupy_kernels.provider,
    dllm_style.provider,
    torch_forms.compiled_gather_first,
    torch_forms.compiled_all_positions,
    torch_forms.chunked,
    packages.cut_cross_entropy_compiled,
    packages.cut_cross_entropy_filtered,
    packages.cut_cross_entropy_unfiltered,
    packages.liger_scaled_as_shipped,
    packages.liger_scaled_gather_first,
    packages.liger_triton,
    packages.liger_triton_accurate,
    packages.liger_triton_rows,
    packages.quack_scaled,
    packages.quack_base,
)


def all_providers(device: str) -> list[Provider]:
    """Every one of them, those that cannot work here too: they say why."""
    return [make(device) if make not in works.PLAIN else make() for make in FACTORIES]


def memory_calls(name: str, **arguments: object) -> memory.Calls:
    """For ``dlm_fast.benchmark.memory.extra_bytes``: the work of a provider on the CPU."""
    provider = next(one for one in all_providers("cpu") if one.name == name)
    return works.memory_calls(provider, **arguments)  # type: ignore[arg-type]
