"""Activations times packed weights on a GPU.

Weights lie as `qattn.layout` says, the same bytes that the CPU reads.  Activations are rounded to int8 with one scale
per 32 columns, see `qattn.cuda.activations`, and the arithmetic is that of `qattn.cpu.matmul`: for each cell,

    y[token, row] += x_scale · Σ_groups scale[row] · (Σ code · x_level - zero · Σ x_level)  +  offset[row] · Σ x

where the inner sums are exact, in integers.  Tensor cores compute them, for 16 rows, 8 tokens and 32 columns at once
(16 where groups have 16): in NumPy's words, with the codes and levels of one cell,

    sums = starts + codes[16, 32] @ levels[8, 32].T         # one instruction of a warp; starts = -zero · Σ levels
    totals += sums * scale[:, None] * x_scale               # two multiply-adds of each lane, for each of its sums
    totals += offset[:, None] * x_sums                      # one more, for weights that have offsets

The packed words are already what the instruction wants, up to the order of rows and columns, which it does not care
about: `qattn.cuda.matmul_cell` says how.  So few tokens need no other arithmetic: eight cost the tensor cores what one
does, and a lane has fewer instructions than with four-byte dot products, since it need not add up lanes' sums.

There are three ways to divide the work; `product` chooses by the number of tokens, and of rows where tokens are few.

`decode`, for 16 tokens at a time, is bound by memory.  A block of threads has 32 rows.  Its warps take turns at the
    cells, each with the words of two more cells on their way to its registers, 16 bytes a lane; in the end their totals
    meet in shared memory and are added up in the order of the warps.  Where so few rows keep a GPU idle, several blocks
    share their cells, and `add_parts` adds up what these come to.
`prefill`, for many, is bound by arithmetic.  A block has 128 rows and 64 tokens, a warp 32 rows and all 64 tokens: so
    words become factors once for eight blocks of tokens.  Activations, which all warps need, are copied to shared
    memory while those before are multiplied.
`exact`, in `qattn.cuda.matmul_exact`, multiplies float32 activations, and weights that are floats.

And where cuBLAS is faster than `prefill`, it may take the place: see `qattn.cuda.dense`.

A token's results depend on its own activations and on the weights alone, whatever stands beside it, and are the same
each time: there are no atomic additions.  But `decode` and `prefill` add cells up in different orders, so they agree to
float32 rounding only (a normalized mean squared error of about 1e-14), and so they do with the CPU.

Launches wait for nothing and read nothing back, and their shapes depend on the shapes of arrays only, so that they can
be captured into a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, uint32

from qattn.cuda import ptx
from qattn.cuda.activations import BLOCK, DECODE, TILE, Activations
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.matmul_cell import (
    SCALES_AT,
    STARTS_AT,
    Multipliers,
    groups_of,
    shared_cell,
    weight_fetcher,
    weight_maker,
    weight_placer,
)
from qattn.cuda.matmul_exact import exact as multiply_exact
from qattn.cuda.warps import ALL_LANES
from qattn.layout import CELL, Layout

_FEW_ROWS = 8192  # with fewer, one tile of tokens has too few blocks of `prefill` for a GPU's processors


@functools.cache
def product(layout: Layout, exact: bool) -> Callable[..., None]:
    """What multiplies by weights of a layout: ``run(packed, x, out, heads=1)``, ``out[:, packed.targets]`` overwritten.

    packed : `Packed`, its arrays on the device
    x : `Activations`, with `room` for these tokens; (tokens, K) float32 if `exact`, or for weights that are floats
    out : (tokens, n) float32, C-contiguous, aligned to 16 bytes
    heads : the rows are those of so many matrices, one after the other, whole tiles of each; x has a row of each token
        for each of them: (tokens, heads, K)
    Cost: `decode` and `exact` read the packed weights once for every 16 tokens, `prefill` once for every 64.  One
    launch, and a small one that adds up where blocks share cells.
    """

    def run(packed: Any, x: Any, out: Any, heads: int = 1) -> None:
        if exact or layout.bits >= 16:
            multiply_exact(layout, packed, x, out, heads)
        elif len(out) <= DECODE or (len(out) <= TILE and packed.rows < _FEW_ROWS):
            decode(layout, packed, x, out, heads)
        else:
            prefill(layout, packed, x, out, heads)

    return run


# Types of what all kernels take: `Packed` with its sizes, `Activations`, and the result's.
_SIGNATURE = "u8* u16* i8* u16* i8* u8* i32* i32 i32 i32 u8* f32* i32* f32* u8* i32 f32* i32 i32"


def _key(layout: Layout) -> str:
    return layout.name().replace("-", "_")


def _arguments(packed: Any, a: Activations, out: Any, heads: int) -> tuple[Any, ...]:
    """What all kernels take; sizes are those of a head."""
    (tiles, cells), blocks = packed.codes.shape[:2], a.seconds.shape[0] // heads
    weights = (packed.codes, packed.scales, packed.steps, packed.offsets, packed.offset_steps, packed.table)
    return (*weights, packed.targets, tiles // heads, cells, packed.rows // heads, *a, blocks, out, *out.shape)


# ------------------------------------------------------------------------------------------------------ few tokens


@functools.cache
def decode_kernel(layout: Layout, tokens: int, shares: bool = False) -> Kernel:
    """The kernel for up to 1, 8 or 16 tokens: a block for 32 rows.

    Its warps take turns at the cells, or at one of `parts` of them if it `shares` them with other blocks; each has at
    least one.  A warp has the words of two cells on their way while it multiplies, and the activations, from a cache,
    of one.  The totals of all warps meet in shared memory.
    """
    blocks, single = -(-tokens // BLOCK), tokens == 1
    place_weights, fetch_weights, ready = weight_placer(layout), weight_fetcher(layout), weight_maker(layout)
    m = Multipliers(layout, blocks, single)
    place_tokens, fetch_tokens, multiply, multiply_memory = m.place, m.fetch, m.multiply, m.multiply_memory
    zeros = m.zeros
    has_table, columns, two = layout.table, 1 if single else BLOCK * blocks, blocks == 2
    numbers = len(zeros)

    @device
    def remainders(seconds, place, cells):
        """Whether any token has a remainder in the cell."""
        a, b = ptx.load_8_constant(seconds, place * BLOCK)
        if two:
            c, d = ptx.load_8_constant(seconds, (place + cells) * BLOCK)
            return a | b | c | d
        return a | b

    @kernel(f"{_SIGNATURE} f32* i32", f"{_key(layout)}_{tokens}{'_shared' if shares else ''}")
    def decode(
        codes, scales, steps, offsets, offset_steps, table, targets, tiles, cells, rows,
        levels, x_scales, starts, sums, seconds, token_blocks, out, tokens, width, totals_of_parts, parts,
    ):  # fmt: skip
        thread, warps, head = int32(cuda.threadIdx.x), int32(cuda.blockDim.x) >> 5, int32(cuda.blockIdx.z)
        lane, warp, pair, cell, end = thread & 31, thread >> 5, int32(cuda.blockIdx.x), int32(0), cells
        part, all_tokens = int32(0), tokens
        if shares:
            pair = int32(uint32(cuda.blockIdx.x) // uint32(parts))
            part = int32(cuda.blockIdx.x - pair * parts)
            cell = int32(uint32(part * cells) // uint32(parts))
            end = int32(uint32((part + 1) * cells) // uint32(parts))
        w, a = (codes, scales, steps, offsets, offset_steps), (levels, x_scales, starts, sums)
        tile = int32(head * tiles + min(2 * pair + (lane >> 4), tiles - 1))
        last = end - 1
        block = int32(cuda.blockIdx.y) * blocks
        own = int64(head * token_blocks + block)  # and behind the blocks of all heads come those of remainders
        here, there = own * cells, (int64(token_blocks) * int32(cuda.gridDim.z) + own) * cells
        first, tokens = block * BLOCK, int32(min(tokens - block * BLOCK, columns))
        row = min(lane >> 2, tokens - 1)  # so that a lane of a token that isn't there causes no traffic
        lookup = ptx.load_16_constant(table, 0) if has_table else (uint32(0), uint32(0), uint32(0), uint32(0))
        places, token_places = place_weights(w, tile, cells, lane), place_tokens(a, here, cells, lane, row)
        totals, cell = zeros, int32(cell + warp)
        even, odd = fetch_weights(places, cell), fetch_weights(places, min(cell + warps, last))
        x, flag = fetch_tokens(token_places, cell), remainders(seconds, here + cell, cells)
        while cell < end:
            factors = ready(even, lane, lookup)
            totals = multiply(totals, factors, x)
            if flag != 0:
                second = place_tokens(a, there, cells, lane, row)
                totals = multiply_memory(totals, factors, second, cell)
            even, cell = fetch_weights(places, min(cell + 2 * warps, last)), int32(cell + warps)
            ahead = int32(min(cell, last))
            x, flag = fetch_tokens(token_places, ahead), remainders(seconds, here + ahead, cells)
            if cell < end:
                factors = ready(odd, lane, lookup)
                totals = multiply(totals, factors, x)
                if flag != 0:
                    second = place_tokens(a, there, cells, lane, row)
                    totals = multiply_memory(totals, factors, second, cell)
                odd, cell = fetch_weights(places, min(cell + 2 * warps, last)), int32(cell + warps)
                x, flag = (
                    fetch_tokens(token_places, min(cell, last)),
                    remainders(seconds, here + min(cell, last), cells),
                )
        shared = cuda.shared.array(0, float32)
        for i in range(numbers):
            if single:
                if lane & 3 == 0:
                    shared[uint32(warp * 32 + (lane & 28) + i)] = totals[i]
            else:  # of block i >> 3, token 2 c + (i & 1), row i >> 1 & 3
                token = (i >> 3) * BLOCK + 2 * (lane & 3) + (i & 1)
                shared[uint32((warp * columns + token) * 32 + (lane & 28) + (i >> 1 & 3))] = totals[i]
        cuda.syncthreads()
        while thread < 32 * tokens:
            total, at, row, other = float32(0), thread, 32 * pair + (thread & 31), int32(0)
            while other < warps:
                total += shared[uint32(at)]
                at += 32 * columns
                other += 1
            if row < rows:
                token = int64(first + (thread >> 5))
                if shares:
                    there = (part * int64(all_tokens) + token) * int32(cuda.gridDim.z) + head
                    totals_of_parts[there * rows + row] = total
                else:
                    out[token * width + targets[head * rows + row]] = total
            thread += 32 * warps

    return decode


def decode(layout: Layout, packed: Any, a: Activations, out: Any, heads: int = 1) -> None:
    """Multiply a few tokens: weights are read once for each `DECODE` of them."""
    import cupy

    tiles, cells = packed.codes.shape[:2]
    tokens, pairs = len(out), -(-tiles // heads // 2)
    size = next((size for size in DECODE_SIZES if tokens <= size), DECODE)
    warps = min(cells, decode_warps(layout, pairs * heads))
    parts = decode_parts(cells, pairs * heads, warps)
    totals = cupy.empty((parts, tokens, packed.rows), "float32") if parts > 1 else None
    decode_kernel(layout, size, parts > 1)(
        *_arguments(packed, a, out, heads), totals, parts,
        grid=(pairs * parts, -(-tokens // size), heads), block=32 * warps, shared=4 * 32 * size * warps,
    )  # fmt: skip
    if totals is not None:
        grid = tokens, -(-packed.rows // _ADDERS)
        add_parts(totals, packed.targets, parts, tokens, packed.rows, out, out.shape[1], grid=grid, block=_ADDERS)


def decode_warps(layout: Layout, pairs: int) -> int:
    """Warps of a block, at most, for so many pairs of tiles: for any number of tokens, since totals depend on it.

    The more, the more bytes are on their way where there are fewer blocks than a GPU has room for.  384 threads may
    have 168 registers each; kernels for cells of two groups take more, the others 140 at most.
    """
    return 12 if layout.group >= CELL and pairs < _FEW_PAIRS else 8


def decode_parts(cells: int, pairs: int, warps: int) -> int:
    """Blocks that share the cells of a pair of tiles, for any number of tokens.

    With fewer blocks than `_PROCESSORS`, not all of a GPU asks for memory.  But adding up takes a launch, during which
    a warp could have had `_CELLS_OF_LAUNCH` cells, one after the other.
    """
    return max(1, min(_PROCESSORS // max(pairs, 1), cells // (_CELLS_OF_LAUNCH * max(warps, 1))))


@kernel("f32* i32* i32 i32 i32 f32* i32")
def add_parts(totals, targets, parts, tokens, rows, out, width):
    """out[token, targets[row]] = Σ totals[part, token, row], in order: a row a thread, grid (tokens, runs of rows)."""
    token, row = int64(cuda.blockIdx.x), int32(cuda.blockIdx.y * _ADDERS + cuda.threadIdx.x)
    if row < rows:
        total, part = float32(0), int32(0)
        while part < parts:
            total = float32(total + totals[(int64(part) * tokens + token) * rows + row])
            part = int32(part + 1)
        out[token * width + targets[row]] = total


DECODE_SIZES = (1, BLOCK, DECODE)  # tokens that a kernel is made for
_FEW_PAIRS = 512  # with so many, blocks of 8 warps fill a GPU
_PROCESSORS = 132  # of the GPU that sizes are chosen for: bits must not depend on which it is
_CELLS_OF_LAUNCH = 4  # a launch takes about 1 µs, memory 0.6 to 0.8 to answer, and a warp asks for three at once
_ADDERS = 256  # threads of a block


# ------------------------------------------------------------------------------------------------- many tokens


def _copier(layout: Layout) -> Any:
    """The device function that begins to copy a cell of 64 tokens to shared memory: each thread 16 bytes or 32.

    first : the first block of tokens;  address : where the cell goes
    """
    groups = groups_of(layout)
    some_starts, some_sums = layout.zero != 0, layout.offset
    each = 2 * groups  # copies that a block's starts take

    @device
    def copy(a, first, cell, cells, address, thread):
        place = int64(first + (thread >> 4)) * cells + cell
        ptx.copy_async_16(a[0], place * (BLOCK * CELL) + (thread & 15) * 16, address + uint32(16 * thread))
        part, kind = thread & 31, thread >> 5
        if kind == 0 and part < 16:
            place = int64(first + (part >> 1)) * cells + cell
            ptx.copy_async_16(a[1], place * BLOCK + (part & 1) * 4, address + uint32(SCALES_AT + 16 * part))
        if part < 16 * groups:
            place = (int64(first + part // each) * cells + cell) * (BLOCK * groups) + (part & (each - 1)) * 4
            if some_starts and kind == 1:
                ptx.copy_async_16(a[2], place, address + uint32(STARTS_AT + 16 * part))
            if some_sums and kind == 2:
                ptx.copy_async_16(a[3], place, address + uint32(STARTS_AT + 4 * TILE * groups + 16 * part))

    return copy


@functools.cache
def prefill_kernel(layout: Layout) -> Kernel:
    """The kernel for many tokens: a block for 128 rows and 64 tokens, each warp has 32 rows and all tokens.

    Weights go from memory to the registers of the only warp that needs them, one cell ahead; activations are copied to
    shared memory, `_STAGE` cells ahead of those that are being multiplied.
    """
    place_weights, fetch_weights, ready = weight_placer(layout), weight_fetcher(layout), weight_maker(layout)
    m = Multipliers(layout, TILE // BLOCK)
    place_tokens, multiply_shared, multiply_memory, zeros = m.place, m.multiply_shared, m.multiply_memory, m.zeros
    has_table, size, copy, numbers = layout.table, shared_cell(layout), _copier(layout), len(zeros)
    words_of_ring = 2 * _STAGE * size // 4

    @device
    def remainders(seconds, first, cell, cells, lane):
        """Whether any token has a remainder in the cell; a lane looks at four."""
        place = int64(first + (lane >> 1 & 7)) * cells + cell
        return ptx.load_4_constant(seconds, place * BLOCK + 4 * (lane & 1))

    @kernel(_SIGNATURE, _key(layout))
    def prefill(
        codes, scales, steps, offsets, offset_steps, table, targets, tiles, cells, rows,
        levels, x_scales, starts, sums, seconds, token_blocks, out, tokens, width,
    ):  # fmt: skip
        thread, head = int32(cuda.threadIdx.x), int32(cuda.blockIdx.z)
        lane, start = thread & 31, int32(cuda.blockIdx.y) * (TILE // BLOCK)
        first = head * token_blocks + start  # and behind the blocks of all heads come those of remainders
        w, a = (codes, scales, steps, offsets, offset_steps), (levels, x_scales, starts, sums)
        own = int32(cuda.blockIdx.x) * (_ROWS // 16) + 2 * (thread >> 5) + (lane >> 4)
        places = place_weights(w, head * tiles + min(own, tiles - 1), cells, lane)
        lookup = ptx.load_16_constant(table, 0) if has_table else (uint32(0), uint32(0), uint32(0), uint32(0))
        ring = ptx.shared_address(cuda.shared.array(words_of_ring, uint32, 16), 0)
        cell = int32(0)
        while cell < min(_STAGE, cells):
            copy(a, first, cell, cells, ring + uint32(cell * size), thread)
            cell = int32(cell + 1)
        ptx.commit_copies()
        totals, cell = zeros, int32(0)
        words, flag = fetch_weights(places, cell), remainders(seconds, first, cell, cells, lane)
        while cell < cells:
            if cell & (_STAGE - 1) == 0:  # what was copied has arrived, and all have read what is overwritten
                ptx.wait_for_copies()
                cuda.syncthreads()
                for i in range(_STAGE):
                    ahead = int32(cell + _STAGE + i)
                    if ahead < cells:
                        copy(a, first, ahead, cells, ring + uint32((ahead & (2 * _STAGE - 1)) * size), thread)
                ptx.commit_copies()
            factors, again = ready(words, lane, lookup), cuda.any_sync(ALL_LANES, flag != 0)
            ahead = int32(min(cell + 1, cells - 1))
            words, flag = fetch_weights(places, ahead), remainders(seconds, first, ahead, cells, lane)
            totals = multiply_shared(totals, factors, ring + uint32((cell & (2 * _STAGE - 1)) * size), lane)
            if again:
                there = (int64(token_blocks) * int32(cuda.gridDim.z) + first) * cells
                second = place_tokens(a, there, cells, lane, lane >> 2)
                totals = multiply_memory(totals, factors, second, cell)
            cell = int32(cell + 1)
        row, column, of_head = int32(own * 16 + (lane & 12)), 2 * (lane & 3), int32(head * rows)
        target = targets[of_head + min(row, rows - 1)]
        if row + 3 < rows and targets[of_head + row + 3] - target == 3 and (target | width) & 3 == 0:
            for i in range(0, numbers, 8):
                for k in range(2):
                    token = start * BLOCK + i + column + k
                    if token < tokens:
                        ptx.store_16(
                            out, int64(token) * width + target, ptx.bits_of(totals[i + k]),
                            ptx.bits_of(totals[i + k + 2]), ptx.bits_of(totals[i + k + 4]),
                            ptx.bits_of(totals[i + k + 6]),
                        )  # fmt: skip
        else:
            for i in range(numbers):
                token, there = start * BLOCK + (i & ~7) + column + (i & 1), row + (i >> 1 & 3)
                if token < tokens and there < rows:
                    out[int64(token) * width + targets[of_head + there]] = totals[i]

    return prefill


def prefill(layout: Layout, packed: Any, a: Activations, out: Any, heads: int = 1) -> None:
    """Multiply many tokens: more than `DECODE`, for which `Activations` have room in whole tiles."""
    grid = -(-packed.rows // heads // _ROWS), -(-len(out) // TILE), heads
    prefill_kernel(layout)(*_arguments(packed, a, out, heads), grid=grid, block=_ROWS)


_ROWS = 128  # rows that a block multiplies, 32 a warp; so it has as many threads
_STAGE = 2  # cells that are copied to shared memory together
