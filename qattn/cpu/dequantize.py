"""Blocks of a GGUF file to float32 values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.codes import taken
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.scratch import scratch
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


def dequantize_rows(data: Array, ids: Array, format: Any, out: Array) -> None:
    """out = the values of some rows: data (rows, row_bytes) uint8, ids (n,) int64, out (n, columns) float32."""
    if format.is_float:
        values = data.view(np.uint16 if format.dtype == np.float16 else format.dtype)
        _widen_rows(values, ids, _halves(format.dtype), out)
        return
    rows = scratch("rows", (len(ids), data.shape[1]), np.uint8)
    _take(data, ids, rows)
    dequantize(rows, format, out)


@kernel()
def _take(data, ids, out, part, parts):
    for i in share(ids.size, part, parts):
        for j in range(out.shape[1]):
            out[i, j] = data[ids[i], j]


@kernel()
def _widen_rows(values, ids, halves, out, part, parts):
    for i in share(ids.size, part, parts):
        for j in range(out.shape[1]):
            value = values[ids[i], j]
            out[i, j] = halves[np.int64(value)] if halves.size else value


@functools.cache
def _halves(dtype: np.dtype[Any]) -> Array:
    """The values of all patterns of 16 bits, or nothing for wider floats."""
    if dtype.itemsize > 2:
        return np.empty(0, np.float32)
    if dtype == np.float16:
        return np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    return (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)


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
    scale_bits, step = snippet(format.scale_bits), snippet(format.step or _one)
    offset_bits, offset_step = snippet(format.offset_bits or _one), snippet(format.offset_step or _one)
    block, group, stepped = format.block, format.group, format.step is not None

    @kernel(format.name)
    def run(blocks, scale_values, offset_values, table, out, part, parts):
        scales, offsets = np.empty(block // group, np.float32), np.empty(block // group, np.float32)
        for n in share(blocks.shape[0], part, parts):
            b = blocks[n]
            for g in range(block // group):
                scales[g] = scale_values[scale_bits(b, g)]
                if stepped:
                    scales[g] *= np.float32(step(b, g))
                if has_offset:
                    offsets[g] = offset_values[offset_bits(b, g)]
                    if stepped:
                        offsets[g] *= np.float32(offset_step(b, g))
            expand((b, scales, offsets, table, out[n]))

    return run


def _expand_kernel(format: Any) -> Any:
    """One block → values."""

    @micro_kernel
    def run(e: Emitter, b: Pointer, scales: Pointer, offsets: Pointer, table: Pointer, out: Pointer) -> None:
        codes = taken(e, format, b)
        levels = [code.zero_extend(e.I32V) - format.zero for code in codes]
        if format.table:
            levels = [level.to(e.I32V) for level in _looked_up(e, table.load(e.U8), codes)]
        for i, level in enumerate(levels):
            value = level.to(e.F32) * _splat(e, scales, LANES * i // format.group)
            if format.offset_bits:
                value = value + _splat(e, offsets, LANES * i // format.group)
            out.at(4 * LANES * i).store(value)

    return run


def _looked_up(e: Emitter, table: Value, codes: list[Value]) -> Iterator[Value]:
    """What vectors of codes stand for."""
    for i in range(0, len(codes), 4):
        a, b, c, d = (codes[i : i + 4] * 2)[:4]  # what a block lacks is looked up twice
        found = e.lookup(table, a.joined(b).joined(c.joined(d)))
        for j in range(len(codes[i : i + 4])):
            yield found.lanes(*range(LANES * j, LANES * (j + 1)))


def _splat(e: Emitter, array: Pointer, index: int) -> Value:
    return array.at(4 * index).load(e.F32S).splat(e.F32)


def _one(b: Any, g: int) -> int:
    return 1
