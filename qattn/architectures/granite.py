"""IBM's Granite: a scale of its own, and layers that do not rotate."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import refuse, register


def _rotates(a: Layer) -> bool:
    return bool(a.m.get("rope.scaling.finetuned", True))


@register("granite")
def granite(a: Layer) -> AttentionConfig:
    """Granite."""
    rope = a.rope("interleaved", factors="either") if _rotates(a) else None
    return a.attention(rope=rope, scale=a.attention_scale())


@register("granitemoe")
def granitemoe(a: Layer) -> AttentionConfig:
    """Granite with experts."""
    return a.attention(rope=a.rope("interleaved", factors="either"), scale=a.attention_scale())


@register("granitehybrid")
def granitehybrid(a: Layer) -> AttentionConfig:
    """Granite 4: layers without KV heads are recurrent."""
    a.not_recurrent(a.without_kv_heads())
    rope = a.rope("interleaved", factors="freqs") if _rotates(a) else None
    return a.attention(rope=rope, scale=a.attention_scale())


@register("granite_swa")
def granite_swa(a: Layer) -> AttentionConfig:
    """Granite with windows and sinks."""
    windowed = a.windowed()
    pattern = a.m.array("attention.rope_pattern")
    rotates = pattern is None or bool(a.m.integer("attention.rope_pattern", layer=a.index, least=0))
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("interleaved", factors="either") if rotates else None,
        scale=a.attention_scale(),
        sinks=True,
    )


refuse("each token chooses its adapter", "graniteswitch")
