"""What happens to projected rows beside their rotation: scale, bias and clamp, norms of heads, temperature, gates.

Each is a pass over the rows.  Most of it can also be done head by head, by `finish_head` and `norm_head`, on a head's
way to being rotated and stored: see `qattn.cuda.rope`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint32

from qattn.cuda import ptx
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.warps import sum_of_block, warp_sum
from qattn.preparation import Preparation

GATES = ("sigmoid", "softplus")
THREADS = 256
_LOG2_E = math.log2(math.e)
_FACTOR, _BIAS, _LIMIT, _WEIGHT, _SHIFT, _HEAT, _AFTER_ROPE = (1 << bit for bit in range(7))  # of `flags`
_NORMS = 8  # from this bit on, two for each of q, k and v
_NO_NORM, _RMS_NORM, _LAYER_NORM = range(3)
Array = Any  # of CuPy


def finish(out: Array, factor: Array | None, bias: Array | None, limit: Array | None) -> None:
    """out = clamp(out · factor + bias, -limit, limit).

    out : (tokens, n) float32;  factor, bias, limit : (n,) float32, or None
    """
    tokens, n = out.shape
    flags = _flags((factor, _FACTOR), (bias, _BIAS), (limit, _LIMIT))
    finish_kernel(out, factor, bias, limit, n, flags, grid=(tokens, -(-n // THREADS)), block=THREADS)


def norm_heads(
    x: Array, first: int, groups: int, size: int, weight: Array | None, bias: Array | None, epsilon: float, layer: bool
) -> None:
    """Normalize each of `groups` pieces of `size` columns of x, from column `first` on, in place.

    By their root mean square (Zhang and Sennrich, 2019), or if `layer` by mean and variance (Ba et al., 2016).
    x : (tokens, columns) float32;  weight, bias : (groups, size) float32, or None
    Cost: reads a piece once from memory and once or twice from a cache.
    """
    tokens, columns = x.shape
    flags = _flags((weight, _WEIGHT), (bias, _SHIFT))
    threads = min(THREADS, -(-size // 128) * 32)  # up to four elements each, if that is enough
    grid = tokens, groups
    norm_kernel(x, first, columns, size, weight, bias, epsilon, int(layer), flags, grid=grid, block=threads)


def scale_tokens(x: Array, first: int, count: int, table: Array, angles: Array) -> None:
    """x[t, first : first + count] *= table[angles[t]]: x (tokens, columns) and table (positions,) float32."""
    tokens, columns = x.shape
    grid = tokens, -(-count // THREADS)
    scale_kernel(x, first, columns, count, table, angles, grid=grid, block=THREADS)


def gate(heads: Array, x: Array, first: int, per_head: bool, function: str) -> None:
    """heads[t, h, d] *= f(x[t, first + i]) with i = h if `per_head`, else h · value_dim + d.

    heads : (tokens, heads, value_dim) float32;  x : (tokens, columns) float32;  function : one of `GATES`
    """
    tokens, count, size = heads.shape
    each = size if per_head else 1  # elements for a column of x
    grid = tokens, -(-count * size // THREADS)
    gate_kernel(function)(heads, x, first, x.shape[1], count * size, each, grid=grid, block=THREADS)


def hadamard(x: Array, first: int, heads: int, size: int) -> None:
    """Multiply heads, `size` columns of x each from column `first` on, by a Walsh-Hadamard matrix, in place.

    It is that of the largest power of two that divides `size`, block by block, divided by its root: its own inverse.
    x : (tokens, columns) float32
    """
    tokens, columns = x.shape
    block = size & -size
    blocks = heads * size // block
    threads = max(min(THREADS, block // 2), 1)
    hadamard_kernel(x, first, columns, block, grid=(tokens, blocks), block=threads, shared=4 * block)


def _flags(*given: tuple[Any, int]) -> int:
    return sum(bit for value, bit in given if value is not None)


class Steps(NamedTuple):
    """A `Preparation`, and the temperatures of queries, as kernels take it: null for arrays that there aren't."""

    factor: Array
    bias: Array
    limit: Array
    weight: Array
    shift: Array
    heat: Array
    flags: int
    q_epsilon: float
    k_epsilon: float
    v_epsilon: float

    @classmethod
    def of(cls, preparation: Preparation | None, heat: Array | None) -> Steps:
        """None: all has happened, and queries have their temperature."""
        if preparation is None:
            return NO_STEPS
        arrays = (*preparation[:5], heat)
        flags = _flags(*zip(arrays, (_FACTOR, _BIAS, _LIMIT, _WEIGHT, _SHIFT, _HEAT), strict=True))
        flags += _AFTER_ROPE if preparation.after_rope else 0
        epsilons = [0.0, 0.0, 0.0]
        for part, norm in enumerate(preparation.norms):
            if norm is not None:
                flags += (_LAYER_NORM if norm[0] == "layer" else _RMS_NORM) << _NORMS + 2 * part
                epsilons[part] = norm[1]
        return cls(*arrays, flags, *epsilons)


