"""Which examples a run sees: the endless shuffled stream, and the held-out choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dlm_fast.ops.philox import Stream, mix64
from dlm_fast.training.prompts import PromptEncoder

Examples = str | Sequence[dict[str, Any]] | None
"""a file for the task to read, ready examples, or None for the task's own"""


def load_examples(
    task: Any, source: Examples, split: Literal["train", "test"], prompts: PromptEncoder
) -> Sequence[dict[str, Any]]:
    """Examples whose prompts fit, or are cut to fit when they are encoded."""
    option = "data" if split == "train" else "eval_data"
    if source is None:
        try:
            return task.load(None, split)  # generated: prompts of one kind, and many of them
        except ValueError as error:
            without = " (train.eval_every=0 does without)" if split == "test" else ""
            raise ValueError(f"{option} is missing{without}: {error}") from error
    if isinstance(source, str):
        examples, file = task.load(source, split), source
    else:
        examples, file = source, None
    kept = prompts.keep(examples, file, option)
    return examples if len(kept) == len(examples) else [examples[i] for i in kept]


class ExampleStream:
    """Indices of examples, epoch after epoch, each epoch in an order of its own.

    The order depends on the seed and the number of examples alone; ``position`` is all the state.
    """

    def __init__(self, num_examples: int, seed: int) -> None:
        if num_examples < 1:
            raise ValueError("no training examples: the file or the task gave an empty list")
        self._num_examples = num_examples
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self.position = 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices."""
        indices = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, self._num_examples)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._shuffled(epoch)
            indices.append(int(self._order[offset]))
        self.position += count
        return indices

    def _shuffled(self, epoch: int) -> np.ndarray:
        return _shuffled(self._num_examples, mix64(self._seed, int(Stream.DATA), epoch))


def choose_examples(examples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """``count`` examples from all over the list, 0: all; the same ones for every seed of a run."""
    if not examples:
        raise ValueError(
            "no held-out examples: the file or the task gave an empty list; give eval_data or set "
            "train.eval_every=0"
        )
    if count == 0 or count >= len(examples):
        return list(examples)
    chosen = _shuffled(len(examples), mix64(int(Stream.DATA)))[:count]
    return [examples[i] for i in sorted(chosen.tolist())]


def _shuffled(count: int, key: int) -> np.ndarray:
    # raw words and a stable sort: numpy promises those across versions, not permutation()
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
