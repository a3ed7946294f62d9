"""What happens to projected rows beside their rotation: scale, bias and clamp, norms of heads, temperature, gates."""

from __future__ import annotations

import math

import numpy as np

from qattn.cpu._jit import helper
from qattn.cpu.kernel import kernel, share

GATES = ("sigmoid", "softplus")


@kernel()
def finish(out, factor, bias, limit, part, parts):
    """out = clamp(out · factor + bias, -limit, limit).

    out : (tokens, n) float32;  factor, bias, limit : (n,) float32, or empty for none
    """
    for row in share(out.shape[0], part, parts):
        if factor.size:
            for column in range(out.shape[1]):
                out[row, column] *= factor[column]
        if bias.size:
            for column in range(out.shape[1]):
                out[row, column] += bias[column]
        if limit.size:
            for column in range(out.shape[1]):
                out[row, column] = min(max(out[row, column], -limit[column]), limit[column])


@helper
def _center(x):
    mean = x.sum() / np.float32(x.size)
    for i in range(x.size):
        x[i] -= mean


@helper(fastmath={"reassoc", "contract"})
def _mean_square(x):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total / np.float32(x.size)


@kernel()
def norm_heads(x, first, groups, size, weight, bias, epsilon, layer, part, parts):
    """Normalize each of `groups` pieces of `size` columns of x, from column `first` on, in place.

    By their root mean square (Zhang and Sennrich, 2019), or if `layer` by mean and variance (Ba et al., 2016).
    x : (tokens, columns) float32;  weight, bias : (groups, size) float32, or (0, 0) for none
    """
    for token in share(x.shape[0], part, parts):
        for group in range(groups):
            piece = x[token, first + group * size : first + (group + 1) * size]
            if layer:
                _center(piece)
            factor = np.float32(1) / np.sqrt(_mean_square(piece) + epsilon)
            for i in range(size):
                piece[i] *= factor
            if weight.size:
                for i in range(size):
                    piece[i] *= weight[group, i]
            if bias.size:
                for i in range(size):
                    piece[i] += bias[group, i]


@kernel()
def scale_tokens(x, first, count, table, angles, part, parts):
    """x[t, first : first + count] *= table[angles[t]]: x (tokens, columns) and table (positions,) float32."""
    for token in share(x.shape[0], part, parts):
        for column in range(first, first + count):
            x[token, column] *= table[angles[token]]


@kernel()
def hadamard(x, first, heads, size, part, parts):
    """Multiply heads, `size` columns of x each from column `first` on, by a Walsh-Hadamard matrix, in place.

    It is that of the largest power of two that divides `size`, block by block, divided by its root: its own inverse.
    x : (tokens, columns) float32
    """
    block = size & -size
    norm = np.float32(1) / np.sqrt(np.float32(block))
    for token in share(x.shape[0], part, parts):
        for begin in range(first, first + heads * size, block):
            piece, step = x[token, begin : begin + block], 1
            while step < block:
                for low in range(0, block, 2 * step):
                    for i in range(low, low + step):
                        piece[i], piece[i + step] = piece[i] + piece[i + step], piece[i] - piece[i + step]
                step *= 2
            for i in range(block):
                piece[i] *= norm


@helper
def _gate(value, function):
    if function == 1:  # softplus, without overflow
        return np.float32(max(value, np.float32(0)) + math.log1p(math.exp(-abs(value))))
    small = np.float32(math.exp(-abs(value)))
    return (small if value < 0 else np.float32(1)) / (np.float32(1) + small)


@kernel()
def gate(heads, x, first, per_head, function, part, parts):
    """heads[t, h, d] *= f(x[t, first + i]) with i = h if `per_head`, else h · value_dim + d.

    heads : (tokens, heads, value_dim) float32;  x : (tokens, columns) float32;  function : index in `GATES`
    """
    _, count, size = heads.shape
    for token in share(heads.shape[0], part, parts):
        for head in range(count):
            if per_head:
                value = _gate(x[token, first + head], function)
                for d in range(size):
                    heads[token, head, d] *= value
            else:
                for d in range(size):
                    heads[token, head, d] *= _gate(x[token, first + head * size + d], function)
