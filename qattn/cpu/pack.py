"""Blocks of a GGUF file, taken apart and laid out for `qattn.cpu.matmul`; and back."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.codes import taken
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.simd import LANES, Emitter, Pointer, micro_kernel
from qattn.layout import CELL, OCTET, PLANES, Layout, Packed

Array = np.ndarray[Any, Any]


@functools.cache
def pack(format: Any, layout: Layout, flip: int) -> Kernel:
    """The packing kernel of a format: ``run(rows, base_values, offset_values, packed)``.

    rows : (rows, bytes) uint8, whole blocks
    base_values, offset_values : what each value of the stored bits of a base scale (offset) is stored as
    packed : `Packed`, its arrays zeroed, overwritten
    flip : bits of each code to turn over (128 makes a signed byte of an unsigned one)
    Cost: reads the rows once, writes the packed arrays once.
    """
    snippet, block, size = generated(format.name), format.block, format.bytes
    scale_bits, step = snippet(format.scale_bits), snippet(format.step or _one)
    offset_bits, offset_step = snippet(format.offset_bits or _zero), snippet(format.offset_step or _one)
    has_step, has_offset, paired = layout.step, layout.offset, layout.paired
    has_offset_step, nibbles = has_step and has_offset and not paired, layout.nibbles
    upper = offset_step if paired else snippet(format.shared or _zero)
    group, base_group, cells = layout.group, layout.base_group, block // CELL
    store_codes = _store_codes(format, layout, flip)

    @kernel(format.name)
    def run(rows, base_values, offset_values, packed, part, parts):
        codes, scales, steps = packed.codes, packed.scales, packed.steps
        offsets, offset_steps = packed.offsets, packed.offset_steps
        for tile in share(codes.shape[0], part, parts):
            for lane in range(min(LANES, rows.shape[0] - tile * LANES)):
                row = rows[tile * LANES + lane]
                for n in range(row.size // size):
                    b = row[n * size : (n + 1) * size]
                    store_codes((b, codes[tile, n * cells, 4 * lane :]))
                    for g in range(block // base_group):
                        at = n * (block // base_group) + g
                        scales[tile, at, lane] = base_values[scale_bits(b, g)]
                        if has_offset:
                            offsets[tile, at, lane] = offset_values[offset_bits(b, g)]
                    if has_step:
                        for g in range(block // group):
                            byte = step(b, g) | upper(b, g) << 4 if nibbles else step(b, g)
                            steps[tile, n * (block // group) + g, lane] = byte
                            if has_offset_step:
                                offset_steps[tile, n * (block // group) + g, lane] = offset_step(b, g)

    return run


def _store_codes(format: Any, layout: Layout, flip: int) -> Any:
    """The micro-kernel that puts a block's codes into cells, in the lane that `out` begins with."""

    @micro_kernel
    def run(e: Emitter, b: Pointer, out: Pointer) -> None:
        codes = taken(e, format, b)
        for c, (low, high) in enumerate(zip(codes[::2], codes[1::2], strict=True)):
            quads, start, shift = low.joined(high).bits(e.OCTET) ^ flip * 0x01010101, 64 * layout.bits * c, 0
            for plane in PLANES[layout.bits]:
                together = 8 // plane  # quads that share a word
                words = (quads >> shift) & ((1 << plane) - 1) * 0x01010101
                words = words << plane * (np.arange(8) % together)
                while words.type.count > plane:
                    n = words.type.count
                    words = words.lanes(*range(0, n, 2)) | words.lanes(*range(1, n, 2))
                for i in range(plane):
                    out.at(start + 64 * i).store(words.lane(i))
                start, shift = start + 64 * plane, shift + plane

    return run


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
    if layout.shared:
        steps = packed.steps.view(np.uint8).reshape(tiles, cells, CELL // layout.group, LANES, 1)
        for quad in range(8):
            group, column = divmod(4 * quad, layout.group)
            codes[:, :, quad] |= (steps[:, :, group] >> 4 + column // OCTET & 1) << shift
    return codes.transpose(0, 3, 1, 2, 4).reshape(tiles * LANES, cells * CELL)[: packed.rows]


def unpack_groups(packed: Packed, layout: Layout) -> tuple[Array, Array | None]:
    """The scales and the offsets, if there are any, of all groups, (rows, columns / group) float32."""
    steps = packed.steps & 15 if layout.nibbles else packed.steps
    scales = _products(packed.scales, steps, layout, packed.rows)
    if not layout.offset:
        return scales, None
    steps = packed.steps >> 4 & 15 if layout.paired else packed.offset_steps
    return scales, _products(packed.offsets, steps, layout, packed.rows)


def _products(bases: Array, steps: Array, layout: Layout, rows: int) -> Array:
    floats = bases.view(np.float16) if layout.base == "f16" else (bases.astype(np.uint32) << 16).view(np.float32)
    values: Array = np.ldexp(floats.astype(np.float32), -layout.down)
    if layout.step:
        values = np.repeat(values, layout.base_group // layout.group, axis=1) * steps.astype(np.float32)
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[:rows]