NO_STEPS = Steps(None, None, None, None, None, None, 0, 0.0, 0.0, 0.0)
STEPS = (Steps, "f32* f32* f32* f32* f32* f32* i32 f32 f32 f32")
"""For a kernel's signature."""


@device
def _finished(value, column, factor, bias, limit, flags):
    if flags & _FACTOR:
        value = ptx.multiply(value, factor[column])
    if flags & _BIAS:
        value = ptx.add(value, bias[column])
    if flags & _LIMIT:
        value = ptx.minimum(ptx.maximum(value, -limit[column]), limit[column])
    return value


@functools.cache
def _normalizer(sum_of: Callable[..., Any]) -> Callable[..., Any]:
    """A device function for threads that ``sum_of(value, partial)`` adds up: normalize x[at] … x[at + size - 1].

    A thread reads and writes every `apart`-th element from its `first` on.  Weight and shift begin at `column`.
    partials : what the two sums need
    """

    @device
    def normalize(x, at, size, column, first, apart, layer, epsilon, weight, shift, flags, partials):
        mean, total = float32(0), float32(0)
        if layer:
            i = first
            while i < size:
                total = float32(total + x[at + i])
                i = int32(i + apart)
            mean, total = float32(sum_of(total, partials[0]) / float32(size)), float32(0)
        i = first
        while i < size:
            value = ptx.add(x[at + i], -mean)
            total = float32(total + value * value)
            i = int32(i + apart)
        inverse = ptx.rsqrt(float32(sum_of(total, partials[1]) / float32(size) + epsilon))
        i = first
        while i < size:
            value = ptx.multiply(ptx.add(x[at + i], -mean), inverse)
            if flags & _WEIGHT:
                value = ptx.multiply(value, weight[column + i])
            if flags & _SHIFT:
                value = ptx.add(value, shift[column + i])
            x[at + i] = value
            i = int32(i + apart)

    return normalize


@device
def _sum_of_warp(value, partial):
    return warp_sum(value)


_normalize_by_block, _normalize_by_warp = _normalizer(sum_of_block), _normalizer(_sum_of_warp)


@device
def finish_head(x, row, column, size, steps, room, start):
    """The head in `size` columns of a row, scaled, with its bias and clamped: a warp writes it to its own room."""
    cuda.syncwarp()  # all lanes have read what was there before
    i = int32(cuda.threadIdx.x & 31)
    while i < size:
        value = x[row + column + i]
        room[uint32(start + i)] = _finished(value, column + i, steps.factor, steps.bias, steps.limit, steps.flags)
        i = int32(i + 32)


@device
def turns_first(steps):
    """Whether heads turn before they are normalized."""
    return steps.flags & _AFTER_ROPE != 0


@device
def norm_head(column, size, part, angle, steps, room, start):
    """Normalize a head of q, k or v, which is part 0, 1 or 2, where it is, and multiply q by its temperature.

    A lane reads and writes elements lane, lane + 32, … alone.
    """
    lane, kind = int32(cuda.threadIdx.x & 31), steps.flags >> (_NORMS + 2 * part) & 3
    if kind != _NO_NORM:
        epsilon = steps.q_epsilon if part == 0 else steps.k_epsilon if part == 1 else steps.v_epsilon
        _normalize_by_warp(
            room, start, size, column, lane, int32(32), kind == _LAYER_NORM, epsilon, steps.weight, steps.shift,
            steps.flags, (room, room),
        )  # fmt: skip
    if part == 0 and steps.flags & _HEAT:
        heat, i = steps.heat[angle], lane
        while i < size:
            room[uint32(start + i)] = ptx.multiply(room[uint32(start + i)], heat)
            i = int32(i + 32)


