"""Memory in pages: a pool of them for all sequences, which share them as far as they are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from qattn import _check, devices
from qattn.cpu.attend_tiles import KEY_BLOCK
from qattn.errors import CacheError
from qattn.kv_cache.base import Array
from qattn.kv_cache.pages import PagePool, PageTable
from qattn.kv_cache.params import KVCacheParams
from qattn.kv_cache.sequences import SequenceCache


class PagedMemory(SequenceCache):
    """A cache whose sequences have lists of pages, and a copy of a page before they write to one of others."""

    def __init__(
        self, params: KVCacheParams, sequences: int, pages: int, page_size: int, window: int | None, device: str
    ) -> None:
        super().__init__(params, sequences, device)
        _check.at_least("pages", pages, 1)
        _check.at_least("page_size", page_size, KEY_BLOCK)
        if page_size % KEY_BLOCK:
            raise ValueError(f"page_size is {page_size}; expected a multiple of {KEY_BLOCK}")
        if window is not None:
            _check.at_least("window", window, 1)
        self.page_size, self.window = int(page_size), window
        self._pool, self._table = PagePool(int(pages)), PageTable(sequences, self.device)
        self._keys, self._values = self._layout.room(params, self.pages, self.page_size)

    @property
    def pages(self) -> int:
        """Pages of the pool."""
        return len(self._pool)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has; they may hold prefixes that are still found."""
        return self._pool.idle

    @property
    def table(self) -> Array:
        """The page table, (sequences, entries) int64 on the host: entry i has tokens i · page_size and following."""
        return self._table.rows

    @property
    def capacity(self) -> int:
        return int(self._table.rows.shape[1]) * self.page_size

    def _details(self) -> str:
        return f", {self.free_pages} of {self.pages} pages free"

    def view(self) -> Any:
        return self._layout.view(self.params, self._keys, self._values, self._table.on_device)

    def reserve(self, lengths: Array) -> None:
        self._check_limit(lengths)
        grows, rows, held = lengths > self.lengths, self._table.rows, self._table.held
        entry, part = np.divmod(self.lengths, self.page_size)
        page = rows[np.arange(self.sequences), np.minimum(entry, rows.shape[1] - 1)]
        own = (self._pool.references[page] == 1) & ~self._pool.indexed[page]
        ready = (-(-lengths // self.page_size) <= held) & (own | (part == 0))
        passed = self._passed(self.lengths) > self.starts
        if (grows & (passed | ~ready)).any():
            self._prepare([(s, int(self.lengths[s]), int(lengths[s])) for s in np.flatnonzero(grows).tolist()])

    def _seen(self, lengths: Array) -> Array:
        return np.zeros_like(lengths) if self.window is None else np.maximum(lengths - self.window + 1, 0)

    def _passed(self, lengths: Array) -> Array:
        """The first token of the first page of which tokens behind so many may see anything."""
        return self._seen(lengths) // self.page_size * self.page_size

    def _claim(self, sequence: int, start: int, stop: int) -> None:
        self._prepare([(sequence, start, stop)], leave=False)

    def _prepare(self, spans: list[tuple[int, int, int]], leave: bool = True) -> None:
        """Give sequences pages of their own for tokens start … stop - 1, and back what they have passed; or raise."""
        size, rows, held = self.page_size, self._table.rows, self._table.held
        passed = self._passed(self.lengths) if leave else self.starts
        leaving: Counter[int] = Counter()
        for s, _, _ in spans:
            leaving.update(rows[s, self.starts[s] // size : passed[s] // size].tolist())
        room, new, copies = self._pool.idle + self._pool.freed(leaving), 0, []
        for s, start, stop in spans:
            end = -(-stop // size)
            new += max(0, end - int(held[s]))
            for i in range(start // size, min(end, int(held[s]))):
                page = int(rows[s, i])
                if self._pool.references[page] - leaving[page] > 1:
                    leaving[page] += 1
                    copies.append((s, i, start))
        self._check_pages(new + len(copies), room)
        for s, _, _ in spans:
            self._leave(s, int(self.starts[s]) // size, int(passed[s]) // size)
            self.starts[s] = max(self.starts[s], passed[s])
        for s, i, start in copies:
            self._copy_page(s, i, start)
        for s, start, stop in spans:
            for page in self._table.rows[s, start // size : min(-(-stop // size), int(held[s]))].tolist():
                self._pool.forget(page)
            self._table.put(s, int(held[s]), [self._pool.take() for _ in range(int(held[s]), -(-stop // size))])
        self._table.tell()

    def _check_pages(self, needed: int, room: int) -> None:
        if needed > room:
            raise CacheError(
                f"{needed} more pages of {self.page_size} tokens are needed, and {room} of {self.pages} are free; "
                "release() or reset() sequences, or resize() the cache"
            )

    def _copy_page(self, sequence: int, i: int, start: int) -> None:
        """Give a sequence its own copy of page i, to write to from token `start` of the sequence on."""
        shared, own = int(self._table.rows[sequence, i]), self._pool.take()
        with devices.current(self.device):
            for array in self._arrays:
                array[own] = array[shared]
        if start == self.lengths[sequence]:
            self._layout.forget(self.params, self._keys, self._values, own, start % self.page_size)
        self._pool.give_back(shared)
        self._table.rows[sequence, i] = own

    def _leave(self, sequence: int, first: int, end: int) -> None:
        """Give back the pages of entries; the last page first, since prefixes are of no use without their beginning."""
        for page in self._table.rows[sequence, first:end][::-1].tolist():
            self._pool.give_back(page)
        self._table.rows[sequence, first : max(first, end)] = 0

    def _pieces(self, sequence: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            entry, first = divmod(start, self.page_size)
            end = min(self.page_size, first + stop - start)
            yield int(self._table.rows[sequence, entry]), first, end
            start += end - first

    def _pages_of(self, sequence: int) -> list[int]:
        first = int(self.starts[sequence]) // self.page_size
        return self._table.rows[sequence, first : self._table.held[sequence]].tolist()

    def _cut(self, sequence: int, length: int) -> None:
        keep, part = -(-length // self.page_size), length % self.page_size
        held = int(self._table.held[sequence])
        self._leave(sequence, max(keep, int(self.starts[sequence]) // self.page_size), held)
        self._table.held[sequence] = min(keep, held)
        if length == 0:
            self.starts[sequence] = 0
        if part and length < self.lengths[sequence]:
            page = int(self._table.rows[sequence, keep - 1])
            if self._pool.is_own(page):
                self._layout.forget(self.params, self._keys, self._values, page, part)
        self._table.tell()

    def _replace(self, sequences: list[int], starts: list[int], lengths: list[int]) -> None:
        size, new = self.page_size, self.lengths.copy()
        new[sequences] = lengths
        self._check_limit(new)
        leaving = Counter(page for s in sequences for page in self._pages_of(s))
        needed = sum(-(-length // size) - start // size for start, length in zip(starts, lengths, strict=True))
        self._check_pages(needed, self._pool.idle + self._pool.freed(leaving))
        for s in sequences:
            self.truncate(0, s)
        for s, start, length in zip(sequences, starts, lengths, strict=True):
            self.starts[s] = start
            self._table.put(s, start // size, [])
            self._set_length(s, start)
            self._prepare([(s, start, length)])

    # Sharing

    def _share(self, source: int, target: int, start: int, stop: int) -> bool:
        size, before = self.page_size, int(self.lengths[target])
        if start % size or before % size:
            return False
        new = self.lengths.copy()
        new[target] = before + stop - start
        self._check_limit(new)
        self._cut(target, before)  # pages that were reserved
        if start == before == 0:
            self.starts[target] = self.starts[source]
        first = max(start, int(self.starts[source]) // size * size)
        self._join(target, before + first - start, self._table.rows[source, first // size : -(-stop // size)].tolist())
        self._set_length(target, int(new[target]))
        return True

    def _join(self, sequence: int, start: int, pages: list[int]) -> None:
        """Let a sequence have pages of others from token `start` on."""
        for page in pages:
            self._pool.share(page)
        self._table.put(sequence, start // self.page_size, pages)
        self._table.tell()

    def _splice(self, sequence: int, start: int, stop: int) -> bool:
        size = self.page_size
        if start % size or stop % size:
            return False
        for page in self._table.take_out(sequence, start // size, stop // size)[::-1]:
            self._pool.give_back(page)
        self._table.tell()
        self._set_length(sequence, int(self.lengths[sequence]) - (stop - start))
        return True
