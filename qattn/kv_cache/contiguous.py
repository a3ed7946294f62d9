"""A cache that holds each sequence in one piece, and grows by doubling."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qattn.cpu.attention import CacheView, pack
from qattn.cpu.simd import LANES
from qattn.errors import CacheError

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
    """

    def __init__(self, params: KVCacheParams, sequences: int = 1) -> None:
        if operator.index(sequences) < 1:
            raise ValueError(f"sequences is {sequences}; expected at least 1")
        self.params = params
        self.sequences = sequences
        self.lengths: Array = np.zeros(sequences, np.int64)
        self._keys, self._values = self._tiles(0)

    def _tiles(self, count: int) -> tuple[Array, Array]:
        p = self.params
        packed = pack(p.kind)
        element = np.float32 if p.kind == "f32" else np.uint16
        key_size = -(-p.head_dim // packed) * packed * LANES
        value_size = -(-p.values // LANES) * LANES * LANES
        heads = (self.sequences, p.n_kv_heads, count)
        return np.zeros((*heads, key_size), element), np.zeros((*heads, value_size), element)

    def __len__(self) -> int:
        if self.sequences > 1:
            raise TypeError(f"a cache of {self.sequences} sequences has no single length; see its lengths")
        return int(self.lengths[0])

    @property
    def capacity(self) -> int:
        """Tokens of a sequence for which there is memory now."""
        return self._keys.shape[2] * LANES

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self._keys.nbytes + self._values.nbytes

    def __repr__(self) -> str:
        tokens = ", ".join(map(str, self.lengths[:8])) + (", …" if self.sequences > 8 else "")
        return f"KVCache({self.sequences} sequences, tokens: {tokens}, {self.params.dtype}, {self.nbytes / 1e6:.1f} MB)"

    def view(self) -> CacheView:
        """The tiles, for kernels."""
        return CacheView(self._keys, self._values, self.params.head_dim, self.params.values)

    def reserve(self, lengths: Array) -> None:
        """Make room for sequences of these lengths.

        Raises
        ------
        CacheError
            If one is longer than `max_length`.  The cache is as it was.
        """
        need, limit = int(lengths.max(initial=0)), self.params.max_length
        if limit is not None and need > limit:
            slot = int(lengths.argmax())
            raise CacheError(
                f"sequence {slot} would have {need} tokens, but the cache holds at most {limit} "
                f"(it has {self.lengths[slot]}); reset() it, or make it with a larger max_length"
            )
        if need > self.capacity:
            tiles = max(-(-need // LANES), 2 * self._keys.shape[2])
            if limit is not None:
                tiles = min(tiles, -(-limit // LANES))
            keys, values = self._tiles(tiles)
            used = self._keys.shape[2]
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
        keys, values = self.read(sequence) if length % LANES else (None, None)
        self.lengths[sequence] = length
        if keys is not None and values is not None:  # kernels rely on zeros behind the last key of a tile
            start = length // LANES * LANES
            kept_keys, kept_values = keys[start:length].copy(), values[start:length].copy()
            self._keys[sequence, :, length // LANES], self._values[sequence, :, length // LANES] = 0, 0
            self._write(sequence, start, kept_keys, kept_values)

    def reset(self, sequence: int | None = None) -> None:
        """Forget all tokens of one sequence, or of all."""
        if sequence is None:
            self.lengths[:] = 0
        else:
            self._check(sequence)
            self.lengths[sequence] = 0

    def read(self, sequence: int = 0, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """Copies of the cached keys (tokens, n_kv_heads, head_dim) and values (tokens, n_kv_heads, value_dim), float32.

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
        p, packed = self.params, pack(self.params.kind)
        tiles = slice(start // LANES, -(-stop // LANES))
        keys, values = (self._widen(a[sequence, :, tiles]) for a in (self._keys, self._values))
        heads, count = keys.shape[:2]
        pairs, slices = -(-p.head_dim // packed), -(-p.values // LANES)
        keys = keys.reshape(heads, count, pairs, LANES, packed).transpose(1, 3, 0, 2, 4)
        keys = keys.reshape(count * LANES, heads, pairs * packed)[..., : p.head_dim]
        values = values.reshape(heads, count, slices, LANES // packed, LANES, packed).transpose(1, 3, 5, 0, 2, 4)
        values = values.reshape(count * LANES, heads, slices * LANES)[..., : p.values]
        skip = tiles.start * LANES
        return keys[start - skip : stop - skip], values[start - skip : stop - skip]

    def _widen(self, tiles: Array) -> Array:
        if self.params.kind == "f32":
            return tiles
        if self.params.kind == "f16":
            return tiles.view(np.float16).astype(np.float32)
        return (tiles.astype(np.uint32) << 16).view(np.float32)

    def _write(self, sequence: int, start: int, keys: Array, values: Array) -> None:
        """Put float32 values that were read from the cache back; exact."""
        p, packed = self.params, pack(self.params.kind)
        for i, (key, value) in enumerate(zip(self._narrow(keys), self._narrow(values), strict=True)):
            tile, lane = (start + i) // LANES, (start + i) % LANES
            k = self._keys[sequence, :, tile].reshape(p.n_kv_heads, -1, LANES, packed)
            padded = np.zeros((p.n_kv_heads, k.shape[1] * packed), k.dtype)
            padded[:, : p.head_dim] = key
            k[:, :, lane] = padded.reshape(p.n_kv_heads, -1, packed)
            v = self._values[sequence, :, tile].reshape(p.n_kv_heads, -1, LANES // packed, LANES, packed)
            padded = np.zeros((p.n_kv_heads, v.shape[1] * LANES), v.dtype)
            padded[:, : p.values] = value
            v[:, :, lane // packed, :, lane % packed] = padded.reshape(p.n_kv_heads, -1, LANES)

    def _narrow(self, x: Array) -> Array:
        if self.params.kind == "f32":
            return x
        if self.params.kind == "f16":
            return x.astype(np.float16).view(np.uint16)
        return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)

    def _check(self, sequence: int) -> None:
        if not 0 <= operator.index(sequence) < self.sequences:
            raise CacheError(f"there is no sequence {sequence}; the cache has {self.sequences}")
