"""Reading and writing the safetensors files of a checkpoint directory, single or sharded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class TensorFiles:
    """Open files of one checkpoint; headers are read at once, tensors on demand."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.shards = _shard_of_each_tensor(directory)
        """file name of each tensor; empty for a single file"""
        names = sorted(set(self.shards.values())) or [SINGLE]
        self._files = {name: stack.enter_context(_open(directory / name)) for name in names}
        self.file_of: dict[str, str] = {}
        for name, file in self._files.items():
            for tensor in file.keys():  # noqa: SIM118
                if tensor in self.file_of:
                    raise ValueError(
                        f"{directory}: tensor {tensor!r} lies in {self.file_of[tensor]} and in "
                        f"{name}; the files do not belong together"
                    )
                self.file_of[tensor] = name
        self._check_index()

    def dtype(self, tensor: str) -> torch.dtype:
        name = self._slice(tensor).get_dtype()
        if name not in DTYPES:
            raise ValueError(
                f"{self.path(tensor)}: tensor {tensor!r} has type {name}; quantised checkpoints "
                "are not supported, use one in float32, float16 or bfloat16"
            )
        return DTYPES[name]

    def shape(self, tensor: str) -> list[int]:
        return list(self._slice(tensor).get_shape())

    def read(self, tensor: str) -> Tensor:
        try:
            return self._files[self.file_of[tensor]].get_tensor(tensor)
        except SafetensorError as error:
            raise ValueError(f"{self.path(tensor)}: cannot read {tensor!r} ({error})") from error

    def path(self, tensor: str) -> Path:
        return self.directory / self.file_of[tensor]

    def _slice(self, tensor: str) -> Any:
        return self._files[self.file_of[tensor]].get_slice(tensor)

    def _check_index(self) -> None:
        for tensor, name in self.shards.items():
            if self.file_of.get(tensor) != name:
                raise ValueError(
                    f"{self.directory / name} lacks tensor {tensor!r}, which {INDEX} says it "
                    "holds; copy or download that file again"
                )
        if self.shards and (extra := sorted(set(self.file_of) - set(self.shards))):
            raise ValueError(
                f"{self.path(extra[0])} holds tensor {extra[0]!r}, which {INDEX} does not list; "
                "the files do not belong together"
            )


def _shard_of_each_tensor(directory: Path) -> dict[str, str]:
    if (directory / SINGLE).is_file():
        return {}
    index = directory / INDEX
    if not index.is_file():
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        raise ValueError(
            f"{directory} holds neither {SINGLE} nor {INDEX}"
            + (
                f", only {pickled[0].name}: pickled files can run code and are never loaded; "
                "convert the checkpoint to safetensors: load it with Transformers where you trust "
                "it, and call save_pretrained"
                if pickled
                else "; is it the folder of a checkpoint?"
            )
        )
    try:
        shards = json.loads(index.read_text())["weight_map"]
        wrong = [f for f in shards.values() if Path(f).name != f or not f.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no weight_map of tensors to files ({error!r})") from error
    if wrong or not shards:
        raise ValueError(f"{index}: weight_map must name .safetensors files beside it, got {wrong}")
    return shards


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {INDEX} lists it; copy or download it again")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}); it may be truncated: copy or "
            "download it again"
        ) from error
    with file:
        yield file


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], shards: dict[str, str]) -> None:
    """Writes every tensor into the file ``shards`` gives it, or into new files by size.

    Each file appears whole or not at all; weight files of an older save that are no longer listed
    are removed last.
    """
    if set(shards) != set(tensors):
        shards = _shards_by_size(tensors)
    files = sorted(set(shards.values()))
    for file in files:
        part = {name: tensors[name] for name in tensors if shards[name] == file}
        replace_file(directory / file, lambda path, part=part: _save(part, path))
    if files != [SINGLE]:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shards.items()))}
        content = (json.dumps(index, indent=2) + "\n").encode()
        replace_file(directory / INDEX, lambda path: path.write_bytes(content))
        files.append(INDEX)
    for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if old.name not in files:
            old.unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def _shards_by_size(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    number, size, numbers = 1, 0, {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > MAX_SHARD_BYTES:
            number, size = number + 1, 0
        size += tensor.nbytes
        numbers[name] = number
    if number == 1:
        return dict.fromkeys(tensors, SINGLE)
    return {name: f"model-{n:05}-of-{number:05}.safetensors" for name, n in numbers.items()}


def replace_file(path: Path, write: Any) -> None:
    """``write(partial path)``, then a rename: a crash or a full disk leaves the old file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
