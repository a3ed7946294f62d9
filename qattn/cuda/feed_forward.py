"""What a decoder does between its products: norms, the gate of its feed-forward network, and what ends its logits.

Rows are read 16 bytes at a time if they begin at multiples of 16, else 4.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda, types

from qattn.cuda import ptx
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.values import load_four, store_four
from qattn.cuda.warps import sum_of_block

Array = Any  # of CuPy
THREADS = 256
_LOG2_E = np.float32(math.log2(math.e))
_GELU = np.float32(2 * math.sqrt(2 / math.pi))  # since (1 + tanh(z)) / 2 is sigmoid(2z)
_GELU_CUBE = np.float32(0.044715 * 2 * math.sqrt(2 / math.pi))


def rms_norm(x: Array, weight: Array, epsilon: float, out: Array) -> None:
    """out = x / sqrt(mean(x²) + epsilon) · weight, row by row (Zhang and Sennrich, 2019).

    x, out : (tokens, n) float32;  weight : (n,) float32
    Cost: reads x once from memory and once from a cache.
    """
    tokens, n = x.shape
    threads = min(1024, -(-n // 128) * 32)  # a vector each, if that is enough: few tokens are soon done
    norm_kernel(x, weight, epsilon, n, out, grid=tokens, block=threads)


def gated(gate_up: Array, out: Array, activation: str) -> None:
    """out = activation(gate) · up (Shazeer, 2020), where gate is the first half of each row and up the second.

    The activation is "silu", g · sigmoid(g), or "gelu", g · (1 + tanh(√(2/π) · (g + 0.044715 g³))) / 2.
    gate_up : (tokens, 2 · n) float32;  out : (tokens, n) float32
    """
    tokens, n = out.shape
    gate_kernel(activation)(gate_up, n, out, grid=(tokens, -(-n // (4 * THREADS))), block=THREADS)


def add(x: Array, y: Array) -> None:
    """x += y: float32 of the same shape."""
    add_kernel(x, y, x.size, grid=-(-x.size // (4 * THREADS)), block=THREADS)


def softcap(x: Array, limit: float) -> None:
    """x = limit · tanh(x / limit), in place: x (tokens, n) float32."""
    cap_kernel(x, limit, x.size, grid=-(-x.size // THREADS), block=THREADS)


@device
def _aligned(x, y, z):
    return (ptx.address(x, 0) | ptx.address(y, 0) | ptx.address(z, 0)) & 15 == 0


@kernel("f32* f32* f32 i32 f32*")
def norm_kernel(x, weight, epsilon, n, out):
    """A thread block for a row, any number of warps."""
    partial = cuda.shared.array(32, types.float32)
    thread, threads, row = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x), np.int64(cuda.blockIdx.x) * n
    vectors = np.int32(n >> 2) if n & 3 == 0 and _aligned(x, weight, out) else np.int32(0)
    total = np.float32(0)
    i = thread
    while i < vectors:
        a, b, c, d = load_four(x, row + i * 4)
        total += a * a + b * b + (c * c + d * d)
        i = np.int32(i + threads)
    i = np.int32(thread + vectors * 4)
    while i < n:
        total += x[row + i] * x[row + i]
        i = np.int32(i + threads)
    factor = ptx.rsqrt(sum_of_block(total, partial) / np.float32(n) + epsilon)
    i = thread
    while i < vectors:
        a, b, c, d = load_four(x, row + i * 4)
        e, f, g, h = load_four(weight, i * 4)
        store_four(out, row + i * 4, (a * factor * e, b * factor * f, c * factor * g, d * factor * h))
        i = np.int32(i + threads)
    i = np.int32(thread + vectors * 4)
    while i < n:
        out[row + i] = x[row + i] * factor * weight[i]
        i = np.int32(i + threads)


@functools.cache
def gate_kernel(activation: str) -> Kernel:
    """Four columns a thread, grid (tokens, runs of 4 · `THREADS` columns)."""
    gelu = activation == "gelu"

    @device
    def gated(g, up):
        z = g
        if gelu:
            z = g * (g * g * _GELU_CUBE + _GELU)
        small = ptx.exp2(-abs(z) * _LOG2_E)  # exp of what is not positive: no overflow
        return g * ((small if z < np.float32(0) else np.float32(1)) / (np.float32(1) + small)) * up

    @kernel("f32* i32 f32*", activation)
    def gate(gate_up, n, out):
        row, first = np.int64(cuda.blockIdx.x) * n, np.int32(cuda.blockIdx.y * (4 * THREADS))
        thread = np.int32(cuda.threadIdx.x)
        if n & 3 == 0 and _aligned(gate_up, out, out):
            i = np.int32(first + thread * 4)
            if i < n:
                a, b, c, d = load_four(gate_up, 2 * row + i)
                e, f, g, h = load_four(gate_up, 2 * row + n + i)
                store_four(out, row + i, (gated(a, e), gated(b, f), gated(c, g), gated(d, h)))
        else:
            for j in range(4):
                i = np.int32(first + j * THREADS + thread)
                if i < n:
                    out[row + i] = gated(gate_up[2 * row + i], gate_up[2 * row + n + i])

    return gate


@kernel("f32* f32* i64")
def add_kernel(x, y, n):
    """Four numbers a thread."""
    first, thread = np.int64(cuda.blockIdx.x) * (4 * THREADS), np.int32(cuda.threadIdx.x)
    i = first + thread * 4
    if i + 4 <= n and _aligned(x, y, y):
        a, b, c, d = load_four(x, i)
        e, f, g, h = load_four(y, i)
        store_four(x, i, (a + e, b + f, c + g, d + h))
    elif i < n:
        for j in range(4):
            if i + j < n:
                x[i + j] += y[i + j]


@kernel("f32* f32 i64")
def cap_kernel(x, limit, n):
    """A number a thread.  tanh(y) = ±(1 - t) / (1 + t) with t = exp(-2 |y|)."""
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < n:
        y = x[i] / limit
        t = ptx.exp2(-abs(y) * (np.float32(2) * _LOG2_E))
        tanh = (np.float32(1) - t) / (np.float32(1) + t)
        x[i] = limit * (-tanh if y < np.float32(0) else tanh)
