"""A cache that holds each sequence in one piece, and grows by doubling."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qattn import devices
from qattn.errors import CacheError
from qattn.kv_cache.layouts import layout_for

_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class KVCacheParams:
    """What a cache stores for one layer.

    Parameters
    ----------
    n_kv_heads, head_dim : int
        KV heads, and elements of a key.
    value_dim : int, optional
        Elements of a value, if other than `head_dim`.
    dtype : "float32", "float16" or "bfloat16"
        What keys and values are rounded to.
    max_length : int, optional
        Tokens that a sequence can have.  Without it, the cache grows as long as there is memory.
    """

    n_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    dtype: str = "bfloat16"
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_kv_heads", "head_dim", "value_dim", "max_length"):
            value = getattr(self, name)
            if value is not None and operator.index(value) < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        dtype = self.dtype if isinstance(self.dtype, str) else np.dtype(self.dtype).name
        if dtype not in _KINDS:
            raise ValueError(f"dtype is {dtype!r}; a cache stores {', '.join(_KINDS)}")
        object.__setattr__(self, "dtype", dtype)

    @property
    def kind(self) -> str:
        """The element type as kernels call it."""
        return _KINDS[self.dtype]

    @property
    def values(self) -> int:
        """Elements of a value."""
        return self.value_dim or self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes."""
        return self.n_kv_heads * (self.head_dim + self.values) * (4 if self.kind == "f32" else 2)


class KVCache:
    """Keys and values of `sequences` sequences, for one layer.

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
    """

    def __init__(self, params: KVCacheParams, sequences: int = 1, *, device: str = "cpu") -> None:
        if operator.index(sequences) < 1:
            raise ValueError(f"sequences is {sequences}; expected at least 1")
        self.params = params
        self.sequences = sequences
        self.device = devices.resolve(device)
        self.lengths: Array = np.zeros(sequences, np.int64)
        self.counts: Any = self.lengths if self.device == "cpu" else devices.asarray(self.lengths, self.device)
        """The lengths that kernels read and update: `lengths` itself on a CPU, and on a GPU an array there."""
        self.slots: Any = devices.asarray(np.arange(sequences), self.device)
        """(sequences,) int64, for kernels: each sequence lies at its own number."""
        self._layout = layout_for(self.device)
        self._keys, self._values = self._layout.room(params, sequences, 0)

    def __len__(self) -> int:
        if self.sequences > 1:
            raise TypeError(f"a cache of {self.sequences} sequences has no single length; see its lengths")
        return int(self.lengths[0])

    @property
    def capacity(self) -> int:
        """Tokens of a sequence for which there is memory now."""
        return int(self._keys.shape[2]) * (self._layout.unit if self.device == "cpu" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return int(self._keys.nbytes + self._values.nbytes)

    def __repr__(self) -> str:
        tokens = ", ".join(map(str, self.lengths[:8])) + (", …" if self.sequences > 8 else "")
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        size = f"{self.nbytes / 1e6:.1f} MB"
        return f"KVCache({self.sequences} sequences, tokens: {tokens}, {self.params.dtype}, {size}{where})"

    def view(self) -> Any:
        """The memory, for kernels."""
        return self._layout.view(self.params, self._keys, self._values)

    def reserve(self, lengths: Array) -> None:
        """Make room for sequences of these lengths.

        Raises
        ------
        CacheError
            If one is longer than `max_length`.  The cache is as it was.
        """
        need, limit, unit = int(lengths.max(initial=0)), self.params.max_length, self._layout.unit
        if limit is not None and need > limit:
            slot = int(lengths.argmax())
            raise CacheError(
                f"sequence {slot} would have {need} tokens, but the cache holds at most {limit} "
                f"(it has {self.lengths[slot]}); reset() it, or make it with a larger max_length"
            )
        if need > self.capacity:
            capacity = max(need, 2 * self.capacity)
            if limit is not None:
                capacity = min(capacity, limit)
            keys, values = self._layout.room(self.params, self.sequences, -(-capacity // unit) * unit)
            used = self._keys.shape[2]
            with devices.current(self.device):
                keys[:, :, :used], values[:, :, :used] = self._keys, self._values
            self._keys, self._values = keys, values

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Keep the first `length` tokens of a sequence and forget the rest.

        Raises
        ------
        CacheError
            If it has fewer.
        """
        self._check(sequence)
        if not 0 <= length <= self.lengths[sequence]:
            raise CacheError(f"length is {length}; sequence {sequence} has {self.lengths[sequence]} tokens")
        if length < self.lengths[sequence]:
            self._layout.forget(self.params, self._keys, self._values, sequence, length)
        self.lengths[sequence] = length
        if self.device != "cpu":
            with devices.current(self.device):
                self.counts[sequence] = length

    def note(self, lengths: Array) -> None:
        """Take note of the lengths that kernels have brought about: those of a GPU tell only the GPU."""
        self.lengths[:] = lengths

    def reset(self, sequence: int | None = None) -> None:
        """Forget all tokens of one sequence, or of all."""
        for each in range(self.sequences) if sequence is None else [sequence]:
            self.truncate(0, each)

    def read(self, sequence: int = 0, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """Copies of the cached keys (tokens, n_kv_heads, head_dim) and values (tokens, n_kv_heads, value_dim).

        They are float32, and NumPy arrays wherever the cache is.

        Raises
        ------
        CacheError
            If the sequence has no token `stop` - 1.
        """
        self._check(sequence)
        length = int(self.lengths[sequence])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise CacheError(f"tokens {start} to {stop} of sequence {sequence} were asked for; it has {length}")
        return self._layout.read(self.params, self._keys, self._values, sequence, start, stop)

    def _check(self, sequence: int) -> None:
        if not 0 <= operator.index(sequence) < self.sequences:
            raise CacheError(f"there is no sequence {sequence}; the cache has {self.sequences}")
