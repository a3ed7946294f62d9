"""Llama, Mistral, SmolLM (Touvron et al., 2023)."""

from qattn.models.architectures._registry import Architecture

ARCHITECTURES = (
    Architecture(
        name="llama",
        embeddings="token_embd.weight",
        attention_norm="blk.{}.attn_norm.weight",
        feed_forward_norm="blk.{}.ffn_norm.weight",
        gate="blk.{}.ffn_gate",
        up="blk.{}.ffn_up",
        down="blk.{}.ffn_down",
        output_norm="output_norm.weight",
        output="output",
        inert=("rope_freqs.weight",),
    ),
)
