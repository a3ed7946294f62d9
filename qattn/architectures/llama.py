"""Llama and the models that differ from it in the pairing of RoPE or in biases only."""

from __future__ import annotations

import functools

import numpy as np

from qattn.architectures._registry import AttentionConfig, Metadata, register
from qattn.rope import RotaryEmbedding
from qattn.rope.tables import Pairing


@register("llama")
def llama(m: Metadata, layer: int) -> AttentionConfig:
    """Llama, Mistral, SmolLM: interleaved pairs."""
    return _describe(m, layer, "interleaved")


@register("qwen2")
def qwen2(m: Metadata, layer: int) -> AttentionConfig:
    """Qwen 2: NeoX pairs, and biases on q, k and v."""
    return _describe(m, layer, "neox")


def _describe(m: Metadata, layer: int, pairing: Pairing) -> AttentionConfig:
    hidden = m.integer("embedding_length")
    heads = m.integer("attention.head_count", layer=layer)
    head_dim = m.integer("attention.key_length", hidden // heads or None)
    scale = m.number("rope.scaling.factor", 1.0) if m.get("rope.scaling.type") == "linear" else 1.0
    factors = m.model.mapped("rope_freqs.weight") if "rope_freqs.weight" in m.model else None
    rope = _shared_rope(
        m.integer("rope.dimension_count", head_dim),
        m.number("rope.freq_base", 10000.0),
        pairing,
        scale,
        None if factors is None else tuple(np.asarray(factors).ravel().tolist()),
    )
    return AttentionConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=m.integer("attention.head_count_kv", heads, layer=layer),
        head_dim=head_dim,
        value_dim=m.integer("attention.value_length", head_dim),
        rope=rope,
        scale=head_dim**-0.5,
    )


@functools.lru_cache(maxsize=8)
def _shared_rope(
    dims: int, theta: float, pairing: Pairing, scale: float, factors: tuple[float, ...] | None
) -> RotaryEmbedding:
    """The same embedding for all layers: its tables are as long as a context."""
    return RotaryEmbedding(dims, theta, pairing=pairing, scale=scale, factors=factors)
