"""Cohere's Command: layers that see everything do not rotate, from Command R7B on."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register


@register("command-r")
def command_r(a: Layer) -> AttentionConfig:
    """Command R: the largest has LayerNorms of queries and keys, a row of weights for each head."""
    return a.attention(rope=a.rope("interleaved"), **a.qk_norms("layer", optional=True))


@register("cohere2")
def cohere2(a: Layer) -> AttentionConfig:
    """Command R7B, Command A."""
    return _windows(a, a.windowed(4), rotates=False)


@register("cohere2moe")
def cohere2moe(a: Layer) -> AttentionConfig:
    """The same with experts; the first layers and those that predict further tokens rotate as well."""
    first = a.index < a.m.integer("leading_dense_block_count", 0)
    return _windows(a, a.windowed(4, dense_first=True), rotates=first or a.index >= a.layers)


def _windows(a: Layer, windowed: bool, *, rotates: bool) -> AttentionConfig:
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("interleaved") if windowed or rotates else None,
    )
