"""What a decoder does between its products: norms, the gate of its feed-forward network, and what ends its logits."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from qattn.cpu._jit import generated, helper
from qattn.cpu.attend_tiles import cap
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.simd import LANES, micro_kernel

_LOG2_E = math.log2(math.e)
_GELU = np.float32(2 * math.sqrt(2 / math.pi))  # since (1 + tanh(z)) / 2 is sigmoid(2z)
_GELU_CUBE = np.float32(0.044715 * 2 * math.sqrt(2 / math.pi))


@micro_kernel
def _sum_of_squares(e, x, vectors, out):
    """out[0] = the sum of the squares in the first `vectors` vectors of x."""
    total = e.register(e.constant(0.0, e.F32))
    with e.loop(vectors) as i:
        value = x.at(i * (4 * LANES)).load(e.F32)
        total.set(e.fma(value, value, total.get()))
    out.store(e.sum(total.get()))


@micro_kernel
def _scaled(e, x, weight, factor, vectors, out):
    """out = x · factor · weight, for the first `vectors` vectors."""
    factors = factor.splat(e.F32)
    with e.loop(vectors) as i:
        at = i * (4 * LANES)
        out.at(at).store(x.at(at).load(e.F32) * factors * weight.at(at).load(e.F32))


def _gated_kernel(activation: str) -> Any:
    """out = activation(gate) · up, for the first `vectors` vectors."""

    @micro_kernel
    def run(e, gate, up, vectors, out):
        zero, one = e.constant(0.0, e.F32), e.constant(1.0, e.F32)
        with e.loop(vectors) as i:
            at = i * (4 * LANES)
            g = gate.at(at).load(e.F32)
            z = g * (g * g * float(_GELU_CUBE) + float(_GELU)) if activation == "gelu" else g
            small = e.exp2(e.absolute(z) * -_LOG2_E)
            sigmoid = z.compare("<", zero).where(small, one) / (one + small)  # exp of what is not positive: no overflow
            out.at(at).store(g * sigmoid * up.at(at).load(e.F32))

    return run


@helper
def _norm_row(x, weight, epsilon, out):
    vectors = x.size // LANES
    total = np.zeros(1, np.float32)
    _sum_of_squares((x, vectors, total))
    for i in range(vectors * LANES, x.size):
        total[0] += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total[0] / np.float32(x.size) + epsilon)
    _scaled((x, weight, factor, vectors, out))
    for i in range(vectors * LANES, x.size):
        out[i] = x[i] * factor * weight[i]


@kernel()
def rms_norm(x, weight, epsilon, out, part, parts):
    """out = x / sqrt(mean(x²) + epsilon) · weight, row by row (Zhang and Sennrich, 2019).

    x, out : (tokens, n) float32;  weight : (n,) float32;  epsilon : float32
    """
    for row in share(x.shape[0], part, parts):
        _norm_row(x[row], weight, epsilon, out[row])


@functools.cache
def gated(activation: str) -> Kernel:
    """The kernel ``run(gate_up, out)``: out = activation(gate) · up (Shazeer, 2020).

    The activation is "silu", g · sigmoid(g), or "gelu", g · (1 + tanh(√(2/π) · (g + 0.044715 g³))) / 2.
    The gate is the first half of each row, `up` the second.
    gate_up : (tokens, 2 · n) float32;  out : (tokens, n) float32
    """
    gated_vectors, gelu = _gated_kernel(activation), activation == "gelu"

    @generated(activation)
    def gate_row(gate, up, out):
        vectors = out.size // LANES
        gated_vectors((gate, up, vectors, out))
        for i in range(vectors * LANES, out.size):
            g = gate[i]
            z = g * (g * g * _GELU_CUBE + _GELU) if gelu else g
            small = np.exp(-abs(z))
            out[i] = g * ((small if z < 0 else np.float32(1)) / (np.float32(1) + small)) * up[i]

    @kernel(activation)
    def run(gate_up, out, part, parts):
        size = out.shape[1]
        for row in share(out.shape[0], part, parts):
            gate_row(gate_up[row, :size], gate_up[row, size:], out[row])

    return run


@kernel()
def add(x, y, part, parts):
    """x += y: (tokens, n) float32 both."""
    for row in share(x.shape[0], part, parts):
        for column in range(x.shape[1]):
            x[row, column] += y[row, column]


@kernel()
def softcap(x, limit, part, parts):
    """x = limit · tanh(x / limit), in place: x (tokens, n) float32."""
    tokens, n = x.shape
    vectors = n // LANES
    mine = share(vectors, part, parts)
    for row in range(tokens):
        cap((x[row, mine.start * LANES :], len(mine), limit))
        if part == 0:
            for i in range(vectors * LANES, n):
                x[row, i] = limit * np.tanh(x[row, i] / limit)
