"""What a Policy remembers of the checkpoint it came from, so that saving gives its like."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dlm_fast.models.family import FamilyFormat

# besides *.py: what tokenizers and generation keep beside the weights
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The small files of the source in memory: it may be gone, or be the target, when we save."""

    format: FamilyFormat
    files: dict[str, bytes]
    """config, tokenizer and code by name, written back as they are"""
    tied_head: bool = False
    """the head is the embedding matrix"""
    stores_tied_head: bool = False
    """a tied head lies in the files a second time, under its own name"""
    shards: dict[str, str] = field(default_factory=dict)
    """file of each tensor; empty: new files by size"""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """type of each tensor in the source"""

    def with_config(self, **values: Any) -> Source:
        """The same with other values in its config.json."""
        config = json.loads(self.files["config.json"])
        if all(config.get(name) == value for name, value in values.items()):
            return self
        text = json.dumps(config | values, indent=2, ensure_ascii=False) + "\n"
        return replace(self, files=self.files | {"config.json": text.encode()})


def small_files(directory: Path) -> dict[str, bytes]:
    """Everything in the directory that is copied along with the weights."""
    found = {path for pattern in _COPIED for path in directory.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(found)}
