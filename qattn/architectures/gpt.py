"""GPT-2, GPT-NeoX and their kin: LayerNorms before the block, biases, often one fused weight of q, k and v."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import refuse, register


@register("gpt2", "starcoder")
def gpt2(a: Layer) -> AttentionConfig:
    """GPT-2 and StarCoder: positions are a part of the embeddings."""
    return a.attention(rope=None)


@register("gptneox", "falcon", "codeshell", "jais2", "nemotron", "orion", "phi2", "starcoder2")
def gptneox(a: Layer) -> AttentionConfig:
    """GPT-NeoX, Falcon, StarCoder 2 and others that rotate."""
    return a.attention(rope=a.rope("neox"))


@register("bloom")
def bloom(a: Layer) -> AttentionConfig:
    """BLOOM: ALiBi."""
    return a.attention(rope=None, alibi=8.0)


@register("jais")
def jais(a: Layer) -> AttentionConfig:
    """Jais: ALiBi, and scores that are divided by the size of a head."""
    return a.attention(rope=None, alibi=a.m.number("attention.max_alibi_bias", 0.0), scale=1 / a.head_dims()[0])


def clamp(a: Layer) -> float | None:
    """The limit of projected q, k and v."""
    return a.m.number("attention.clamp_kqv", 0.0) or None


@register("mpt")
def mpt(a: Layer) -> AttentionConfig:
    """MPT: ALiBi, clamped projections, and norms that span all heads if there is one of queries."""
    normed = a.has("attn_q_norm.weight")
    return a.attention(
        rope=None,
        alibi=a.m.number("attention.max_alibi_bias", 0.0),
        clamp_qkv=clamp(a),
        **(a.qk_norms("layer") if normed else {}),
        unused=frozenset() if normed else frozenset({"attn_k_norm.weight", "attn_k_norm.bias"}),
    )


@register("dbrx")
def dbrx(a: Layer) -> AttentionConfig:
    """DBRX: clamped projections."""
    return a.attention(rope=a.rope("neox"), clamp_qkv=clamp(a))


@register("stablelm")
def stablelm(a: Layer) -> AttentionConfig:
    """StableLM: LayerNorms of queries and keys in some, a row of weights for each head."""
    unused = frozenset({"attn_q_norm.bias", "attn_k_norm.bias"})
    return a.attention(rope=a.rope("neox"), **a.qk_norms("layer", optional=True), unused=unused)


@register("pockettts")
def pockettts(a: Layer) -> AttentionConfig:
    """Pocket TTS: interleaved pairs."""
    return a.attention(rope=a.rope("interleaved"))


refuse("how its files name their tensors is not known", "gptj")
