"""How keys and values lie in memory: in tiles for the kernels of a CPU, in rows for those of a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from qattn import devices
from qattn._backend import as_host
from qattn.cache_types import BLOCK, CacheType, stride
from qattn.cpu.attend_codes import cell_bytes
from qattn.cpu.attend_tiles import pack
from qattn.cpu.attention import CacheView
from qattn.cpu.scratch import zeros
from qattn.cpu.simd import LANES
from qattn.layout import PLANES

Array = np.ndarray[Any, Any]


class Layout(Protocol):
    """The memory of one kind of device; `params` is a `KVCacheParams`."""

    unit: int
    """Tokens that memory comes in."""
    step: int
    """Tokens of an entry of the arrays' third axis."""

    def entries(self, params: Any) -> list[tuple[str, int]]:
        """Of keys and of values the type of their array's elements, and how many an entry has."""

    def room(self, params: Any, sequences: int, capacity: int) -> tuple[Any, Any]:
        """Zeroed arrays for keys and values, whose third axis counts `capacity` tokens in units."""

    def view(self, params: Any, keys: Any, values: Any, pages: Any) -> Any:
        """What kernels receive; pages (sequences, pages of each) int64."""

    def read(self, params: Any, keys: Any, values: Any, sequence: int, start: int, stop: int) -> tuple[Array, Array]:
        """Copies of tokens start … stop - 1: (tokens, n_kv_heads, head_dim) and (…, value_dim), float32, on the CPU.

        The arrays may be on the CPU, too, whatever the device is.
        """

    def forget(self, params: Any, keys: Any, values: Any, sequence: int, length: int) -> None:
        """Prepare the memory behind the first `length` tokens for others."""


