"""What a decoder does between its products: the norm before each, and the gate of its feed-forward network."""

from __future__ import annotations

import math

import numba
import numpy as np

from qattn.cpu.kernel import kernel, share
from qattn.cpu.simd import LANES, micro_kernel

_LOG2_E = math.log2(math.e)


@micro_kernel
def _sum_of_squares(e, x, vectors, out):  # type: ignore[no-untyped-def]
    """out[0] = the sum of the squares in the first `vectors` vectors of x."""
    total = e.register(e.constant(0.0, e.F32))
    with e.loop(vectors) as i:
        value = x.at(i * (4 * LANES)).load(e.F32)
        total.set(e.fma(value, value, total.get()))
    out.store(e.sum(total.get()))


@micro_kernel
def _scaled(e, x, weight, factor, vectors, out):  # type: ignore[no-untyped-def]
    """out = x · factor · weight, for the first `vectors` vectors."""
    factors = factor.splat(e.F32)
    with e.loop(vectors) as i:
        at = i * (4 * LANES)
        out.at(at).store(x.at(at).load(e.F32) * factors * weight.at(at).load(e.F32))


@micro_kernel
def _gated(e, gate, up, vectors, out):  # type: ignore[no-untyped-def]
    """out = silu(gate) · up, for the first `vectors` vectors: silu(g) = g / (1 + exp(-g)), without overflow."""
    zero, one = e.constant(0.0, e.F32), e.constant(1.0, e.F32)
    with e.loop(vectors) as i:
        at = i * (4 * LANES)
        g = gate.at(at).load(e.F32)
        small = e.exp2(e.absolute(g) * -_LOG2_E)
        sigmoid = g.compare("<", zero).where(small, one) / (one + small)
        out.at(at).store(g * sigmoid * up.at(at).load(e.F32))


@numba.njit
def _norm_row(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    vectors = x.size // LANES
    total = np.zeros(1, np.float32)
    _sum_of_squares((x, vectors, total))
    for i in range(vectors * LANES, x.size):
        total[0] += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total[0] / np.float32(x.size) + epsilon)
    _scaled((x, weight, factor, vectors, out))
    for i in range(vectors * LANES, x.size):
        out[i] = x[i] * factor * weight[i]


@numba.njit
def _gate_row(gate, up, out):  # type: ignore[no-untyped-def]
    vectors = out.size // LANES
    _gated((gate, up, vectors, out))
    for i in range(vectors * LANES, out.size):
        small = np.exp(-abs(gate[i]))
        out[i] = gate[i] * ((small if gate[i] < 0 else np.float32(1)) / (np.float32(1) + small)) * up[i]


@kernel()
def rms_norm(x, weight, epsilon, out, part, parts):  # type: ignore[no-untyped-def]
    """out = x / sqrt(mean(x²) + epsilon) · weight, row by row (Zhang and Sennrich, 2019).

    x, out : (tokens, n) float32;  weight : (n,) float32;  epsilon : float32
    """
    for row in share(x.shape[0], part, parts):
        _norm_row(x[row], weight, epsilon, out[row])


@kernel()
def swiglu(gate_up, out, part, parts):  # type: ignore[no-untyped-def]
    """out = silu(gate) · up, where gate is the first half of each row and up the second (Shazeer, 2020).

    gate_up : (tokens, 2 · n) float32;  out : (tokens, n) float32
    """
    size = out.shape[1]
    for row in share(out.shape[0], part, parts):
        _gate_row(gate_up[row, :size], gate_up[row, size:], out[row])


@kernel()
def add(x, y, part, parts):  # type: ignore[no-untyped-def]
    """x += y: (tokens, n) float32 both."""
    for row in share(x.shape[0], part, parts):
        for column in range(x.shape[1]):
            x[row, column] += y[row, column]