@kernel("f32* f32* f32* f32* i32 i32")
def finish_kernel(out, factor, bias, limit, n, flags):
    """A column a thread, grid (tokens, runs of `THREADS` columns)."""
    column = int32(cuda.blockIdx.y * THREADS + cuda.threadIdx.x)
    if column < n:
        at = int64(cuda.blockIdx.x) * n + column
        out[at] = _finished(out[at], column, factor, bias, limit, flags)


@kernel("f32* i32 i32 i32 f32* f32* f32 i32 i32")
def norm_kernel(x, first, columns, size, weight, shift, epsilon, layer, flags):
    """A block for a piece, grid (tokens, groups), any number of warps."""
    partial = cuda.shared.array(64, float32)
    at = int64(cuda.blockIdx.y) * size
    row = int64(cuda.blockIdx.x) * columns + first + at
    _normalize_by_block(
        x, row, size, at, int32(cuda.threadIdx.x), int32(cuda.blockDim.x), layer != 0, epsilon, weight, shift, flags,
        (partial, partial[32:]),
    )  # fmt: skip


@kernel("f32* i32 i32 i32 f32* i64*")
def scale_kernel(x, first, columns, count, table, angles):
    """A column a thread, grid (tokens, runs of `THREADS` columns)."""
    token, column = int64(cuda.blockIdx.x), int32(cuda.blockIdx.y * THREADS + cuda.threadIdx.x)
    if column < count:
        at = token * columns + first + column
        x[at] = float32(x[at] * table[angles[token]])


@kernel("f32* i32 i32 i32")
def hadamard_kernel(x, first, columns, block):
    """A block for a power of two of columns, grid (tokens, blocks), threads for pairs."""
    room = cuda.shared.array(0, float32)
    thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
    start = int64(cuda.blockIdx.x) * columns + first + int64(cuda.blockIdx.y) * block
    i = thread
    while i < block:
        room[uint32(i)] = x[start + i]
        i = int32(i + threads)
    step = int32(1)
    while step < block:
        cuda.syncthreads()
        i = thread
        while 2 * i < block:
            low = uint32((i & ~(step - 1)) * 2 + (i & (step - 1)))
            a, b = room[low], room[low + uint32(step)]
            room[low], room[low + uint32(step)] = float32(a + b), float32(a - b)
            i = int32(i + threads)
        step = int32(2 * step)
    cuda.syncthreads()
    norm = ptx.rsqrt(float32(block))
    i = thread
    while i < block:
        x[start + i] = float32(room[uint32(i)] * norm)
        i = int32(i + threads)


@functools.cache
def gate_kernel(function: str) -> Kernel:
    """The kernel of `gate`: an element a thread, grid (tokens, runs of `THREADS` elements)."""
    softplus = function == "softplus"

    @device
    def gated(x):
        small = ptx.exp2(float32(-abs(x) * float32(_LOG2_E)))  # of the negative side, without overflow
        if softplus:  # log(1 + small) by its series in w, accurate for every size
            w = float32(small / float32(small + float32(2)))
            w2, tail = float32(w * w), float32(1 / 13)
            for i in range(11, 0, -2):
                tail = float32(float32(1 / i) + w2 * tail)
            value = float32(max(x, float32(0)) + float32(2) * w * tail)
        else:
            value = (small if x < float32(0) else float32(1)) / float32(float32(1) + small)
        return value

    @kernel("f32* f32* i32 i32 i32 i32", function)
    def gate(heads, x, first, columns, elements, each):
        i = int32(cuda.blockIdx.y * THREADS + cuda.threadIdx.x)
        if i < elements:
            token, at = int64(cuda.blockIdx.x), int64(cuda.blockIdx.x) * elements + i
            heads[at] = float32(heads[at] * gated(x[token * columns + first + int32(uint32(i) // uint32(each))]))

    return gate
