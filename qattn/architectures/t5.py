"""Google's T5: encoder and decoder, and biases by distance."""

from __future__ import annotations

from typing import Literal

from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register
from qattn.masks import Causal, Null


@register("t5", parts=("decoder", "encoder", "cross"))
def t5(a: Layer) -> AttentionConfig:
    """T5, FLAN-T5: encoder, decoder, and attention of the one to the other, which has no biases."""
    if a.prefix.endswith("cross_"):
        return a.attention(rope=None, scale=1.0, mask=Null(), cross=True, output="attn_o")
    return _by_distance(a, "two-sided" if a.prefix.startswith("enc.") else "one-sided")


@register("t5encoder", parts=("encoder",))
def t5_encoder(a: Layer) -> AttentionConfig:
    """T5's encoder alone."""
    return _by_distance(a, "two-sided")


def _by_distance(a: Layer, sides: Literal["one-sided", "two-sided"]) -> AttentionConfig:
    own = f"{a.prefix}attn_rel_b.weight"
    table = own if own in a.m.model else f"{a.prefix[:3]}.blk.0.attn_rel_b.weight"
    mask = Null() if sides == "two-sided" else Causal()
    return a.attention(rope=None, scale=1.0, mask=mask, distances=sides, distance_table=table, output="attn_o")
