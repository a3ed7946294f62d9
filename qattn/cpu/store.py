"""The write of one key or value into its tile, see `qattn.cpu.attention` and `qattn.cpu.attend_codes`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qattn import cache_types
from qattn.cache_types import BLOCK, LARGEST_F16, CacheType
from qattn.cpu._jit import generated, helper
from qattn.cpu.attend_codes import SCALES, cell_bytes
from qattn.cpu.attend_tiles import pack
from qattn.cpu.narrow import block_rounder, narrow_kernel
from qattn.cpu.simd import LANES
from qattn.layout import PLANES


class Store(NamedTuple):
    """Compiled functions for one type."""

    room: Callable[..., Any]
    """size → scratch for a key or value of so many elements."""
    put: Callable[..., Any]
    """(x, size, tile, lane, room): write x, float32 padded with zeros to whole blocks of 32, as key or value `lane` of
    a tile."""


@functools.cache
def store(kind: str, of_keys: bool) -> Store:
    """How keys or values of a kind are written."""
    type_ = cache_types.of_kind(kind)
    return _codes(type_, of_keys) if type_.in_blocks else _floats(kind, of_keys)


def _floats(kind: str, of_keys: bool) -> Store:
    narrow, packed, name = narrow_kernel(kind), pack(kind), f"{kind}-{of_keys}"
    element = {"f32": np.float32, "f8": np.uint8}.get(kind, np.uint16)
    clamps, most = kind == "f16" and not of_keys, np.float32(LARGEST_F16)

    @generated(name)
    def room(size):
        return np.zeros((size + LANES - 1) // LANES * LANES, element)

    @generated(name, _nrt=False)
    def put(x, size, tile, lane, narrowed):
        if clamps:  # 0, which the values of hidden keys are multiplied with, would not hide infinity
            _clamp(x, most)
        narrow((x, narrowed, narrowed.size // LANES))
        for d in range(size):
            if of_keys:
                tile[(d // packed * LANES + lane) * packed + d % packed] = narrowed[d]
            else:
                pair = d // LANES * LANES + lane // packed * packed
                tile[pair * LANES + d % LANES * packed + lane % packed] = narrowed[d]

    return Store(room, put)


def _codes(type_: CacheType, of_keys: bool) -> Store:
    rounded, to_f16, name = block_rounder(type_), narrow_kernel("f16"), f"{type_.kind}-{of_keys}"
    place, size_of_cell, offset = _placer(type_, of_keys, name), cell_bytes(type_), type_.offset

    @generated(name)
    def room(size):
        cells = (size + BLOCK - 1) // BLOCK
        vectors = (2 * cells + LANES - 1) // LANES
        factors = np.zeros(vectors * LANES, np.float32), np.zeros(vectors * LANES, np.uint16)
        return np.zeros(BLOCK, np.uint8), factors[0], factors[1]

    @generated(name, _nrt=False)
    def put(x, size, tile, lane, room):
        codes, factors, narrowed = room
        _clamp(x, np.float32(LARGEST_F16))
        cells = (size + BLOCK - 1) // BLOCK
        for cell in range(cells):
            factors[cell], factors[cells + cell] = rounded(x[cell * BLOCK : (cell + 1) * BLOCK], codes)
            place(codes, tile[cell * size_of_cell : (cell + 1) * size_of_cell], lane)
        to_f16((factors, narrowed, factors.size // LANES))
        there = tile[cells * size_of_cell :].view(np.uint16)
        for i in range(2 * cells if offset else cells):
            there[i * (SCALES // 2) + lane] = narrowed[i]

    return Store(room, put)


@helper
def _clamp(x, most):
    for d in range(x.size):
        x[d] = min(max(x[d], -most), most)


def _placer(type_: CacheType, of_keys: bool, name: str) -> Any:
    """A function (codes, cell, lane): write 32 codes to where they belong in a cell, over what is there."""
    planes, start, low = [], 0, 0
    for plane in PLANES[type_.bits]:
        planes.append((plane, start, low))
        start, low = start + 64 * plane, low + plane
    parts = tuple(planes)

    @generated(name)
    def place(codes, cell, lane):
        for i in range(BLOCK):
            quad, at = i // 4, 4 * lane + i % 4
            if not of_keys:
                quad, at = i // LANES * 4 + lane // 4, 4 * (i % LANES) + lane % 4
            for plane, first, low in parts:
                there, shift = first + quad * plane // 8 * 64 + at, quad * plane % 8
                mask = (1 << plane) - 1
                cell[there] = cell[there] & ~(mask << shift) | (codes[i] >> low & mask) << shift

    return place
