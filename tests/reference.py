"""The whole layer in plain float64 NumPy: what every kernel is compared with, short enough to check by eye."""

from __future__ import annotations

import numpy as np

from qattn._backend import as_host


def nmse(got, want):
    """Normalized mean squared error: |got - want|² / |want|²."""
    got, want = np.asarray(as_host(got), np.float64), np.asarray(as_host(want), np.float64)
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-300))


def rotate(x, positions, rope):
    """x (tokens, heads, head_dim): pair i of each head turned by position · frequency i."""
    x = np.array(x, np.float64)
    half = rope.rope_dims // 2
    a = np.arange(half) if rope.neox else 2 * np.arange(half)
    b = a + (half if rope.neox else 1)
    angles = np.asarray(positions)[:, None, None] * rope.frequencies
    first, second = x[..., a], x[..., b]
    x[..., a], x[..., b] = (
        first * np.cos(angles) - second * np.sin(angles),
        first * np.sin(angles) + second * np.cos(angles),
    )
    return x


def attention(q, k, v, scale, visible, *, cap=0.0, slopes=None, sinks=None, bias=0.0):
    """q (tokens, heads, d), k and v (keys, kv_heads, ...), visible (tokens, keys) bool → output and log-sum-exp.

    The scores s become cap · tanh(s / cap), lose slopes[h] · distance, and gain bias (tokens or heads, tokens, keys).
    """
    group, (tokens, keys) = q.shape[1] // k.shape[1], np.shape(visible)
    k, v = (np.repeat(np.asarray(a, np.float64), group, axis=1) for a in (k, v))
    scores = np.einsum("thd,khd->htk", np.asarray(q, np.float64), k) * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    if slopes is not None:
        distance = np.abs(np.arange(keys) - np.arange(keys - tokens, keys)[:, None])
        scores = scores - np.asarray(slopes, np.float64)[:, None, None] * distance
    scores = np.where(visible, scores + bias, -np.inf)
    sinks = np.full(len(scores), -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    peak = np.maximum(scores.max(axis=-1, initial=-1e300), sinks[:, None])[..., None]
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks[:, None, None] - peak)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(total > 0, weights / total, 0)
        lse = (np.log(total) + peak)[..., 0].T
    return np.einsum("htk,khd->thd", weights, v), lse


def causal(tokens, keys):
    """Token i is key keys - tokens + i, and sees the keys up to itself."""
    return np.arange(keys) <= np.arange(keys - tokens, keys)[:, None]


def layer(x, wqkv, wo, rope, heads, kv_heads, head_dim, *, bias=0.0, scale=None, visible=None):
    """A layer's output for a whole sequence x (tokens, hidden) from an empty cache."""
    tokens = len(x)
    qkv = np.asarray(x, np.float64) @ np.asarray(wqkv, np.float64).T + bias
    q, k, v = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
    q, k = (rotate(a.reshape(tokens, -1, head_dim), np.arange(tokens), rope) for a in (q, k))
    v = v.reshape(tokens, kv_heads, -1)
    visible = causal(tokens, tokens) if visible is None else visible
    out, _ = attention(q, k, v, head_dim**-0.5 if scale is None else scale, visible)
    return out.reshape(tokens, -1) @ np.asarray(wo, np.float64).T
