"""Blocks of a GGUF file to float32 values."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.simd import LANES, Emitter, Pointer, Value, micro_kernel

Array = np.ndarray[Any, Any]
_PART = 1 << 17  # weights of a part: 512 KiB of values, which take longer than waking a thread


def dequantize(data: Array, format: Any, out: Array) -> None:
    """out = the values of rows of a format.

    data : (..., row_bytes) uint8, whole blocks;  format : `qattn.formats.Format`;  out : float32, C-contiguous
    Cost: reads the blocks once, writes the values once.  The bits are those of scale · level + offset in float32.
    """
    if format.is_float:
        _widen(np.ascontiguousarray(data).view(format.dtype).reshape(out.shape), out)
        return
    blocks = np.ascontiguousarray(data).reshape(-1, format.bytes)
    values = out.reshape(-1, format.block)
    run, table = _blocks_kernel(format), _table(format)
    run(blocks, format.scales, format.offsets, table, values, parts=1 + out.size // _PART)


def _widen(values: Array, out: Array) -> None:
    if values.dtype == np.uint16:  # bfloat16
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # float64 holds more
            np.copyto(out, values, casting="same_kind")


@functools.cache
def _table(format: Any) -> Array:
    """The levels that codes stand for: 16, four times over."""
    return np.tile(np.resize(np.array(format.table or (0,), np.int8), 16), 4).view(np.uint8)


@functools.cache
def _blocks_kernel(format: Any) -> Kernel:
    """The kernel of a block format: ``run(blocks, scale_values, offset_values, table, out)``.

    blocks : (n, bytes) uint8;  out : (n, block) float32
    scale_values, offset_values : (65536 or 256,) float32, what the bits of a scale mean;  table : 16 levels, four times
    """
    expand = _expand_kernel(format)
    snippet, has_offset = generated(format.name), format.offset_bits is not None
    code, scale_bits, step = snippet(format.code), snippet(format.scale_bits), snippet(format.step or _one)
    offset_bits, offset_step = snippet(format.offset_bits or _one), snippet(format.offset_step or _one)
    block, group, halves = format.block, format.group, format.block // LANES
    stepped = format.step is not None

    @kernel(format.name)
    def run(blocks, scale_values, offset_values, table, out, part, parts):  # type: ignore[no-untyped-def]
        codes = np.zeros(max(block, 64), np.uint8)
        scales, offsets = np.empty(block // group, np.float32), np.empty(block // group, np.float32)
        for n in share(blocks.shape[0], part, parts):
            b = blocks[n]
            for high in range(halves):
                for low in range(LANES):
                    codes[high * LANES + low] = code(b, high * LANES + low)
            for g in range(block // group):
                scales[g] = scale_values[scale_bits(b, g)]
                if stepped:
                    scales[g] *= np.float32(step(b, g))
                if has_offset:
                    offsets[g] = offset_values[offset_bits(b, g)]
                    if stepped:
                        offsets[g] *= np.float32(offset_step(b, g))
            expand((codes, scales, offsets, table, out[n]))

    return run


def _expand_kernel(format: Any) -> Any:
    """One block of codes → values."""

    @micro_kernel
    def run(e: Emitter, codes: Pointer, scales: Pointer, offsets: Pointer, table: Pointer, out: Pointer) -> None:
        for start in range(0, format.block, 64):
            wide = codes.at(start).load(e.U8)
            if format.table:
                wide = e.lookup(table.load(e.U8), wide)
            for first in range(start, min(start + 64, format.block), LANES):
                narrow = wide.lanes(*range(first - start, first - start + LANES))
                level = narrow.to(e.I32V) if format.table else narrow.zero_extend(e.I32V) - format.zero
                value = level.to(e.F32) * _splat(e, scales, first // format.group)
                if format.offset_bits:
                    value = value + _splat(e, offsets, first // format.group)
                out.at(4 * first).store(value)

    return run


def _splat(e: Emitter, array: Pointer, index: int) -> Value:
    return array.at(4 * index).load(e.F32S).splat(e.F32)


def _one(b: Any, g: int) -> int:
    return 1
