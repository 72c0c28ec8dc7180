"""Which rows decode now, and the cache pages of each: a queue, shared prompts, exact counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from dlm_fast.rollout.pages import Pages


@dataclass(frozen=True, kw_only=True)
class RowSize:
    """What one row asks of the cache."""

    shared_key: Hashable
    """rows with equal keys have the same first ``shared_length`` tokens"""
    shared_length: int
    """tokens that are kept once for all rows of a key; 0: nothing is shared"""
    longest: int
    """most tokens the row will have"""


@dataclass(kw_only=True)
class _Shared:
    """Tokens that several rows have in common."""

    length: int
    unfinished: int = 0
    inside: int = 0
    pages: list[int] = field(default_factory=list)
    is_kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Entered:
    """A row that entered, and what has to be done before it can decode."""

    row: int
    fills_shared: bool
    """the shared tokens' keys are not there yet: compute them into the row's first pages"""
    copy_from: int | None
    """the shared tokens end inside this page: copy it to the row's own page ..."""
    copy_to: int | None
    """... which is this one"""


class Admission:
    """Rows enter in order, each only once the pages of its longest course are sure, so a row inside
    never waits for pages and decoding always moves on. Page lists hold exactly
    ``pages.needed(length)`` pages a row."""

    def __init__(
        self, pages: Pages, sizes: Sequence[RowSize], rows: Sequence[int], max_batch: int | None
    ) -> None:
        """``sizes``: of all rows of the call; ``rows``: those to decode, in order."""
        self.pages, self._sizes, self._max_batch = pages, sizes, max_batch
        self._shared: dict[Hashable, _Shared] = {}
        self._promised = 0
        self.page_lists: dict[int, list[int]] = {}
        """pages of the rows inside, in the order of their tokens"""
        for row in rows:
            size = sizes[row]
            self._check(row, size)
            shared = self._shared.setdefault(size.shared_key, _Shared(length=size.shared_length))
            shared.unfinished += 1
        self._queue = deque(rows)

    @property
    def inside(self) -> list[int]:
        """Rows that decode now, ascending."""
        return sorted(self.page_lists)

    def enter(self) -> list[Entered]:
        """Lets rows in while there is room."""
        entered = []
        while self._queue and (self._max_batch is None or len(self.page_lists) < self._max_batch):
            if not self._has_room(self._queue[0]):
                break
            entered.append(self._let_in(self._queue.popleft()))
        assert self.page_lists or not self._queue
        return entered

    def grow(self, row: int, length: int) -> list[int]:
        """Pages newly given to a row that now has ``length`` tokens."""
        held = self.page_lists[row]
        new = self.pages.take(self.pages.needed(length) - len(held))
        held += new
        return new

    def leave(self, row: int) -> None:
        """Gives back what this row alone held; the last row of a prompt gives back its prompt."""
        self.pages.drop(self.page_lists.pop(row))
        self._promised -= self._own(row)
        shared = self._shared[self._sizes[row].shared_key]
        shared.inside -= 1
        shared.unfinished -= 1
        if shared.unfinished == 0:
            self._forget(shared)

    def _own(self, row: int) -> int:
        """Pages that the row needs besides the shared ones, at most."""
        size = self._sizes[row]
        return self.pages.needed(size.longest) - size.shared_length // self.pages.page_size

    def _has_room(self, row: int) -> bool:
        limit = self.pages.limit
        if limit is None:
            return True
        mine = self._shared[self._sizes[row].shared_key]
        need = self._own(row) + (0 if mine.is_kept else self.pages.needed(mine.length))
        if self._promised + need <= limit:
            return True
        # prompts whose rows all wait can be computed again; this also ends any mutual waiting
        for shared in self._shared.values():
            if shared.is_kept and not shared.inside and shared is not mine:
                self._forget(shared)
        return self._promised + need <= limit

    def _let_in(self, row: int) -> Entered:
        shared = self._shared[self._sizes[row].shared_key]
        fills = not shared.is_kept and shared.length > 0
        if fills:
            shared.pages = self.pages.take(self.pages.needed(shared.length))
            shared.is_kept = True
            self._promised += len(shared.pages)
        self._promised += self._own(row)
        shared.inside += 1
        num_whole, rest = divmod(shared.length, self.pages.page_size)
        whole = shared.pages[:num_whole]
        self.pages.hold(whole)
        # the row will write behind the shared tokens, so a page they share in part is copied
        own = self.pages.take(1) if rest else []
        self.page_lists[row] = whole + own
        return Entered(
            row=row,
            fills_shared=fills,
            copy_from=shared.pages[num_whole] if rest else None,
            copy_to=own[0] if rest else None,
        )

    def _forget(self, shared: _Shared) -> None:
        self._promised -= len(shared.pages)
        self.pages.drop(shared.pages)
        shared.pages, shared.is_kept = [], False

    def shared_pages(self, row: int) -> list[int]:
        """Pages of the tokens that the row shares."""
        return self._shared[self._sizes[row].shared_key].pages

    def _check(self, row: int, size: RowSize) -> None:
        need = self.pages.needed(size.shared_length) + self._own(row)
        limit = self.pages.limit
        if limit is not None and need > limit:
            raise ValueError(
                f"prompt {row} needs {need} pages of {self.pages.page_size} tokens for its "
                f"{size.longest} tokens, but rollout.cache_pages={limit}; raise it, or shorten the "
                "prompt or rollout.max_new_tokens"
            )
