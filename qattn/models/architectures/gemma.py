"""Gemma (Gemma Team, 2025): norms before and after each part of a layer."""

from qattn.models.architectures._registry import Architecture

ARCHITECTURES = (
    Architecture(
        name="gemma3",
        activation="gelu",
        scales_embeddings=True,
        caps_logits=True,
        attention_post_norm="blk.{}.post_attention_norm.weight",
        feed_forward_post_norm="blk.{}.post_ffw_norm.weight",
    ),
)
