"""Ai2's OLMo."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register
from qattn.architectures.gpt import clamp


@register("olmo")
def olmo(a: Layer) -> AttentionConfig:
    """OLMo: clamped projections."""
    return a.attention(rope=a.rope("interleaved"), clamp_qkv=clamp(a))


@register("olmo2")
def olmo2(a: Layer) -> AttentionConfig:
    """OLMo 2 and 3: norms that span all heads; layers with a window know no scaling of positions."""
    window = a.window(0)
    windowed = bool(window) and a.windowed(4)
    rope = a.unscaled_rope("neox") if windowed else a.rope("neox")
    return a.attention(mask=a.mask(window if windowed else 0), rope=rope, **a.qk_norms())


@register("mellum")
def mellum(a: Layer) -> AttentionConfig:
    """JetBrains' Mellum: the same, with norms head by head."""
    return olmo2(a)


@register("olmoe")
def olmoe(a: Layer) -> AttentionConfig:
    """OLMoE: norms that span all heads."""
    return a.attention(rope=a.rope("neox"), **a.qk_norms())
