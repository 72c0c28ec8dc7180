"""The processes of a run: how modules are spread over them and how they agree on numbers.

Accelerate starts the process group and says from the launcher's variables whether modules are
replicated (DDP) or sharded (FSDP2). Nothing else of the package reads those variables.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class Runtime:
    """This process among its peers."""

    def __init__(self, *, device: str = "auto", precision: str = "fp32") -> None:
        # Mixed precision is ours (autocast below, FSDP2's policy): the launcher's choice would
        # wrap forwards a second time and lets gradients be reduced in 16 bits.
        self.accelerator = Accelerator(
            # without it, processes launched on a machine without GPUs would each run alone
            cpu=device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="no",
        )
        self.precision = precision
        self._is_whole = False
        self.device: torch.device = self.accelerator.device
        if device == "cuda" and self.device.type != "cuda":
            raise ValueError("train.device is cuda, but torch finds no GPU; use cpu or auto")
        self._sharding = self._sharding_plugin()
        if self.world > 1:
            _leave_group_at_exit()

    def _sharding_plugin(self) -> FullyShardedDataParallelPlugin | None:
        """The user's FSDP settings, if modules are to be sharded."""
        kind = self.accelerator.distributed_type
        # Accelerate keeps the plugin for accelerators alone; its settings serve CPUs as well
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        plugin = FullyShardedDataParallelPlugin() if wanted and self.world > 1 else None
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate file "
                "(or pass --fsdp_version 2 to accelerate launch)"
            )
        known = (DistributedType.NO, DistributedType.FSDP)
        if kind not in known and not kind.value.startswith("MULTI_"):
            raise ValueError(
                f"distributed type {kind.value} is not supported: choose multi-CPU or multi-GPU "
                "(DDP), or FSDP version 2 in the accelerate file"
            )
        return plugin

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        return self._sharding is not None

    # -- modules

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module as losses must call it. Sharding happens in place, before any optimizer."""
        if self._sharding is not None:
            _shard(module.to(self.device), self._sharding, self.precision)
            return module
        module = module.to(self.device)
        return _replicate(module) if self.world > 1 else module

    @contextlib.contextmanager
    def unsharded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Weights whole on every rank: forwards inside need no agreement between ranks."""
        if self._sharding is None or self._is_whole:
            yield
            return
        roots = list(modules)
        units = [m for root in roots for m in root.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            again = self._sharding.reshard_after_forward
            for unit in units:
                unit.set_reshard_after_forward(again and unit not in roots, recurse=False)
                unit.reshard()

    @contextlib.contextmanager
    def gradient_sync(self, module: nn.Module, wanted: bool) -> Iterator[None]:
        """Backward passes inside reduce gradients over ranks only where ``wanted``."""
        if wanted or self.world == 1:
            yield
        elif isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                module.set_requires_gradient_sync(True)
        else:
            with self.accelerator.no_sync(module):
                yield

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 arithmetic on float32 weights, if the run asks for it."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # -- agreement

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def sum(self, value: float) -> float:
        """Sum over ranks, in rank order, so that it is the same number everywhere."""
        return math.fsum(self.gather(float(value)))

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Sums every tensor over ranks, in place; small ones travel together."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        return any(self.gather(bool(flag)))

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 acts; all get its result, or its error."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def fill(self, target: Tensor, full: Tensor | None) -> None:
        """Copies rank 0's full tensor into ``target``, whole or sharded."""
        if full is not None and tuple(full.shape) != tuple(target.shape):
            raise ValueError(f"saved tensor of shape {tuple(full.shape)} for {tuple(target.shape)}")
        with torch.no_grad():
            if not isinstance(target, DTensor):
                if self.world > 1:  # through the device: its backend may not know CPU tensors
                    sent = torch.empty_like(target, device=self.device) if full is None else full
                    sent = sent.to(self.device, target.dtype).contiguous()
                    dist.broadcast(sent, src=0)
                    full = sent
                assert full is not None
                target.copy_(full)
                return
            if full is None:
                full = torch.empty(target.shape, dtype=target.dtype)
            whole = full.to(device=target.device, dtype=target.dtype)
            placed = distribute_tensor(whole, target.device_mesh, target.placements)
            target.to_local().copy_(placed.to_local())


@functools.cache
def _leave_group_at_exit() -> None:
    """Gloo's threads must end before the interpreter does, or it aborts now and then."""

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)


def _buckets(tensors: Iterable[Tensor], max_bytes: int = 25 << 20) -> Iterator[list[Tensor]]:
    """Neighbours of one type, up to so many bytes together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > max_bytes or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; a collective for sharded ones."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu()


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global norm of the gradients, 0-d, the same on every rank."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _replicate(module: nn.Module) -> nn.Module:
    """DDP that leaves buffers alone: they never change here, and a collective in each forward
    would have to be agreed on."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(module, **options)


def _shard(module: nn.Module, plugin: Any, precision: str) -> None:
    """FSDP2 with the units that the user's accelerate settings name.

    Accelerate's own routine would also cut out embeddings and head as units; their weights must
    stay with the root, because the fused head reads them inside ``Policy.forward``.
    """
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    else:
        policy = MixedPrecisionPolicy()
    options = {"mp_policy": policy, "offload_policy": plugin.cpu_offload}
    is_unit = _unit_rule(module, plugin)
    for child in reversed(list(module.modules())):
        if child is not module and is_unit(child):
            fully_shard(child, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(module, reshard_after_forward=False, **options)


def _unit_rule(module: nn.Module, plugin: Any) -> Callable[[nn.Module], bool]:
    policy = plugin.auto_wrap_policy
    name = getattr(getattr(policy, "func", policy), "__name__", "")
    if name == "size_based_auto_wrap_policy":
        return lambda m: sum(p.numel() for p in m.parameters()) > plugin.min_num_params
    if name != "transformer_auto_wrap_policy":
        return lambda m: False
    named = plugin.transformer_cls_names_to_wrap
    if named is None:
        named = {n for m in module.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return lambda m: type(m).__name__ in named
