"""Z.ai's GLM 4, Tencent's Hunyuan: M-RoPE where the file has sections."""

from __future__ import annotations

from qattn.architectures import _rope
from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register


@register("glm4")
def glm4(a: Layer) -> AttentionConfig:
    """GLM 4."""
    rope = a.rope("neox", sections="blocks") if _rope.use_sections(a.m) else a.rope("interleaved")
    return a.attention(rope=rope)


@register("glm4moe")
def glm4moe(a: Layer) -> AttentionConfig:
    """GLM 4.5 to 4.7: norms of queries and keys in some."""
    sections = "blocks" if _rope.use_sections(a.m) else ""
    return a.attention(rope=a.rope("neox", sections=sections), **a.qk_norms(optional=True))


@register("hunyuan-moe")
def hunyuan_moe(a: Layer) -> AttentionConfig:
    """Hunyuan A13B: queries and keys are normalized after they turn."""
    return a.attention(rope=a.rope("neox"), **a.qk_norms(), norm_after_rope=True)


@register("hunyuan-dense", "hunyuan_vl")
def hunyuan(a: Layer) -> AttentionConfig:
    """Hunyuan: the same; the base grows with ``rope.scaling.alpha``, and with pictures there are sections."""
    size = a.head_dims()[0]
    base = a.freq_base * a.m.number("rope.scaling.alpha", 1.0) ** (size / (size - 2))
    sections = "blocks" if a.m.architecture == "hunyuan_vl" and _rope.use_sections(a.m) else ""
    return a.attention(rope=a.rope("neox", base=base, sections=sections), **a.qk_norms(), norm_after_rope=True)
