"""Prompts of examples as token ids, and what happens to those that are too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dlm_fast.tasks.table import read_table, shorten

logger = logging.getLogger(__name__)

LongPrompts = Literal["error", "drop", "truncate"]
LONG_PROMPTS = ("error", "drop", "truncate")

# a tokenizer may add a start token or a mark of its own to a text
_ADDED_TOKENS = 8


class PromptEncoder:
    """Encodes the prompts of a task for a policy; remembers how many it had to cut."""

    def __init__(
        self,
        policy: Any,
        task: Any,
        max_new_tokens: int,
        max_tokens: int = 0,
        when_longer: LongPrompts = "error",
    ) -> None:
        """``max_tokens``: longest prompt; 0: what the model's own limit leaves beside the window of
        ``max_new_tokens``, or no limit where the model has none."""
        self._policy, self._task, self.when_longer = policy, task, when_longer
        family_limit = getattr(getattr(policy, "family", None), "max_length", None)
        self.limit: int | None = max_tokens or None
        if family_limit is not None:
            left = family_limit - max_new_tokens
            self.limit = min(max_tokens, left) if max_tokens else left
        self._frame: int | None = None
        self._cut: set[str] = set()

    @property
    def truncated(self) -> int:
        """Different prompts that were cut."""
        return len(self._cut)

    def encode(self, example: Any) -> Tensor:
        """int64 [P]. A prompt that is too long loses its beginning, if that is the policy; the
        question stands at the end, behind examples and instructions."""
        text = self._task.prompt(example)
        ids = self._policy.encode(text)
        if self.limit is None or ids.numel() <= self.limit or self.when_longer != "truncate":
            return ids
        self._cut.add(text)
        return self._tail(text)

    def too_long(self, example: Any) -> int:
        """Tokens of the prompt if they are too many, else 0."""
        text = self._task.prompt(example)
        if self.limit is None or len(text.encode()) + self._frame_tokens() <= self.limit:
            return 0  # a token stands for one byte or more, so this text needs no tokenizer
        count = int(self._policy.encode(text).numel())
        return count if count > self.limit else 0

    def keep(self, examples: Sequence[Any], source: str | None, what: str) -> list[int]:
        """Positions of the examples to use, said and counted where some are left out or cut.

        ``source`` is the file they come from; ``what`` names the option that names it. ValueError
        names the first prompt that is too long, where that is the policy, or if none is left.
        """
        if self.limit is None:
            return list(range(len(examples)))
        longer = {i: n for i, example in enumerate(examples) if (n := self.too_long(example))}
        if not longer:
            return list(range(len(examples)))
        first, count = next(iter(longer.items()))
        where = _place(source, what, first, len(examples))
        none_left = self._drops and len(longer) == len(examples)
        if self.when_longer == "error" or none_left:
            raise ValueError(
                f"{where}: the prompt has {count} tokens, more than the {self.limit} that fit "
                f"({shorten(self._task.prompt(examples[first]))}); {len(longer)} of "
                f"{len(examples)} are too long. Shorten them or rollout.max_new_tokens, or say "
                "what to do with them: long_prompts=drop or long_prompts=truncate"
            )
        verb = "left out" if self._drops else "cut at the beginning of"
        logger.warning(
            "%s: %s %d of %d prompts of more than %d tokens, the first at %s",
            source or what, verb, len(longer), len(examples), self.limit, where,
        )  # fmt: skip
        return [i for i in range(len(examples)) if not self._drops or i not in longer]

    @property
    def _drops(self) -> bool:
        return self.when_longer == "drop"

    def _frame_tokens(self) -> int:
        """Tokens that a chat template and the tokenizer add to a text."""
        if self._frame is None:
            self._frame = int(self._policy.encode("").numel()) + _ADDED_TOKENS
        return self._frame

    def _tail(self, text: str) -> Tensor:
        """The longest end of a text that fits."""
        assert self.limit is not None, "asked for a tail without a limit"
        low, high, best = 0, len(text), self._policy.encode("")
        while low < high:  # the most characters that fit lie in low..high
            middle = (low + high + 1) // 2
            ids = self._policy.encode(text[len(text) - middle :])
            if ids.numel() <= self.limit:
                low, best = middle, ids
            else:
                high = middle - 1
        if low == 0:
            raise ValueError(
                f"no end of the prompt {shorten(text)} fits into {self.limit} tokens; raise the "
                "limit on prompts or shorten rollout.max_new_tokens"
            )
        return best


def _place(source: str | None, what: str, index: int, count: int) -> str:
    """File and line of an example, where it comes from a file whose rows are the examples."""
    if source is None or not Path(source).is_file():
        return f"{what}, example {index + 1}"
    rows = read_table(source)
    return rows[index].where if len(rows) == count else f"{source}, example {index + 1}"
