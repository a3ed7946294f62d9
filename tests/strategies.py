"""Random cases for the property tests: quantized weights, ragged batches, heads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from qattn import QuantArray, formats, masks

BLOCK_FORMATS = tuple(name for name in formats.names() if not formats.get(name).is_float)
FLOAT_FORMATS = tuple(name for name in formats.names() if formats.get(name).is_float)


def random_weights(name, rows, columns, seed=0):
    """A QuantArray of random bytes, with base scales that keep all values small and finite."""
    fmt = formats.get(name)
    rng = np.random.default_rng(seed)
    if fmt.is_float:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        if name == "BF16":
            return QuantArray(np.ascontiguousarray(values).view(np.uint16)[:, 1::2].copy().view(np.uint8), name)
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[name]
        return QuantArray(values.astype(kind).view(np.uint8), name)
    data = rng.integers(0, 256, (rows, columns // fmt.block * fmt.bytes), np.uint8)
    while True:  # draw the blocks again whose scales are NaN, infinite or huge
        values = formats.dequantize_reference(fmt, data).reshape(-1, fmt.block)
        with np.errstate(invalid="ignore"):
            wild = ~(np.abs(values) < 1e4).all(axis=1)
        if not wild.any():
            return QuantArray(data, name)
        blocks = data.reshape(-1, fmt.bytes)
        blocks[wild] = rng.integers(0, 256, (int(wild.sum()), fmt.bytes), np.uint8)


@st.composite
def weights(draw, names=BLOCK_FORMATS, max_rows=40, max_blocks=3):
    """Quantized rows of any format and any legal shape."""
    name = draw(st.sampled_from(names))
    columns = formats.get(name).block * draw(st.integers(1, max_blocks))
    if formats.get(name).is_float:
        columns *= draw(st.integers(1, 70))
    return random_weights(name, draw(st.integers(1, max_rows)), columns, draw(st.integers(0, 2**32)))


class Heads(NamedTuple):
    """The shape of an attention."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@st.composite
def heads(draw, max_dim=40):
    """Multi-head, grouped-query and multi-query shapes."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    head_dim = draw(st.integers(2, max_dim))
    return Heads(kv_heads * group, kv_heads, head_dim, draw(st.sampled_from([head_dim, draw(st.integers(1, max_dim))])))


def normal(shape, seed=0):
    """Gaussian float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def windows(name):
    """Windows for a mask of that name: small ones, or None if it has none."""
    return st.integers(1, 40) if masks.has_window(name) else st.none()


def visible(mask, tokens, keys):
    """(tokens, keys) bool: what the last `tokens` queries of a sequence see."""
    bounds = [mask.bounds(keys - tokens + i, keys) for i in range(tokens)]
    return np.array([[first <= key < end for key in range(keys)] for first, end in bounds])
