"""Which page of the key-value cache belongs to whom: exact counts, shared pages, a limit."""

from __future__ import annotations


class Pages:
    """Numbers of pages with a count of holders each. A page is free when nobody holds it."""

    def __init__(self, page_size: int, limit: int | None = None) -> None:
        """``page_size``: tokens of a page. ``limit``: most pages held at once; None: no limit."""
        self.page_size, self.limit = page_size, limit
        self._holders: list[int] = []
        self._free: list[int] = []
        self.peak = 0
        """most pages held at once so far"""

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders) - len(self._free)

    @property
    def made(self) -> int:
        """Pages that were ever handed out; their numbers lie below this."""
        return len(self._holders)

    def needed(self, num_tokens: int) -> int:
        """Pages of a sequence of this length."""
        return -(-num_tokens // self.page_size)

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """Pages that nobody held."""
        if self.limit is not None and self.used + count > self.limit:
            raise RuntimeError(
                f"{count} pages were asked for with {self.used} of {self.limit} in use; this is a "
                "bug of the sampler, which admits rows only where their pages are free"
            )
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
                self._holders[page] = 1
            else:
                page = len(self._holders)
                self._holders.append(1)
            taken.append(page)
        self.peak = max(self.peak, self.used)
        return taken

    def hold(self, pages: list[int]) -> None:
        """One more holder for each of these pages."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: list[int]) -> None:
        """One holder less for each of these pages."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
