"""A layer of a decoder, and how weights are taken out of a file."""

from __future__ import annotations

from typing import Any

import numpy as np

from qattn import backends, devices
from qattn._changes import Watched
from qattn.batch import Batch
from qattn.errors import GGUFError
from qattn.gguf_attention import GGUFQAttentionWithRope
from qattn.gguf_file import GGUFFile
from qattn.linear import Linear
from qattn.models.architectures import Architecture
from qattn.models.config import ModelConfig
from qattn.ops import Precision
from qattn.packing import PackedMatrix
from qattn.rope import Rotation

Array = np.ndarray[Any, Any]


class Layer(Watched):
    """One layer: attention and feed-forward network, each behind a norm, each added to what came in.

    A norm behind either of them is optional.
    """

    def __init__(
        self,
        attention: GGUFQAttentionWithRope,
        gate_up: Linear,
        down: Linear,
        *,
        activation: str,
        epsilon: float,
        attention_norm: Array,
        feed_forward_norm: Array,
        attention_post_norm: Array | None = None,
        feed_forward_post_norm: Array | None = None,
    ) -> None:
        self.attention, self.gate_up, self.down = attention, gate_up, down
        self.activation, self.epsilon = activation, epsilon
        self.attention_norm, self.attention_post_norm = attention_norm, attention_post_norm
        self.feed_forward_norm, self.feed_forward_post_norm = feed_forward_norm, feed_forward_post_norm

    def __call__(self, x: Array, batch: Batch, rotation: Rotation) -> None:
        """Update x (tokens, hidden_size) float32 in place; the attention's cache has room for the batch."""
        backend = backends.of(x)
        normed = backend.scratch("normed", x.shape)
        backend.rms_norm(x, self.attention_norm, self.epsilon, normed)
        attended = self.attention.forward(normed, self.attention.kv_cache, batch, rotation)
        self._add(x, attended, self.attention_post_norm)
        backend.rms_norm(x, self.feed_forward_norm, self.epsilon, normed)
        gate_up = backend.scratch("gate and up", (len(x), self.gate_up.shape[0]))
        gated = backend.scratch("gated", (len(x), self.down.shape[1]))
        backend.gated(self.gate_up(normed, out=gate_up), gated, self.activation)
        self._add(x, self.down(gated, out=normed), self.feed_forward_post_norm)

    def _add(self, x: Array, update: Array, norm: Array | None) -> None:
        """x += update, which is normalized before, in place, if there is a norm."""
        backend = backends.of(x)
        if norm is not None:
            backend.rms_norm(update, norm, self.epsilon, update)
        backend.add(x, update)


class Weights:
    """Takes weights out of a file, and checks their shapes."""

    def __init__(self, model: GGUFFile, config: ModelConfig, precision: Precision, device: str) -> None:
        self._model, self._config, self._precision, self._device = model, config, precision, device

    def _take(self, name: str, *shape: int) -> Any:
        if name not in self._model:
            raise GGUFError(f"{self._model.path} has no tensor {name}")
        weights = self._model.mapped(name)
        if weights.shape != shape:
            raise GGUFError(f"{name} has shape {weights.shape}; the metadata of {self._model.path} needs {shape}")
        return weights

    def norm(self, name: str) -> Array:
        """A norm's weight, (hidden_size,) float32."""
        values = np.array(self._take(name, self._config.hidden_size), np.float32)
        return devices.asarray(values, self._device)

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        """Quantized rows, a `QuantArray`."""
        return self._take(name, rows, columns)

    def linear(self, names: list[str], rows: int, columns: int) -> Linear:
        """Stack matrices of `rows` rows each, with their biases, into one layer: one pass over the activations."""
        matrices = [self.matrix(f"{name}.weight", rows, columns) for name in names]
        stacked = matrices[0] if len(matrices) == 1 else np.concatenate(matrices)
        bias = None
        if any(f"{name}.bias" in self._model for name in names):
            zeros = np.zeros(rows, np.float32)
            given = [self._take(f"{name}.bias", rows) if f"{name}.bias" in self._model else zeros for name in names]
            bias = np.concatenate([np.array(each, np.float32) for each in given])
        return Linear(PackedMatrix(stacked).to(self._device), bias, precision=self._precision)

    def layer(self, described: Architecture, n: int, attention: GGUFQAttentionWithRope) -> Layer:
        """Layer `n`, around its attention."""
        hidden, inner = self._config.hidden_size, self._config.feed_forward_size

        def optional(name: str | None) -> Array | None:
            return None if name is None else self.norm(name.format(n))

        if described.gate is None:
            gate_up = self.linear([described.up.format(n)], 2 * inner, hidden)
        else:
            gate_up = self.linear([described.gate.format(n), described.up.format(n)], inner, hidden)
        return Layer(
            attention,
            gate_up,
            self.linear([described.down.format(n)], hidden, inner),
            activation=described.activation,
            epsilon=self._config.norm_epsilon,
            attention_norm=self.norm(described.attention_norm.format(n)),
            feed_forward_norm=self.norm(described.feed_forward_norm.format(n)),
            attention_post_norm=optional(described.attention_post_norm),
            feed_forward_post_norm=optional(described.feed_forward_post_norm),
        )
