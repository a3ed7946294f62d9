"""Which pages of a pool are in use, by which sequences, and which of the others still hold a known prefix."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from typing import Any

import numpy as np

from qattn import devices
from qattn._changes import Watched

Array = np.ndarray[Any, Any]


class PagePool:
    """References to pages, a list of idle pages in the order in which they will be taken, and an index of prefixes.

    An idle page that holds a known prefix is found again until it is taken, which happens to the page last that was
    used last.
    """

    def __init__(self, pages: int) -> None:
        self.references: Array = np.zeros(pages, np.int64)
        """(pages,) int64: how many sequences have each page."""
        self.indexed: Array = np.zeros(pages, np.bool_)
        """(pages,) bool: which pages hold a prefix that `find` finds."""
        self._idle = OrderedDict.fromkeys(range(pages))
        self._digests: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.references)

    @property
    def idle(self) -> int:
        """Pages that no sequence has."""
        return len(self._idle)

    def take(self) -> int:
        """Give an idle page to a sequence, and forget what it holds."""
        page, _ = self._idle.popitem(last=False)
        self.forget(page)
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Give a page to one more sequence."""
        if not self.references[page]:
            del self._idle[page]
        self.references[page] += 1

    def give_back(self, page: int) -> None:
        """Take a page from a sequence."""
        self.references[page] -= 1
        if not self.references[page]:
            self._idle[page] = None
            self._idle.move_to_end(page, last=bool(self.indexed[page]))

    def freed(self, leaving: Counter[int]) -> int:
        """How many pages would be idle in addition, if so many sequences gave each of them back."""
        return sum(bool(self.references[page] == count) for page, count in leaving.items())

    def is_own(self, page: int) -> bool:
        """Whether a single sequence has a page, and nobody looks for what it holds."""
        return bool(self.references[page] == 1 and not self.indexed[page])

    def index(self, page: int, digest: bytes) -> None:
        """Let a page be found, unless another page holds the same."""
        if digest not in self._found and page not in self._digests:
            self._found[digest], self._digests[page] = page, digest
            self.indexed[page] = True

    def find(self, digest: bytes) -> int | None:
        """The page that holds a prefix."""
        return self._found.get(digest)

    def forget(self, page: int) -> None:
        """Let a page be found no longer."""
        digest = self._digests.pop(page, None)
        if digest is not None:
            del self._found[digest]
            self.indexed[page] = False
            if not self.references[page] and page in self._idle:
                self._idle.move_to_end(page, last=False)

    def rearranged(self, used: list[int], pages: int) -> tuple[PagePool, list[int]]:
        """A pool of so many pages: first those in use, in this order, then the known prefixes for which there is room.

        Also returns the old numbers of all that hold something, in the new order.
        """
        known = [page for page in self._idle if self.indexed[page]]
        order = used + known[max(0, len(used) + len(known) - pages) :]
        pool = PagePool(pages)
        pool.references[: len(used)] = self.references[used]
        for new, page in enumerate(order):
            if new < len(used):
                del pool._idle[new]
            else:
                pool._idle.move_to_end(new)
            if page in self._digests:
                pool.index(new, self._digests[page])
        return pool, order


class PageTable(Watched):
    """The pages of each sequence, in order: a row of numbers, on the host and where kernels read it."""

    def __init__(self, sequences: int, device: str) -> None:
        self.rows: Array = np.zeros((sequences, 1), np.int64)
        """(sequences, entries) int64; entries that no query reads are 0."""
        self.held: Array = np.zeros(sequences, np.int64)
        """(sequences,) int64: how many entries of each row count."""
        self._device = device
        self.on_device: Any = devices.asarray(self.rows, device)

    def widen(self, entries: int) -> None:
        """Make rows at least so long."""
        if entries > self.rows.shape[1]:
            rows = np.zeros((len(self.rows), max(entries, 2 * self.rows.shape[1])), np.int64)
            rows[:, : self.rows.shape[1]] = self.rows
            self.rows = rows

    def put(self, sequence: int, first: int, pages: list[int]) -> None:
        """Let a row have these pages from an entry on, and none behind them."""
        self.held[sequence] = first + len(pages)
        self.widen(first + len(pages))
        self.rows[sequence, first : first + len(pages)] = pages

    def take_out(self, sequence: int, first: int, end: int) -> list[int]:
        """Take entries first … end - 1 out of a row, so that those behind them move up → the pages."""
        row, held = self.rows[sequence], int(self.held[sequence])
        pages: list[int] = row[first:end].tolist()
        row[first : held - len(pages)] = row[first + len(pages) : held].copy()
        row[held - len(pages) : held] = 0
        self.held[sequence] = held - len(pages)
        return pages

    def tell(self) -> None:
        """Let kernels know."""
        if self._device == "cpu" or self.on_device.shape != self.rows.shape:
            self.on_device = devices.asarray(self.rows, self._device)
        else:  # recorded kernels have its address
            with devices.current(self._device):
                self.on_device[...] = devices.asarray(self.rows, self._device)


def digests(tokens: Array, page_size: int) -> list[bytes]:
    """A digest for each full page of a prompt, (tokens,) int64, which depends on all tokens up to the page's end."""
    out, last = [], b""
    for first in range(0, len(tokens) - page_size + 1, page_size):
        last = hashlib.blake2b(last + tokens[first : first + page_size].tobytes(), digest_size=16).digest()
        out.append(last)
    return out
