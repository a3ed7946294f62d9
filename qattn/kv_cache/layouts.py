"""How keys and values lie in memory: in tiles for the kernels of a CPU, in rows for those of a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from qattn import devices
from qattn.cpu.attention import CacheView, pack
from qattn.cpu.simd import LANES

Array = np.ndarray[Any, Any]


class Layout(Protocol):
    """The memory of one kind of device; `params` is a `KVCacheParams`."""

    unit: int
    """Tokens that memory comes in."""

    def room(self, params: Any, sequences: int, capacity: int) -> tuple[Any, Any]:
        """Zeroed arrays for keys and values, whose third axis counts `capacity` tokens in units."""

    def view(self, params: Any, keys: Any, values: Any) -> Any:
        """What kernels receive."""

    def read(self, params: Any, keys: Any, values: Any, sequence: int, start: int, stop: int) -> tuple[Array, Array]:
        """Copies of tokens start … stop - 1: (tokens, n_kv_heads, head_dim) and (…, value_dim), float32, on the CPU."""

    def forget(self, params: Any, keys: Any, values: Any, sequence: int, length: int) -> None:
        """Prepare the memory behind the first `length` tokens for others."""


class Tiles:
    """Tiles of 16 tokens, see `qattn.cpu.attention`: what lies behind the last token of a tile is zero."""

    unit = LANES

    def room(self, params: Any, sequences: int, capacity: int) -> tuple[Array, Array]:
        packed = pack(params.kind)
        element = np.float32 if params.kind == "f32" else np.uint16
        key_size = -(-params.head_dim // packed) * packed * LANES
        value_size = -(-params.values // LANES) * LANES * LANES
        heads = (sequences, params.n_kv_heads, capacity // LANES)
        return np.zeros((*heads, key_size), element), np.zeros((*heads, value_size), element)

    def view(self, params: Any, keys: Array, values: Array) -> CacheView:
        return CacheView(keys, values, params.head_dim, params.values)

    def read(
        self, params: Any, keys: Array, values: Array, sequence: int, start: int, stop: int
    ) -> tuple[Array, Array]:
        packed = pack(params.kind)
        tiles = slice(start // LANES, -(-stop // LANES))
        keys, values = (_widened(a[sequence, :, tiles], params.kind) for a in (keys, values))
        heads, count = keys.shape[:2]
        pairs, slices = -(-params.head_dim // packed), -(-params.values // LANES)
        keys = keys.reshape(heads, count, pairs, LANES, packed).transpose(1, 3, 0, 2, 4)
        keys = keys.reshape(count * LANES, heads, pairs * packed)[..., : params.head_dim]
        values = values.reshape(heads, count, slices, LANES // packed, LANES, packed).transpose(1, 3, 5, 0, 2, 4)
        values = values.reshape(count * LANES, heads, slices * LANES)[..., : params.values]
        skip = tiles.start * LANES
        return keys[start - skip : stop - skip], values[start - skip : stop - skip]

    def forget(self, params: Any, keys: Array, values: Array, sequence: int, length: int) -> None:
        tile, kept = divmod(length, LANES)
        if not kept:
            return  # the first write to a tile clears it
        packed, heads = pack(params.kind), params.n_kv_heads
        keys[sequence, :, tile].reshape(heads, -1, LANES, packed)[:, :, kept:] = 0
        pairs = values[sequence, :, tile].reshape(heads, -1, LANES // packed, LANES, packed)
        pairs[:, :, -(-kept // packed) :] = 0
        pairs[:, :, kept // packed, :, kept % packed :] = 0


class Rows:
    """(sequences, n_kv_heads, tokens, head_dim), see `qattn.cuda.attention`; bfloat16 as uint16."""

    unit = 64

    def __init__(self, device: str) -> None:
        self._device = device

    def room(self, params: Any, sequences: int, capacity: int) -> tuple[Any, Any]:
        element = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[params.kind]
        heads, xp = (sequences, params.n_kv_heads, capacity), devices.namespace(self._device)
        with devices.current(self._device):
            return xp.zeros((*heads, params.head_dim), element), xp.zeros((*heads, params.values), element)

    def view(self, params: Any, keys: Any, values: Any) -> Any:
        from qattn.cuda.attention import CacheView

        return CacheView(keys, values, params.head_dim, params.values)

    def read(self, params: Any, keys: Any, values: Any, sequence: int, start: int, stop: int) -> tuple[Array, Array]:
        kept = (devices.copied(a[sequence, :, start:stop], "cpu").transpose(1, 0, 2) for a in (keys, values))
        first, second = (_widened(np.ascontiguousarray(a), params.kind) for a in kept)
        return first, second

    def forget(self, params: Any, keys: Any, values: Any, sequence: int, length: int) -> None:
        pass  # kernels know where a sequence ends


def _widened(stored: Array, kind: str) -> Array:
    """16-bit floats → float32."""
    if kind == "f32":
        return stored
    if kind == "f16":
        return stored.view(np.float16).astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def layout_for(device: str) -> Layout:
    """The layout of a device's caches."""
    return Tiles() if device == "cpu" else Rows(device)
