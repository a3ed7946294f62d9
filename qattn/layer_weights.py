"""What a layer computes with: the weights of a state dictionary, on the layer's device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qattn import devices, ops
from qattn.architectures import AttentionConfig
from qattn.head_steps import HeadNorm, HeadSteps, Temperatures, logits_of
from qattn.latent import LatentProjection
from qattn.linear import Linear
from qattn.logits import Logits
from qattn.packing import PackedMatrix
from qattn.projection import Projection, parts_of
from qattn.state import State


class LayerWeights(NamedTuple):
    """The steps of a layer that have weights, in their order."""

    projection: Projection | LatentProjection
    steps: HeadSteps
    memory: Projection | None
    """Makes keys and values of another sequence's states, for cross attention."""
    memory_steps: HeadSteps | None
    temperatures: Temperatures | None
    logits: Logits
    output_norm: HeadNorm | None
    output_factor: Any
    """(inputs of the output projection,) float32 on the device, or None."""
    output: Linear
    nbytes: int
    """Bytes of packed weights, all of which a step reads."""


def take(
    c: AttentionConfig,
    state: State,
    linear_cls: type[Linear],
    *,
    has_bias: bool,
    clip: float | None,
    device: str,
    precision: ops.Precision,
) -> LayerWeights:
    """The weights that a layer of this description needs; `linear_cls` makes the output projection.

    Raises
    ------
    KeyError
        If one is missing.
    ValueError
        If one doesn't fit, or there is one that is not needed.
    """
    projection: Projection | LatentProjection
    memory: Projection | None = None
    if c.latent is not None:
        projection = LatentProjection(c, state, device=device, precision=precision)
    else:
        options: dict[str, Any] = {"has_bias": has_bias, "clip": clip, "device": device, "precision": precision}
        projection = Projection(c, state, parts_of(c), **options)
        memory = Projection(c, state, "kv", **options) if c.cross else None
    steps = HeadSteps(c, state, parts_of(c), device, projection.finishing, projection.gate_finishes)
    memory_steps = HeadSteps(c, state, "kv", device) if c.cross else None
    inner = c.num_attention_heads * (c.value_dim if c.latent is None else c.latent.value_dim)
    output_norm = None
    if c.output_norm is not None:
        output_norm = HeadNorm(c.output_norm, "output_norm", state, 1, inner, device)
    factor = c.value_scale * c.output_scale * state.factor("o_proj")
    output_factor = None if factor == 1 else devices.asarray(np.full(inner, factor, np.float32), device)
    weights = state.matrix("o_proj", c.hidden_size, inner)
    bias = state.vector("o_proj.bias") if "o_proj.bias" in state else None
    if bias is not None and not has_bias:
        raise ValueError("o_proj.bias was given, but has_bias is False")
    logits = logits_of(c, state, device)
    temperatures = None if c.temperature is None else Temperatures(c.temperature, device)
    state.end()
    wo = PackedMatrix(weights).to(device) if linear_cls is Linear else weights
    output, nbytes = linear_cls(wo, bias, precision=precision), projection.nbytes + wo.nbytes
    return LayerWeights(
        projection, steps, memory, memory_steps, temperatures, logits, output_norm, output_factor, output,
        nbytes,
    )  # fmt: skip
