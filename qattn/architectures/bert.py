"""Encoders: BERT and its kin, whose tokens see each other whatever the metadata says."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register
from qattn.architectures.gemma import window_rope
from qattn.masks import Null, SymmetricWindow


@register("bert")
def bert(a: Layer) -> AttentionConfig:
    """BERT: positions are a part of the embeddings."""
    return a.attention(rope=None, mask=Null())


@register("nomic-bert", "nomic-bert-moe", "jina-bert-v3", "eurobert")
def rotating(a: Layer) -> AttentionConfig:
    """Nomic's and Jina's embeddings, EuroBERT: NeoX pairs."""
    return a.attention(rope=a.rope("neox"), mask=Null())


@register("neo-bert")
def neo_bert(a: Layer) -> AttentionConfig:
    """NeoBERT: interleaved pairs."""
    return a.attention(rope=a.rope("interleaved"), mask=Null())


@register("jina-bert-v2")
def jina(a: Layer) -> AttentionConfig:
    """Jina's embeddings of the second generation: ALiBi to both sides; LayerNorms that span all heads in some."""
    return a.attention(rope=None, mask=Null(), alibi=8.0, **a.qk_norms("layer", optional=True))


@register("modern-bert")
def modern_bert(a: Layer) -> AttentionConfig:
    """ModernBERT: two of three layers have a window to both sides, with positions of their own."""
    window = a.window(0)
    windowed = bool(window) and a.windowed(3, dense_first=True)
    return a.attention(mask=SymmetricWindow(window) if windowed else Null(), **window_rope(a, windowed))
