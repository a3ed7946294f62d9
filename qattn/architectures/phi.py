"""Microsoft's Phi."""

from __future__ import annotations

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register


@register("phi3", "phimoe")
def phi3(a: Layer) -> AttentionConfig:
    """Phi 3 and 4: NeoX pairs, LongRoPE.  Its window is as good as never reached, and not applied."""
    return a.attention(rope=a.rope("neox", factors="long"))
