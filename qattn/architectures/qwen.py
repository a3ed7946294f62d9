"""Alibaba's Qwen and the models made of it: NeoX pairs."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig, Gate
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register


@register("qwen", "qwen2", "qwen2moe")
def qwen2(a: Layer) -> AttentionConfig:
    """Qwen to Qwen 2.5, with biases on q, k and v."""
    return a.attention(rope=a.rope("neox"))


@register("qwen3", "qwen3moe", "dots1", "grovemoe", "bailingmoe2", "hy_v3")
def qwen3(a: Layer) -> AttentionConfig:
    """Qwen 3, and others that normalize queries and keys head by head."""
    return a.attention(rope=a.rope("neox"), **a.qk_norms())


@register("dream")
def dream(a: Layer) -> AttentionConfig:
    """Dream, a diffusion model: Qwen 2.5 that sees everything."""
    return a.attention(rope=a.rope("neox"), mask=a.mask(causal=False))


@register("rnd1", "llada-moe")
def rnd1(a: Layer) -> AttentionConfig:
    """RND1 and LLaDA-MoE, diffusion models: Qwen 3 that sees everything."""
    return a.attention(rope=a.rope("neox"), **a.qk_norms(), mask=a.mask(causal=False))


@register("llada")
def llada(a: Layer) -> AttentionConfig:
    """LLaDA, a diffusion model: Llama that sees everything."""
    return a.attention(rope=a.rope("interleaved"), mask=a.mask(causal=False), unused=frozenset({"attn_output.bias"}))


@register("qwen2vl", "paddleocr")
def qwen2vl(a: Layer) -> AttentionConfig:
    """Qwen 2 VL: M-RoPE, with sections one behind the other."""
    return a.attention(rope=a.rope("neox", sections="blocks"))


@register("qwen3vl", "qwen3vlmoe", "qwen3tts")
def qwen3vl(a: Layer) -> AttentionConfig:
    """Qwen 3 VL: M-RoPE, with sections that take turns."""
    return a.attention(rope=a.rope("neox", sections="interleaved"), **a.qk_norms())


def _recurrent(a: Layer, interval: int) -> bool:
    """Whether the layer of a hybrid model is recurrent: the file says for each, or where attention comes."""
    name = "attention.recurrent_layers"
    if a.m.get(name) is not None:
        return bool(a.m.integer(name, layer=a.index, least=0))
    return a.index < a.layers and (a.index + 1) % a.m.integer("full_attention_interval", interval) != 0


@register("qwen3next")
def qwen3next(a: Layer) -> AttentionConfig:
    """Qwen 3 Next: each fourth layer has attention, with a gate that lies in the weight of q."""
    a.not_recurrent(_recurrent(a, 4))
    return a.attention(rope=a.rope("neox"), **a.qk_norms(), gate=Gate("sigmoid", interleaved=True))


@register("qwen35", "qwen35moe")
def qwen35(a: Layer) -> AttentionConfig:
    """Qwen 3.5: the same with M-RoPE."""
    a.not_recurrent(_recurrent(a, 4))
    rope = a.rope("neox", sections="interleaved")
    return a.attention(rope=rope, **a.qk_norms(), gate=Gate("sigmoid", interleaved=True))


@register("qwen4exp")
def qwen4exp(a: Layer) -> AttentionConfig:
    """Qwen 4's experiment: Qwen 3.5 with an indexer in layers that have a compression ratio."""
    a.not_recurrent(_recurrent(a, 4))
    ratio = a.m.integer("attention.compress_ratios", 0, layer=a.index)
    if ratio:
        a.sees_all_it_selects(a.m.integer("attention.indexer.top_k") + ratio - 1)
    return a.attention(
        rope=a.rope("neox", sections="interleaved"),
        **a.qk_norms(),
        gate=Gate("sigmoid", interleaved=True),
        unused=frozenset({f"attn_{name}.bias" for name in "qkv"}),
        tensors=frozenset({f"indexer.{name}_{kind}" for name in "qk" for kind in ("proj", "norm")}),
    )


@register("minimax-01")
def minimax01(a: Layer) -> AttentionConfig:
    """MiniMax-01: each eighth layer has softmax attention."""
    a.not_recurrent(_recurrent(a, 8))
    return a.attention(rope=a.rope("neox"))


@register("minimax-m2")
def minimax_m2(a: Layer) -> AttentionConfig:
    """MiniMax-M2: norms that span all heads."""
    return a.attention(rope=a.rope("neox"), **a.qk_norms())


@register("minimax-m3")
def minimax_m3(a: Layer) -> AttentionConfig:
    """MiniMax-M3: behind the first layers, an indexer selects blocks of keys."""
    if a.index >= a.m.integer("leading_dense_block_count", 0):
        a.sees_all_it_selects(a.m.integer("attention.indexer.top_k") * a.m.integer("attention.indexer.block_size"))
    tensors = frozenset({f"indexer.{name}_{kind}" for name in "qk" for kind in ("proj", "norm")})
    return a.attention(rope=a.rope("neox"), **a.qk_norms(), tensors=tensors)