class Tiles:
    """Tiles of 16 tokens, see `qattn.cpu.attention` and `qattn.cpu.attend_codes`.

    What lies behind the last token of a tile is zero, of codes at least their scales and offsets.
    """

    unit = step = LANES

    def entries(self, params: Any) -> list[tuple[str, int]]:
        sizes = ((params.key_type, params.head_dim, 1), (params.value_type, params.values, LANES))
        return [(_element(each[0]), _tile_size(*each)) for each in sizes]

    def room(self, params: Any, sequences: int, capacity: int) -> tuple[Array, Array]:
        shape = (sequences, params.n_kv_heads, capacity // LANES)
        keys, values = (zeros((*shape, size), np.dtype(element)) for element, size in self.entries(params))
        return keys, values

    def view(self, params: Any, keys: Array, values: Array, pages: Array) -> CacheView:
        return CacheView(keys, values, params.head_dim, params.values, pages)

    def read(
        self, params: Any, keys: Array, values: Array, sequence: int, start: int, stop: int
    ) -> tuple[Array, Array]:
        tiles = slice(start // LANES, -(-stop // LANES))
        skip, both = tiles.start * LANES, []
        for array, type_, size, of_keys in (
            (keys, params.key_type, params.head_dim, True), (values, params.value_type, params.values, False)
        ):  # fmt: skip
            taken = (_codes if type_.in_blocks else _floats)(array[sequence, :, tiles], type_, of_keys)
            taken = taken[start - skip : stop - skip, :, :size]
            both.append(hadamard(taken) if params.hadamard else taken)
        return both[0], both[1]

    def forget(self, params: Any, keys: Array, values: Array, sequence: int, length: int) -> None:
        tile, kept = divmod(length, LANES)
        if not kept:
            return  # the first write to a tile clears it
        for array, type_, of_keys in ((keys, params.key_type, True), (values, params.value_type, False)):
            there, packed = array[sequence, :, tile], pack(type_.kind)
            if type_.in_blocks:
                cells = there.shape[1] // _cell_size(type_)
                there[:, cells * cell_bytes(type_) :].view(np.uint16).reshape(len(there), -1, LANES)[..., kept:] = 0
            elif of_keys:
                there.reshape(len(there), -1, LANES, packed)[:, :, kept:] = 0
            else:
                pairs = there.reshape(len(there), -1, LANES // packed, LANES, packed)
                pairs[:, :, -(-kept // packed) :] = 0
                pairs[:, :, kept // packed, :, kept % packed :] = 0


def _cell_size(type_: CacheType) -> int:
    """Bytes of 32 elements of 16 tokens."""
    return LANES * type_.block_bytes


def _tile_size(type_: CacheType, size: int, unit: int) -> int:
    """Elements of a tile of an array, of keys or values of `size` elements, floats in multiples of `unit`."""
    if type_.in_blocks:
        return -(-size // BLOCK) * _cell_size(type_)
    unit = max(unit, pack(type_.kind))
    return -(-size // unit) * unit * LANES


def _element(type_: CacheType) -> str:
    return {32: "<f4", 16: "<u2"}.get(type_.bits, "|u1")


def _floats(tiles: Array, type_: CacheType, of_keys: bool) -> Array:
    """Tiles (heads, tiles, …) of floats → (tokens, heads, elements, padded) float32."""
    packed, (heads, count) = pack(type_.kind), tiles.shape[:2]
    tiles = _widened(tiles, type_.kind)
    if of_keys:
        tiles = tiles.reshape(heads, count, -1, LANES, packed).transpose(1, 3, 0, 2, 4)
    else:
        tiles = tiles.reshape(heads, count, -1, LANES // packed, LANES, packed).transpose(1, 3, 5, 0, 2, 4)
    return tiles.reshape(count * LANES, heads, -1)


def _codes(tiles: Array, type_: CacheType, of_keys: bool) -> Array:
    """The same for tiles of codes."""
    (heads, count), cells, size = tiles.shape[:2], tiles.shape[2] // _cell_size(type_), cell_bytes(type_)
    factors = np.ascontiguousarray(tiles[:, :, cells * size :]).view(np.float16).astype(np.float32)
    factors = factors.reshape(heads, count, -1, cells, LANES).transpose(2, 1, 4, 0, 3)[..., None]
    planes, low = tiles[:, :, : cells * size].reshape(heads, count, cells, -1, 64), 0
    codes: Any = None
    for plane in PLANES[type_.bits]:
        shifts = np.arange(0, 8, plane, dtype=np.uint8)[:, None]
        vectors, planes = planes[:, :, :, :plane], planes[:, :, :, plane:]
        part = (vectors[:, :, :, :, None] >> shifts & ((1 << plane) - 1)).reshape(heads, count, cells, 8, LANES, 4)
        codes, low = part if codes is None else codes | part << low, low + plane
    if of_keys:  # quads of elements, lanes of keys
        codes = codes.transpose(1, 4, 0, 2, 3, 5)
    else:  # halves of elements, quads of values, lanes of elements
        codes = codes.reshape(heads, count, cells, 2, 4, LANES, 4).transpose(1, 4, 6, 0, 2, 3, 5)
    codes = codes.reshape(count, LANES, heads, cells, BLOCK)
    values = _levels(codes, type_) * factors[0]
    values = values + factors[1] if type_.offset else values
    return values.reshape(count * LANES, heads, cells * BLOCK)


def hadamard(x: Array) -> Array:
    """x (…, n) float32 times the Walsh-Hadamard matrix of the largest power of two that divides n, block by block."""
    size, step = x.shape[-1] & -x.shape[-1], 1
    while step < size:
        pairs = x.reshape(*x.shape[:-1], -1, 2, step)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x, step = np.stack([low + high, low - high], axis=-2).reshape(x.shape), 2 * step
    return x * np.float32(size**-0.5)


class Rows:
    """(sequences, n_kv_heads, tokens, row), see `qattn.cuda.attention` and `qattn.cuda.attend_codes`."""

    unit, step = 64, 1

    def __init__(self, device: str) -> None:
        self._device = device

    def entries(self, params: Any) -> list[tuple[str, int]]:
        sizes = ((params.key_type, params.head_dim), (params.value_type, params.values))
        return [("<f2" if type_.kind == "f16" else _element(type_), stride(type_.kind, size)) for type_, size in sizes]

    def room(self, params: Any, sequences: int, capacity: int) -> tuple[Any, Any]:
        xp, shape = devices.namespace(self._device), (sequences, params.n_kv_heads, capacity)
        with devices.current(self._device):
            keys, values = (xp.zeros((*shape, size), np.dtype(element)) for element, size in self.entries(params))
        return keys, values

    def view(self, params: Any, keys: Any, values: Any, pages: Any) -> Any:
        from qattn.cuda.attention import CacheView

        return CacheView(keys, values, params.head_dim, params.values, pages)

    def read(self, params: Any, keys: Any, values: Any, sequence: int, start: int, stop: int) -> tuple[Array, Array]:
        both = []
        for array, type_, size in (
            (keys, params.key_type, params.head_dim), (values, params.value_type, params.values)
        ):  # fmt: skip
            rows = np.ascontiguousarray(as_host(array[sequence, :, start:stop]).transpose(1, 0, 2))
            taken = _row_codes(rows, type_, size) if type_.in_blocks else _widened(rows, type_.kind)[..., :size]
            both.append(hadamard(taken) if params.hadamard else taken)
        return both[0], both[1]

    def forget(self, params: Any, keys: Any, values: Any, sequence: int, length: int) -> None:
        pass  # kernels know where a sequence ends


def _row_codes(rows: Array, type_: CacheType, size: int) -> Array:
    """Rows (tokens, heads, bytes) → (tokens, heads, size) float32."""
    blocks, code_bytes = -(-size // BLOCK), BLOCK * type_.bits // 8
    factors = rows[..., blocks * code_bytes :][..., : 2 * blocks * (1 + type_.offset)]
    factors = np.ascontiguousarray(factors).view(np.float16).astype(np.float32)[..., None]
    codes = rows[..., : blocks * code_bytes].reshape(*rows.shape[:2], blocks, code_bytes)
    if type_.bits != 8:
        words = np.ascontiguousarray(codes).view("<u4")
        codes = words[..., :4, None] >> _NIBBLES & 15  # octets and their elements
        if type_.bits == 5:
            fifth = words[..., 4:, None] >> (4 * np.arange(4)[:, None] + _FIFTH) & 1
            codes = codes | fifth << 4
    values = _levels(codes.reshape(*rows.shape[:2], blocks, BLOCK), type_) * factors[:, :, :blocks]
    values = values + factors[:, :, blocks:] if type_.offset else values
    return values.reshape(*rows.shape[:2], -1)[..., :size]


_NIBBLES = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)  # where the codes of an octet's elements begin
_FIFTH = np.array([0, 16, 1, 17, 2, 18, 3, 19], np.uint32)  # and where their fifth bits are


def _levels(codes: Array, type_: CacheType) -> Array:
    """What codes stand for, float32."""
    return np.array(type_.table, np.float32)[codes] if type_.table else codes.astype(np.float32) - type_.zero


def _widened(stored: Array, kind: str) -> Array:
    """Floats → float32."""
    if kind == "f32":
        return stored
    if kind == "f16":
        return stored.view(np.float16).astype(np.float32)
    if kind == "f8":  # moved to float16's place, exponents are 8 too small
        word = stored.astype(np.uint16)
        return ((word & 0x80) << 8 | (word & 0x7F) << 7).view(np.float16).astype(np.float32) * np.float32(256)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def layout_for(device: str) -> Layout:
    """The layout of a device's caches."""
    return Tiles() if device == "cpu" else Rows(device)


ALL: tuple[Layout, ...] = (Tiles(), Rows("cpu"))
"""To read what any device has saved."""
