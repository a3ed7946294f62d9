"""Google's Gemma: NeoX pairs, queries that are scaled, and from Gemma 2 on windows of their own positions."""

from __future__ import annotations

from typing import Any

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import refuse, register
from qattn.errors import GGUFError
from qattn.masks import Causal, Null, SymmetricWindow


@register("gemma")
def gemma(a: Layer) -> AttentionConfig:
    """Gemma."""
    return a.attention(rope=a.rope("neox"))


def _query_scale(a: Layer, widest: int) -> float:
    """1 / sqrt(head_dim), but of an even share of the hidden size in the largest model, which has `widest` layers."""
    return (a.hidden // a.m.integer("attention.head_count") if a.layers == widest else a.head_dims()[0]) ** -0.5


@register("gemma2")
def gemma2(a: Layer) -> AttentionConfig:
    """Gemma 2: every other layer has a window; scores are capped."""
    windowed = a.windowed(2)
    return a.attention(
        mask=a.mask(a.window(4096) if windowed else 0),
        rope=a.rope("neox", base=a.freq_base_swa() if windowed else None),
        scale=_query_scale(a, 46),
        softcap=a.m.number("attn_logit_softcapping", 50.0),
    )


def window_rope(a: Layer, windowed: bool, **given: Any) -> dict[str, Any]:
    """The embedding of layers whose windows have a base of their own, and are not scaled."""
    if windowed:
        given |= {"base": a.freq_base_swa(10000.0), "factor": 1.0}
    return {"rope": a.rope("neox", **given)}


@register("gemma3")
def gemma3(a: Layer) -> AttentionConfig:
    """Gemma 3: five of six layers have a window; norms of queries and keys."""
    window = a.window(0)
    windowed = bool(window) and a.windowed(6)
    return a.attention(
        mask=a.mask(window if windowed else 0),
        **window_rope(a, windowed),
        **a.qk_norms(),
        scale=_query_scale(a, 62),
    )


@register("gemma-embedding")
def gemma_embedding(a: Layer) -> AttentionConfig:
    """EmbeddingGemma, an encoder: windows to both sides."""
    windowed = a.windowed(6)
    return a.attention(
        mask=SymmetricWindow(a.window()) if windowed else Null(),
        **window_rope(a, windowed),
        **a.qk_norms(),
    )


def _shared(a: Layer, first: int, windowed: bool) -> int | None:
    """The layer whose cache this one reads: from layer `first` on, the last one before it of its kind."""
    if a.index < first:
        return None
    if first < 2:
        raise GGUFError(f"{a.m.architecture} shares the keys and values of its layers from {first} on; expected 2")
    return first - (2 if windowed else 1)


@register("gemma3n")
def gemma3n(a: Layer) -> AttentionConfig:
    """Gemma 3n: from layer 20 on, queries alone; values are normalized."""
    windowed = a.windowed(5)
    shared = _shared(a, 20, windowed)
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        **window_rope(a, windowed),
        **a.qk_norms(),
        v_norm=a.norm(weighted=False),
        scale=1.0,
        shares_cache_of=shared,
        unused=frozenset()
        if shared is None
        else frozenset({f"attn_{name}.{kind}" for name in ("q", "qkv") for kind in ("bias", "scale")}),
    )


@register("gemma4")
def gemma4(a: Layer) -> AttentionConfig:
    """Gemma 4: heads differ in size between the kinds of layers; values may be what the weight of keys gives."""
    windowed = a.windowed()
    first = a.m.integer("block_count") - a.m.integer("attention.shared_kv_layers", 0)
    fused = a.has("attn_qkv.weight")
    return a.attention(
        window=windowed,
        mask=a.mask(a.window()) if windowed else Causal(),  # whatever ``attention.causal`` says
        **window_rope(a, windowed, dims=a.rope_dims(windowed), factors="" if windowed else "freqs"),
        **a.qk_norms(),
        v_norm=a.norm(weighted=False),
        scale=1.0,
        value_from_key=not fused and not a.has("attn_v.weight"),
        shares_cache_of=_shared(a, first, windowed),
    )


refuse("it reads the keys and values of another model", "gemma4-assistant")
