"""Blocks of a GGUF file to float32 values."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from qattn.cpu._jit import kernel
from qattn.cpu.simd import LANES, Emitter, Pointer, Value, micro_kernel
from qattn.cpu.threads import get_num_threads

Array = np.ndarray[Any, Any]
_FEW = 1 << 15  # weights that one thread has done before another would have woken up


def dequantize(data: Array, format: Any, out: Array) -> None:
    """out = the values of rows of a format.

    data : (..., row_bytes) uint8, whole blocks;  format : `qattn.formats.Format`;  out : float32, C-contiguous
    Cost: reads the blocks once, writes the values once.  The bits are those of scale · level + offset in float32.
    """
    if format.is_float:
        _widen(np.ascontiguousarray(data).view(format.dtype).reshape(out.shape), out)
        return
    blocks = np.ascontiguousarray(data).reshape(-1, format.bytes)
    threads = min(get_num_threads(), 1 + out.size // _FEW)
    table = np.resize(np.array(format.table or (0,), np.int8), 16).repeat(4).reshape(16, 4).T.copy().view(np.uint8)
    _blocks_kernel(format)(blocks, format.scales, format.offsets, table, out.reshape(-1, format.block), threads)


def _widen(values: Array, out: Array) -> None:
    if values.dtype == np.uint16:  # bfloat16
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # float64 holds more
            np.copyto(out, values, casting="same_kind")


@functools.cache
def _blocks_kernel(format: Any) -> Any:
    """The kernel of a block format: ``run(blocks, scale_values, offset_values, table, out, threads)``.

    blocks : (n, bytes) uint8;  out : (n, block) float32
    scale_values, offset_values : (65536 or 256,) float32, what the bits of a scale mean;  table : 16 levels, four times
    """
    expand = _expand_kernel(format)
    code, scale_bits = numba.njit(format.code), numba.njit(format.scale_bits)
    step, offset_bits = numba.njit(format.step or _one), numba.njit(format.offset_bits or _one)
    offset_step, has_offset = numba.njit(format.offset_step or _one), format.offset_bits is not None
    block, group, halves = format.block, format.group, format.block // LANES
    one_scale = format.step is not None

    @kernel(format.name, parallel=True)
    def run(blocks, scale_values, offset_values, table, out, threads):  # type: ignore[no-untyped-def]
        count = blocks.shape[0]
        for thread in numba.prange(threads):
            codes = np.zeros(max(block, 64), np.uint8)
            scales, offsets = np.empty(block // group, np.float32), np.empty(block // group, np.float32)
            for n in range(count * thread // threads, count * (thread + 1) // threads):
                b = blocks[n]
                for high in range(halves):
                    for low in range(LANES):
                        codes[high * LANES + low] = code(b, high * LANES + low)
                for g in range(block // group):
                    scales[g] = scale_values[scale_bits(b, g)]
                    if one_scale:
                        scales[g] *= np.float32(step(b, g))
                    if has_offset:
                        offsets[g] = offset_values[offset_bits(b, g)]
                        if one_scale:
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
