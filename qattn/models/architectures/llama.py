"""Llama and those that differ from it in their attention only."""

from qattn.models.architectures._registry import Architecture

ARCHITECTURES = (
    Architecture(name="llama"),  # Mistral and SmolLM, too (Touvron et al., 2023)
    Architecture(name="qwen2"),
    Architecture(name="qwen3"),
)
