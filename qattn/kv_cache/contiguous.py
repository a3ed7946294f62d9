"""A cache that holds each sequence in one piece, and grows by doubling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qattn import devices
from qattn.kv_cache.base import Array
from qattn.kv_cache.params import KVCacheParams
from qattn.kv_cache.sequences import SequenceCache


class KVCache(SequenceCache):
    """Keys and values of `sequences` sequences, for one layer: one page each.

    ``len(cache)`` is the number of tokens of the only sequence, `lengths` those of all.  Keys are stored rotated.

    Parameters
    ----------
    params : KVCacheParams
    sequences : int
    device : str
        "cpu", or the GPU whose memory holds it: "cuda:0", …

    Raises
    ------
    DeviceError
        If the device can't be used.

    Examples
    --------
    >>> cache = KVCache(KVCacheParams(n_kv_heads=2, head_dim=64, dtype="float16"))
    >>> y = attn(x, kv_cache=cache)                                     # doctest: +SKIP
    """

    def __init__(self, params: KVCacheParams, sequences: int = 1, *, device: str = "cpu") -> None:
        super().__init__(params, sequences, device)
        self._pages: Any = devices.asarray(np.arange(sequences)[:, None], self.device)
        self._keys, self._values = self._layout.room(params, sequences, 0)

    @property
    def capacity(self) -> int:
        return int(self._keys.shape[2]) * self._layout.step

    def view(self) -> Any:
        return self._layout.view(self.params, self._keys, self._values, self._pages)

    def reserve(self, lengths: Array) -> None:
        self._check_limit(lengths)
        need, limit, unit = int(lengths.max(initial=0)), self.params.max_length, self._layout.unit
        if need > self.capacity:
            capacity = max(need, 2 * self.capacity)
            if limit is not None:
                capacity = min(capacity, limit)
            before = self._arrays
            self._keys, self._values = self._layout.room(self.params, self.sequences, -(-capacity // unit) * unit)
            with devices.current(self.device):
                for array, old in zip(self._arrays, before, strict=True):
                    array[:, :, : old.shape[2]] = old

    def _pieces(self, sequence: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        if start < stop:
            yield sequence, start, stop

    def _claim(self, sequence: int, start: int, stop: int) -> None:
        pass  # each sequence has its own memory

    def _cut(self, sequence: int, length: int) -> None:
        if length < self.lengths[sequence]:
            self._layout.forget(self.params, self._keys, self._values, sequence, length)

    def _replace(self, sequences: list[int], starts: list[int], lengths: list[int]) -> None:
        new = self.lengths.copy()
        new[sequences] = lengths
        self.reserve(new)
