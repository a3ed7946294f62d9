"""Phi 3 (Abdin et al., 2024): gate and up are one matrix."""

from qattn.models.architectures._registry import Architecture

ARCHITECTURES = (Architecture(name="phi3", gate=None),)
