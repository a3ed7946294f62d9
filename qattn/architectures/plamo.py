"""PLaMo, OpenELM, BitNet and CogVLM: one fused weight of q, k and v whose scale is not applied, or a norm inside."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register
from qattn.architectures.gemma import window_rope

_PLAIN = frozenset({"attn_qkv.scale", "attn_qkv.bias"})


@register("plamo")
def plamo(a: Layer) -> AttentionConfig:
    """PLaMo: whole heads turn."""
    return a.attention(rope=a.rope("neox", dims=a.head_dims()[0]))


@register("plamo2")
def plamo2(a: Layer) -> AttentionConfig:
    """PLaMo 2: layers without KV heads are recurrent; norms with a row of weights for each head."""
    a.not_recurrent(a.without_kv_heads())
    # The model turns whole heads.  llama.cpp takes the size from the first layer, a recurrent one, and gets 0.
    return a.attention(rope=a.rope("neox"), **a.qk_norms(), scale=a.head_dims()[1] ** -0.5, unused=_PLAIN)


@register("plamo3")
def plamo3(a: Layer) -> AttentionConfig:
    """PLaMo 3: seven of eight layers have a window."""
    window = a.window(0)
    windowed = bool(window) and a.windowed(8)
    return a.attention(
        mask=a.mask(window if windowed else 0),
        **window_rope(a, windowed),
        **a.qk_norms(),
        unused=_PLAIN,
    )


@register("openelm")
def openelm(a: Layer) -> AttentionConfig:
    """Apple's OpenELM: layers differ in their heads."""
    return a.attention(rope=a.rope("neox"), **a.qk_norms(), unused=_PLAIN)


@register("bitnet")
def bitnet(a: Layer) -> AttentionConfig:
    """BitNet: the heads' output is normalized before it is projected."""
    return a.attention(rope=a.rope("neox"), output_norm=a.norm())


@register("cogvlm")
def cogvlm(a: Layer) -> AttentionConfig:
    """CogVLM, the weights that text tokens take: whole heads turn, at the usual base and unscaled."""
    rope = a.unscaled_rope("neox", base=10000.0, dims=a.head_dims()[0])
    return a.attention(rope=rope, unused=_PLAIN)
