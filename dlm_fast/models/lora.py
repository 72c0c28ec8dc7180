"""Low-rank adapters by peft: put into a Policy, switched off for its reference, merged into it.

    y = W x + scaling * B A x          W frozen, scaling = alpha / rank (alpha / sqrt(rank): rslora)

Source: LoRA, arXiv 2106.09685. Shapes: r rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dlm_fast.models.adapter_files import read_adapters, write_adapters
from dlm_fast.models.lora_options import LoraOptions

if TYPE_CHECKING:
    from dlm_fast.models.policy import Policy

NAME = "default"
"""of the adapters in peft's words; a Policy has one set of them"""
_A, _B = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters that a Policy has."""

    rank: int
    """r"""
    alpha: float
    """numerator of the scaling"""
    use_rslora: bool
    """the scaling divides by the root of the rank"""
    modules: tuple[str, ...]
    """names of the adapted layers in the Policy"""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def add_adapters(policy: Policy, options: LoraOptions) -> None:
    """Puts adapters into the policy's linear layers and freezes everything else."""
    peft = _peft()
    linear = [
        f"backbone.{name}"
        for name, m in policy.backbone.named_modules()
        if isinstance(m, nn.Linear)
    ]
    if options.adapter is not None:
        rename = policy.source.format.tensor_name
        own = {rename(f"{name}.weight").removesuffix(".weight"): name for name in linear}
        found = read_adapters(options.adapter, own)
        adapters = Adapters(
            rank=found.rank,
            alpha=found.alpha,
            use_rslora=found.use_rslora,
            modules=tuple(found.weights),
        )
        weights = found.weights
        _check_shapes(options.adapter, policy, weights)
    else:
        modules = tuple(name for name in linear if name.rpartition(".")[2] in options.targets)
        _check_targets(options.targets, linear)
        adapters = Adapters(
            rank=options.rank, alpha=options.scaled_alpha, use_rslora=False, modules=modules
        )
        weights = _new_weights(policy, adapters, options.seed)
    config = peft.LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        use_rslora=adapters.use_rslora,
        target_modules=[name.removeprefix("backbone.") for name in adapters.modules],
    )
    # on the meta device peft draws nothing from global generators
    peft.inject_adapter_in_model(config, policy.backbone, adapter_name=NAME, low_cpu_mem_usage=True)
    for name, (a_rI, b_Or) in weights.items():
        layer: Any = policy.get_submodule(name)
        base = layer.base_layer.weight
        dtype = torch.promote_types(base.dtype, torch.float32)
        for part, value in ((layer.lora_A, a_rI), (layer.lora_B, b_Or)):
            part[NAME].weight = nn.Parameter(value.to(base.device, dtype, copy=True))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.endswith((_A, _B)))
    policy.adapters = adapters


def _check_targets(targets: Sequence[str], linear: Sequence[str]) -> None:
    known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    if unknown := [target for target in targets if target not in known]:
        raise ValueError(
            f"lora.targets names {unknown[0]!r}; linear layers of this model are {', '.join(known)}"
        )


def _check_shapes(
    adapter: str, policy: Policy, weights: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    for name, (a_rI, b_Or) in weights.items():
        outputs, inputs = policy.get_parameter(f"{name}.weight").shape
        if (b_Or.shape[0], a_rI.shape[1]) != (outputs, inputs):
            raise ValueError(
                f"{adapter}: the adapter of {name} is A {list(a_rI.shape)}, B {list(b_Or.shape)}, "
                f"but the layer has {inputs} inputs and {outputs} outputs: it is of another model"
            )


def _new_weights(policy: Policy, adapters: Adapters, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A uniform as in torch's linear layers, B zero: the model starts as it was."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in adapters.modules:
        outputs, inputs = policy.get_parameter(f"{name}.weight").shape
        uniform_rI = torch.rand(adapters.rank, inputs, generator=generator)
        a_rI = (2 * uniform_rI - 1) / inputs**0.5
        weights[name] = (a_rI, torch.zeros(outputs, adapters.rank))
    return weights


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, the network computes as if it had no adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    were_off = [layer.disable_adapters for layer in layers]
    # peft freezes the adapters it switches off, and thaws all of them when it switches them on
    trained = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, was_off in zip(layers, were_off, strict=True):
            layer.enable_adapters(not was_off)
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)


def merged_state(state: Mapping[str, Tensor], adapters: Adapters) -> dict[str, Tensor]:
    """The weights of the same model without adapters, under the names it had before."""
    plain = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not name.endswith((_A, _B))
    }
    for module in adapters.modules:
        weight_OI = plain[f"{module}.weight"]
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        a_rI, b_Or = (state[f"{module}{part}"].to(wide) for part in (_A, _B))
        change_OI = adapters.scaling * (b_Or @ a_rI)
        plain[f"{module}.weight"] = (weight_OI.to(wide) + change_OI).to(weight_OI.dtype)
    return plain


def save_adapters(
    directory: Path,
    state: Mapping[str, Tensor],
    adapters: Adapters,
    tensor_name: Callable[[str], str],
) -> None:
    """Writes the adapters alone; ``tensor_name`` gives the source's names of parameters."""
    endings = (_A, _B, ".bias")
    plain = (name.replace(".base_layer.", ".") for name in state if not name.endswith(endings))

    def own_name(module: str) -> str:
        return tensor_name(f"{module}.weight").removesuffix(".weight")

    write_adapters(
        directory,
        rank=adapters.rank,
        alpha=adapters.alpha,
        use_rslora=adapters.use_rslora,
        weights={
            own_name(module): (state[f"{module}{_A}"], state[f"{module}{_B}"])
            for module in adapters.modules
        },
        all_modules={own_name(name.removesuffix(".weight")) for name in plain},
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"lora needs the package peft ({error}); install it with: pip install 'dlm_fast[lora]'"
        ) from error
    return peft
