"""Llama and its kin: one norm before the block, rotation of whole heads, 1 / sqrt(head_dim)."""

from __future__ import annotations

from qattn.architectures import _rope
from qattn.architectures._config import AttentionConfig, Norm, Temperature
from qattn.architectures._layer import Layer, NoAttention
from qattn.architectures._registry import register
from qattn.masks import Chunked


@register("llama", "llama-embed", "minicpm")
def llama(a: Layer) -> AttentionConfig:
    """Llama, Mistral, Mixtral, SmolLM, MiniCPM: interleaved pairs."""
    return a.attention(rope=a.rope("interleaved", factors="either"))


@register("arcee", "nanbeige")
def with_factors(a: Layer) -> AttentionConfig:
    """Arcee, Nanbeige: Llama with its factors of the frequencies alone."""
    return a.attention(rope=a.rope("interleaved", factors="freqs"))


@register("arctic", "bailingmoe", "chatglm", "deepseek", "internlm2", "xverse")
def without_factors(a: Layer) -> AttentionConfig:
    """InternLM 2, ChatGLM, DeepSeek, Ling and others: interleaved pairs, and nothing else."""
    return a.attention(rope=a.rope("interleaved"))


@register("deci")
def deci(a: Layer) -> AttentionConfig:
    """Nemotron of Llama's making, whose layers differ: some have no attention, or only a matrix in its place."""
    heads, kv_heads = (a.m.integer(f"attention.head_count{kv}", layer=a.index, least=0) for kv in ("", "_kv"))
    if not heads or not kv_heads:
        raise NoAttention(f"{a.m.architecture}: layer {a.index} has no attention")
    return llama(a)


@register("ernie4_5", "ernie4_5-moe")
def ernie(a: Layer) -> AttentionConfig:
    """ERNIE 4.5: interleaved pairs."""
    return a.attention(rope=a.rope("interleaved"), unused=frozenset({"attn_output.bias"}))


@register("mistral3")
def mistral3(a: Layer) -> AttentionConfig:
    """Ministral 3: Llama with a temperature beyond the original context."""
    scaling = _rope.model_scaling(
        a.m,
        log_multiplier=a.m.number("rope.scaling.yarn_log_multiplier", 0.0),
        beta_fast=a.m.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=a.m.number("rope.scaling.yarn_beta_slow", 1.0),
    )
    growth = a.m.number("attention.temperature_scale", 0.0)
    return a.attention(
        rope=a.rope("interleaved", factors="either", scaling=scaling),
        temperature=Temperature(scaling.original, growth) if growth else None,
    )


@register("llama4")
def llama4(a: Layer) -> AttentionConfig:
    """Llama 4: chunks; each fourth layer sees everything, does not rotate, and has a temperature."""
    chunked = a.m.get("attention.sliding_window") != 0
    windowed = chunked and a.windowed(4)
    if windowed and not a.causal:
        raise a.refuse("sees later keys in chunks")
    rotates = not chunked or (a.index + 1) % 4 != 0
    normed = rotates and a.m.integer("expert_count", 0) != 128
    norm = a.norm("rms", weighted=False) if normed else None
    base = a.freq_base_swa() if windowed else None
    return a.attention(
        mask=Chunked(8192) if windowed else a.mask(),
        rope=a.rope("interleaved", factors="freqs", base=base) if rotates else None,
        q_norm=norm,
        k_norm=norm,
        norm_after_rope=True,
        temperature=None if rotates else Temperature(8192, 0.1, 1),
    )


@register("smollm3")
def smollm3(a: Layer) -> AttentionConfig:
    """SmolLM 3: each fourth layer does not rotate."""
    return a.attention(rope=a.rope("interleaved") if (a.index + 1) % 4 else None)


@register("apertus")
def apertus(a: Layer) -> AttentionConfig:
    """Apertus: norms of queries and keys."""
    return a.attention(
        rope=a.rope("neox", factors="either"),
        **a.qk_norms(),
        unused=frozenset({"attn_q_norm.bias", "attn_k_norm.bias"}),
    )


@register("maincoder")
def maincoder(a: Layer) -> AttentionConfig:
    """Maincoder: queries and keys are normalized after they turn."""
    return a.attention(rope=a.rope("interleaved"), **a.qk_norms(), norm_after_rope=True)


@register("chameleon")
def chameleon(a: Layer) -> AttentionConfig:
    """Chameleon: LayerNorms of queries and keys, a row of weights for each head."""
    norm = Norm("layer", 1e-5)
    return a.attention(rope=a.rope("interleaved"), q_norm=norm, k_norm=norm)


@register("refact")
def refact(a: Layer) -> AttentionConfig:
    """Refact: ALiBi."""
    return a.attention(rope=None, alibi=8.0, unused=frozenset({"attn_output.bias"}))


@register("baichuan")
def baichuan(a: Layer) -> AttentionConfig:
    """Baichuan: the model of 32 layers rotates, that of 40 has ALiBi."""
    return a.attention(rope=a.rope("interleaved") if a.layers == 32 else None, alibi=8.0 if a.layers == 40 else 0.0)


@register("talkie")
def talkie(a: Layer) -> AttentionConfig:
    """Talkie: queries and keys are normalized after they turn; queries by a number for each head."""
    return a.attention(rope=a.rope("neox"), q_norm=a.norm(), k_norm=a.norm(weighted=False), norm_after_rope=True)


@register("hrm_text")
def hrm_text(a: Layer) -> AttentionConfig:
    """HRM-Text, which runs its few layers many times: a gate for each element."""
    return a.attention(rope=a.rope("neox"), **a.gate("sigmoid"))
