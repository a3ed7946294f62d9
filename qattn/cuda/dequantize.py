"""Blocks of a GGUF file to float32, float16 or bfloat16 values.

Blocks have odd sizes, 17 to 210 bytes, so a run of them is copied to shared memory first, 16 bytes at a time.  Scales
and offsets are worked out once for each group.  Then each thread makes 16 bytes of consecutive values at a time: eight
of 16 bits or four of 32.  Their indices in the block differ in the lowest bits only, which the compiler sees, so that
it works out everything else about them once.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda, types

from qattn.cuda import ptx
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.snippets import Book, compiled
from qattn.cuda.unpack import unpack as unpack
from qattn.cuda.values import ELEMENTS, KINDS, key, narrow_for, store_for, store_four, widen_for

Array = Any  # of CuPy
THREADS = 256
WEIGHTS = 8192  # of a thread block: 16 or 32 KiB of values, which hide the latency of reading their blocks
_FLOATS = 8 * THREADS  # float weights of a thread block
_MAGIC = 0x4B000000  # the bits of 2**23: the lowest bits of float32 integers above it are those of the integer


def dequantize(data: Array, format: Any, out: Array) -> None:
    """out = the values of rows of a format.

    data : (..., row_bytes) uint8, whole blocks;  format : `qattn.formats.Format`
    out : float32, float16 or uint16 (bfloat16), C-contiguous; it begins at a multiple of 16 bytes
    Cost: reads the blocks once, writes the values once.  The bits are those of scale · level + offset in float32,
    rounded to the nearest, ties to even, if `out` has 16.
    """
    kind = KINDS[out.dtype.name]
    if format.is_float:
        values = data.reshape(-1).view(format.dtype)
        run, grid = floats_kernel(_source(format), kind), (-(-out.size // _FLOATS), 1)
        run(values, None, out.size, out.reshape(-1), grid=grid, block=THREADS)
        return
    blocks = out.size // format.block
    grid = (-(-out.size // WEIGHTS), 1)
    blocks_kernel(format, kind)(data.reshape(-1), None, blocks, out.reshape(-1), grid=grid, block=THREADS)


def dequantize_rows(data: Array, ids: Array, format: Any, out: Array) -> None:
    """out = the values of some rows: the lookup of an embedding.

    data : (rows, row_bytes) uint8, whole blocks;  ids : (n,) int32 or int64, 0 … rows - 1, which the host doesn't read
    out : (n, columns) float32, C-contiguous
    Cost: reads the rows' blocks once, writes the values once.
    """
    count, columns = out.shape
    index = {"int32": "i32", "int64": "i64"}[ids.dtype.name]
    if format.is_float:
        values = data.reshape(-1).view(format.dtype)
        run, grid = floats_kernel(_source(format), "f32", index), (count, -(-columns // _FLOATS))
        run(values, ids, columns, out.reshape(-1), grid=grid, block=THREADS)
        return
    run, grid = blocks_kernel(format, "f32", index), (count, -(-columns // WEIGHTS))
    run(data.reshape(-1), ids, columns // format.block, out.reshape(-1), grid=grid, block=THREADS)


# --------------------------------------------------------------------------------------------------------- blocks


@device
def _place(ids, row_items, by_id):
    """Which items a thread block takes: the first of its source row, that of its target row, its chunk's number."""
    if by_id:
        row = np.int64(cuda.blockIdx.x)
        return np.int64(ids[row]) * row_items, row * row_items, np.int64(cuda.blockIdx.y)
    return np.int64(0), np.int64(0), np.int64(cuda.blockIdx.x)


@device
def _stage(data, start, size, staged):
    """Begin to copy `size` >= 15 bytes, which start anywhere, to shared memory → where in it they start, 0 … 15.

    They keep their place within 16 bytes, so that all but the first and last few are copied 16 at a time.
    """
    thread = np.int32(cuda.threadIdx.x)
    shift = np.int32(ptx.address(data, start) & 15)
    head = np.int32(-shift & 15)
    vectors = np.int32((size - head) >> 4)
    vector = thread
    while vector < vectors:
        at = np.int32(head + vector * 16)
        ptx.copy_async_16(data, start + at, ptx.shared_address(staged, np.uint32(shift + at)))
        vector = np.int32(vector + THREADS)
    ptx.commit_copies()
    rest = np.int32(head + vectors * 16)
    if thread < head:
        staged[np.uint32(shift + thread)] = data[start + thread]
    if thread < size - rest:
        staged[np.uint32(shift + rest + thread)] = data[start + rest + thread]
    return shift


