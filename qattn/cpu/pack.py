"""Blocks of a GGUF file, taken apart and laid out for `qattn.cpu.matmul`; and back."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.simd import LANES
from qattn.layout import CELL, PLANES, Layout, Packed

Array = np.ndarray[Any, Any]


@functools.cache
def pack(name: str, layout: Layout, snippets: Any, block: int, size: int, flip: int) -> Kernel:
    """The packing kernel of a format: ``run(rows, base_values, offset_values, packed)``.

    rows : (rows, bytes) uint8, whole blocks
    base_values, offset_values : what each value of the stored bits of a base scale (offset) is stored as
    packed : `Packed`, its arrays zeroed, overwritten
    flip : added to each code, modulo 256 (128 turns an unsigned byte into a signed one)
    Cost: reads the rows once, writes the packed arrays once.
    """
    snippet = generated(name)
    code, scale_bits, step = snippet(snippets.code), snippet(snippets.scale_bits), snippet(snippets.step or _one)
    offset_bits, offset_step = snippet(snippets.offset_bits or _zero), snippet(snippets.offset_step or _one)
    has_step, has_offset, has_offset_step = layout.step, layout.offset, layout.step and layout.offset
    planes = PLANES[layout.bits]
    first, second = planes[0], planes[1] if len(planes) > 1 else 0
    group, base_group = layout.group, layout.base_group
    halves = block // 16

    @kernel(name)
    def run(rows, base_values, offset_values, packed, part, parts):  # type: ignore[no-untyped-def]
        codes = np.empty(block, np.uint8)
        words = codes.view(np.uint32)
        all_codes, scales, steps = packed.codes, packed.scales, packed.steps
        offsets, offset_steps = packed.offsets, packed.offset_steps
        for tile in share(all_codes.shape[0], part, parts):
            out = all_codes[tile].view(np.uint32)
            for lane in range(min(LANES, rows.shape[0] - tile * LANES)):
                row = rows[tile * LANES + lane]
                for n in range(row.size // size):
                    b = row[n * size : (n + 1) * size]
                    for high in range(halves):
                        for low in range(16):
                            codes[high * 16 + low] = code(b, high * 16 + low) + flip
                    for c in range(block // CELL):
                        cell = out[n * (block // CELL) + c]
                        for quad in range(8):
                            word = words[c * 8 + quad]
                            cell[quad * first // 8 * LANES + lane] |= (word & _mask(first)) << (quad * first % 8)
                            if second:
                                at = (first * LANES) + quad * second // 8 * LANES + lane
                                cell[at] |= ((word >> first) & _mask(second)) << (quad * second % 8)
                    for g in range(block // base_group):
                        at = n * (block // base_group) + g
                        scales[tile, at, lane] = base_values[scale_bits(b, g)]
                        if has_offset:
                            offsets[tile, at, lane] = offset_values[offset_bits(b, g)]
                    if has_step:
                        for g in range(block // group):
                            steps[tile, n * (block // group) + g, lane] = step(b, g)
                            if has_offset_step:
                                offset_steps[tile, n * (block // group) + g, lane] = offset_step(b, g)

    return run


@numba.njit
def _mask(bits):  # type: ignore[no-untyped-def]
    """The lowest bits of each byte of a word."""
    return np.uint32(((1 << bits) - 1) * 0x01010101)


def _one(b: Any, g: int) -> int:
    return 1


def _zero(b: Any, g: int) -> int:
    return 0


def unpack_codes(packed: Packed, layout: Layout) -> Array:
    """The codes as they were packed, (rows, columns) uint8."""
    tiles, cells, _ = packed.codes.shape
    planes = packed.codes.reshape(tiles, cells, layout.bits, LANES, 4)
    codes = np.zeros((tiles, cells, 8, LANES, 4), np.uint8)
    start = shift = 0
    for plane in PLANES[layout.bits]:
        for quad in range(8):
            bits = planes[:, :, start + quad * plane // 8] >> (quad * plane % 8)
            codes[:, :, quad] |= (bits & ((1 << plane) - 1)) << shift
        start, shift = start + plane, shift + plane
    return codes.transpose(0, 3, 1, 2, 4).reshape(tiles * LANES, cells * CELL)[: packed.rows]


def unpack_groups(bases: Array, steps: Array, layout: Layout, rows: int) -> Array:
    """The scales or offsets of all groups, (rows, columns / group) float32."""
    if layout.base == "f16":
        values = bases.view(np.float16).astype(np.float32)
    elif layout.base == "bf16":
        values = (bases.astype(np.uint32) << 16).view(np.float32)
    else:
        values = bases
    if layout.step:
        values = np.repeat(values, layout.base_group // layout.group, axis=1) * steps.astype(np.float32)
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[:rows]
