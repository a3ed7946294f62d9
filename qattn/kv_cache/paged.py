"""A cache in pages that finds prefixes again."""

from __future__ import annotations

from typing import Any

import numpy as np

from qattn import _check, devices
from qattn._backend import as_host
from qattn.cpu.attend_tiles import KEY_BLOCK
from qattn.errors import CacheError
from qattn.kv_cache.base import Array
from qattn.kv_cache.paged_memory import PagedMemory
from qattn.kv_cache.pages import digests
from qattn.kv_cache.params import KVCacheParams


class PagedKVCache(PagedMemory):
    """Keys and values of `sequences` sequences, for one layer, in a pool of `pages` pages.

    Each sequence has a list of pages, its row in the page table.  Sequences that begin alike can have the same pages
    (`fork`, `begin`); one that writes to a page of others gets a copy of it.  All memory is there from the beginning.

    Parameters
    ----------
    params : KVCacheParams
    sequences : int
    pages : int
    page_size : int
        Tokens of a page, a multiple of 128.
    window : int, optional
        For layers whose queries see themselves and at most ``window - 1`` tokens before: pages that no further query
        sees go back to the pool.
    cascade : bool
        Let causal layers read the pages that sequences share once for all of them, as `qattn.cascade` does.
        A token's output then differs by rounding with what is shared.
    device : str
        "cpu", or the GPU whose memory holds it: "cuda:0", …

    Raises
    ------
    DeviceError
        If the device can't be used.

    Examples
    --------
    >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2, pages=4)
    >>> cache.append(np.ones((300, 1, 4)), np.zeros((300, 1, 4)))
    >>> cache
    PagedKVCache(2 sequences, tokens: 300, 0, bfloat16, 0.0 MB, 1 of 4 pages free)
    """

    def __init__(
        self,
        params: KVCacheParams,
        sequences: int = 1,
        *,
        pages: int,
        page_size: int = KEY_BLOCK,
        window: int | None = None,
        cascade: bool = False,
        device: str = "cpu",
    ) -> None:
        super().__init__(params, sequences, pages, page_size, window, device)
        self.cascade = cascade

    # Prefixes

    def match(self, tokens: Any) -> int:
        """How many of a prompt's first tokens `begin` would find: whole pages, and never the last token.

        Parameters
        ----------
        tokens : (tokens,) integers

        Examples
        --------
        >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), pages=8)
        >>> cache.append(np.ones((300, 1, 4)), np.zeros((300, 1, 4)))
        >>> cache.release(0, np.arange(300))
        >>> cache.match(np.arange(200)), cache.match(np.arange(1000)), cache.match(np.arange(1, 300))
        (128, 256, 0)
        """
        return self._match(_ids(tokens))[0]

    def _match(self, tokens: Array) -> tuple[int, int, list[int]]:
        """The length of the longest known prefix, the first token of it that is needed, and pages from there on."""
        given = tokens[:-1][: self.params.max_length]
        found = [self._pool.find(digest) for digest in digests(given, self.page_size)]
        for length in range(len(found) * self.page_size, 0, -self.page_size):
            start = int(self._passed(np.array([length]))[0])
            pages = found[start // self.page_size : length // self.page_size]
            known = [page for page in pages if page is not None]
            if len(known) == len(pages):
                return length, start, known
        return 0, 0, []

    def begin(self, sequence: int, tokens: Any) -> int:
        """Let a sequence begin with the longest known prefix of a prompt, and forget what it had.

        What is known is what `remember` or `release` was told, unless other sequences have needed the pages.

        Parameters
        ----------
        sequence : int
        tokens : (tokens,) integers
            The ids of the prompt.

        Returns
        -------
        int
            Tokens that the sequence has now.  The others are for the caller to compute, the last one in any case, since
            its output is needed.

        Examples
        --------
        >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2, pages=8)
        >>> prompt = np.arange(300)
        >>> cache.append(np.ones((300, 1, 4)), np.zeros((300, 1, 4)))
        >>> cache.release(0, prompt)
        >>> cache.begin(1, prompt), cache.lengths
        (256, array([  0, 256]))
        """
        self._check(sequence)
        length, start, pages = self._match(_ids(tokens))
        for page in pages:  # which may be the sequence's own
            self._pool.share(page)
        self.reset(sequence)
        self._join(sequence, start, pages)
        for page in pages:
            self._pool.give_back(page)
        self.starts[sequence] = start
        self._set_length(sequence, length)
        return length

    def remember(self, sequence: int, tokens: Any) -> None:
        """Let the full pages of a sequence be found as prefixes, while it lasts and afterwards.

        Parameters
        ----------
        sequence : int
        tokens : (tokens,) integers
            The ids of its tokens, from the first on.  Ids behind those that it has count for nothing, and neither do
            tokens that were edited, or lie at other positions than their own.

        Examples
        --------
        >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2, pages=8)
        >>> cache.append(np.ones((128, 1, 4)), np.zeros((128, 1, 4)))
        >>> cache.remember(0, np.arange(128))
        >>> cache.begin(1, np.arange(200)), cache.free_pages
        (128, 7)
        """
        ids, positions = _ids(tokens), self.positions(sequence)
        others = np.flatnonzero(positions != np.arange(len(positions)))
        sound = min(int(self._edited[sequence]), *others[:1].tolist(), len(positions))
        names = digests(ids[:sound], self.page_size)
        for i in range(int(self.starts[sequence]) // self.page_size, len(names)):
            self._pool.index(int(self._table.rows[sequence, i]), names[i])

    def release(self, sequence: int, tokens: Any = None) -> None:
        """Forget a sequence, but let prompts that begin alike find its full pages, until others need them.

        The pages that were used last are the last to be taken.

        Parameters
        ----------
        sequence : int
        tokens : (tokens,) integers, optional
            As of `remember`; without them only what was remembered before is found.

        Examples
        --------
        >>> cache.release(0, ids)                                       # doctest: +SKIP
        """
        if tokens is not None:
            self.remember(sequence, tokens)
        self.reset(sequence)

    # The pool

    def defragment(self) -> int:
        """Move the pages of sequences, in order, to the beginning of the pool → how many pages have moved.

        Examples
        --------
        >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2, pages=4)
        >>> for sequence in range(2):
        ...     cache.append(np.ones((128, 1, 4)), np.zeros((128, 1, 4)), sequence)
        >>> cache.reset(0)
        >>> cache.defragment()
        1
        """
        order = self._rearrange(self.pages)
        with devices.current(self.device):
            for array in self._arrays:
                array[: len(order)] = array[devices.asarray(np.array(order, np.int64), self.device)]
        return sum(new != old for new, old in enumerate(order))

    def resize(self, pages: int) -> None:
        """Give the pool another number of pages.  Meanwhile there is memory for both.

        Raises
        ------
        CacheError
            If sequences have more.

        Examples
        --------
        >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), pages=4)
        >>> cache.resize(8)
        >>> cache.free_pages
        8
        """
        _check.at_least("pages", pages, 1)
        used = self.pages - self.free_pages
        if pages < used:
            raise CacheError(f"pages is {pages}; sequences have {used}")
        memory, before = self._layout.room(self.params, int(pages), self.page_size), self._arrays
        order = self._rearrange(int(pages))
        self._keys, self._values = memory
        with devices.current(self.device):
            for array, old in zip(self._arrays, before, strict=True):
                array[: len(order)] = old[devices.asarray(np.array(order, np.int64), self.device)]

    def _rearrange(self, pages: int) -> list[int]:
        """Number pages anew, those of sequences first → the old numbers of those that hold something."""
        used = list(dict.fromkeys(page for s in range(self.sequences) for page in self._pages_of(s)))
        numbers = np.zeros(self.pages, np.int64)
        numbers[used] = np.arange(len(used))
        self._pool, order = self._pool.rearranged(used, pages)
        for s in range(self.sequences):
            self._table.put(s, int(self.starts[s]) // self.page_size, numbers[self._pages_of(s)].tolist())
        self._table.tell()
        return order


def _ids(tokens: Any) -> Array:
    """Check token ids → (tokens,) int64."""
    ids = as_host(tokens, "tokens")
    _check.shape("tokens", ids, ("tokens",))
    if ids.dtype.kind not in "iu" and ids.size:
        raise ValueError(f"tokens have dtype {ids.dtype}; expected integers")
    return ids.astype(np.int64)
