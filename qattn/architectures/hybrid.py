"""Models in which few layers have attention, and the others are recurrent or convolutions."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer, NoAttention
from qattn.architectures._registry import refuse, register


@register("jamba")
def jamba(a: Layer) -> AttentionConfig:
    """AI21's Jamba: nothing turns."""
    a.not_recurrent(a.without_kv_heads())
    return a.attention(rope=None)


@register("nemotron_h", "nemotron_h_moe")
def nemotron_h(a: Layer) -> AttentionConfig:
    """Nvidia's Nemotron-H: nothing turns; layers have attention, or a recurrence, or a feed-forward."""
    forward = a.index < a.layers and a.m.integer("feed_forward_length", 0, layer=a.index)
    a.not_recurrent(not forward and a.without_kv_heads())
    if forward:
        raise NoAttention(f"{a.m.architecture}: layer {a.index} is a feed-forward layer; it has no attention")
    return a.attention(rope=None)


@register("falcon-h1")
def falcon_h1(a: Layer) -> AttentionConfig:
    """Falcon-H1: each layer has attention, and a recurrence beside it."""
    return a.attention(rope=a.rope("neox"), unused=frozenset({"attn_output.bias"}))


@register("lfm2", "lfm2moe")
def lfm2(a: Layer) -> AttentionConfig:
    """Liquid's LFM 2: layers without KV heads are convolutions; the others may have a window."""
    a.not_recurrent(a.without_kv_heads())
    window = a.window(0) if a.m.architecture == "lfm2" else 0
    return a.attention(mask=a.mask(window), rope=a.rope("neox", dims=a.rope_dims(bool(window))), **a.qk_norms())


refuse("it is recurrent and has no attention", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
refuse("it is a codec and no language model", "wavtokenizer-dec")
refuse("an image encoder; its layers belong to another program", "clip")
refuse("a draft of another model's tokens, whose hidden states it takes", "eagle3", "dflash")