@functools.cache
def blocks_kernel(format: Any, kind: str, ids: str = "") -> Kernel:
    """The kernel of a block format: ``run(data, ids, n, out)``, grid (runs of `WEIGHTS`, 1), `THREADS` threads.

    data : bytes of n blocks;  out : of `kind`, "f32", "f16" or "bf16"
    With ids of type "i32" or "i64", n blocks are a row, and the grid is (ids, runs of a row).
    """
    size, block, by_id, has_offset = format.bytes, format.block, bool(ids), format.offset_bits is not None
    blocks, groups, wide = WEIGHTS // block, block // format.group, 4 if kind == "f32" else 8
    pieces, group_pieces, room, total = block // wide, format.group // wide, blocks * size + 16, WEIGHTS // format.group
    offset_room, is_wide, store, four = total if has_offset else 1, wide == 8, store_for(kind), _block_values(format)
    scale_of = _group_value(format.scale_bits, format.scale_type, format.scale_unit, format.step)
    offset_of = _group_value(format.offset_bits, format.scale_type, format.offset_unit, format.offset_step)
    shift_of_i = wide.bit_length() - 1
    levels = Book(np.resize(np.array(format.table or (0,), np.int8), 16))

    @kernel(f"u8* {ids or 'i64'}* i64 {ELEMENTS[kind]}", key(format.name, kind, ids))
    def blocks_of(data, ids, n, out):
        staged = cuda.shared.array(room, types.uint8, 16)
        scales, offsets = cuda.shared.array(total, types.float32), cuda.shared.array(offset_room, types.float32)
        table = cuda.shared.array(16, types.float32)
        thread = np.int32(cuda.threadIdx.x)
        source, target, chunk = _place(ids, n, by_id)
        first = chunk * blocks
        count = np.int32(min(np.int64(blocks), n - first))
        shift = _stage(data, (source + first) * size, np.int32(count * size), staged)
        if thread < 16:
            table[np.uint32(thread)] = np.float32(levels[thread])
        ptx.wait_for_copies()
        cuda.syncthreads()
        item = thread
        while item < count * groups:
            number, g = np.uint32(item) // np.uint32(groups), np.int32(item & (groups - 1))
            b = staged[shift + number * size :]
            scales[np.uint32(item)] = scale_of(b, g)
            if has_offset:
                offsets[np.uint32(item)] = offset_of(b, g)
            item = np.int32(item + THREADS)
        cuda.syncthreads()
        i = np.int32(thread & (pieces - 1)) << np.int32(shift_of_i)
        item = thread
        while item < count * pieces:
            b = staged[shift + np.uint32(item) // np.uint32(pieces) * size :]
            group = np.uint32(item) // np.uint32(group_pieces)
            scale, offset = scales[group], offsets[group] if has_offset else np.float32(0)
            at = (target + first) * block + item * wide
            if is_wide:
                low, high = four(b, i, 0, scale, offset, table), four(b, i, 4, scale, offset, table)
                store(out, at, low, high)
            else:
                store_four(out, at, four(b, i, 0, scale, offset, table))
            item = np.int32(item + THREADS)

    return blocks_of


@functools.cache
def _group_value(bits_of: Any, scale_type: str, unit: float, step_of: Any) -> Any:
    """value(b, g): a group's scale or offset, from its bits, its unit and its step."""
    bits, widen, step, stepped = compiled(bits_of), widen_for(scale_type), compiled(step_of), step_of is not None
    factor, scaled = np.float32(unit), unit != 1

    @device
    def value(b, g):
        base = widen(bits(b, g))
        if scaled:
            base = ptx.multiply(base, factor)
        if stepped:
            base = ptx.multiply(base, np.float32(np.int32(step(b, g))))
        return base

    return value


@functools.cache
def _block_values(format: Any) -> Any:
    """four(b, i, k, scale, offset, table): weights i + k … i + k + 3 of a block, k a constant, i a multiple of 4 or 8.

    Shifts make i, and "or" joins it with constants: the compiler then sees that i >> 3 or i & 8 are the same for all.
    """
    code, has_table, has_offset = compiled(format.code), format.table is not None, format.offset_bits is not None
    magic, zero = np.uint32(_MAGIC), np.float32((1 << 23) + format.zero)

    @device
    def value(b, i, scale, offset, table):
        number = np.uint32(code(b, i))
        level = table[number] if has_table else ptx.float_of(number | magic) - zero
        product = ptx.multiply(level, scale)
        return ptx.add(product, offset) if has_offset else product

    @device
    def four(b, i, k, scale, offset, table):
        return (
            value(b, i | np.int32(k), scale, offset, table),
            value(b, i | np.int32(k + 1), scale, offset, table),
            value(b, i | np.int32(k + 2), scale, offset, table),
            value(b, i | np.int32(k + 3), scale, offset, table),
        )

    return four


# --------------------------------------------------------------------------------------------------------- floats


def _source(format: Any) -> str:
    """What a float format's numbers are."""
    return "bf16" if format.dtype == np.uint16 else f"f{8 * format.bytes}"


@functools.cache
def floats_kernel(source: str, kind: str, ids: str = "") -> Kernel:
    """Floats to floats: ``run(x, ids, n, out)``, grid (runs of `_FLOATS`, 1), or (ids, runs of a row) as for blocks.

    Neighbours read and write single numbers, so that rows may begin anywhere.
    """
    widen, narrow, by_id = widen_for(source), narrow_for(kind), bool(ids)

    @kernel(f"{ELEMENTS[source]} {ids or 'i64'}* i64 {ELEMENTS[kind]}", key(source, kind, ids))
    def floats(x, ids, n, out):
        source, target, chunk = _place(ids, n, by_id)
        first = chunk * _FLOATS + np.int64(cuda.threadIdx.x)
        for j in range(8):
            at = first + j * THREADS
            if at < n:
                out[target + at] = narrow(widen(x[source + at]))

    return floats
