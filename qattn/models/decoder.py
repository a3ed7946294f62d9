"""A decoder: tokens in, logits out.  Every layer's attention is a `GGUFQAttentionWithRope`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from qattn import _check
from qattn.attention import GGUFQAttentionWithRope
from qattn.cpu import feed_forward
from qattn.cpu.kernel import Program
from qattn.cpu.scratch import scratch
from qattn.cpu.threads import get_num_threads
from qattn.errors import CacheError, GGUFError
from qattn.gguf_file import GGUFFile
from qattn.gguf_file import open as open_gguf
from qattn.linear import Linear
from qattn.models import architectures
from qattn.models.config import ModelConfig
from qattn.ops import Batch, Precision, dequantize, parts_of

Array = np.ndarray[Any, Any]
_CHUNK = 512  # tokens computed at once: enough for full speed, and few enough that what lies between layers stays small


class Decoder:
    """A language model on quantized weights, with one sequence in its KV caches.  Made by `from_gguf`.

    Attributes
    ----------
    config : ModelConfig
    layers : list of Layer
    max_length : int
        Tokens that fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        embeddings: Any,
        layers: list[Layer],
        output_norm: Array,
        output: Linear,
        max_length: int,
    ) -> None:
        self.config, self.layers, self.max_length = config, layers, max_length
        self._embeddings, self._output_norm, self._output = embeddings, output_norm, output
        self._length = 0
        self._step: _Step | None = None

    @classmethod
    def from_gguf(
        cls,
        model: GGUFFile | str | os.PathLike[str],
        *,
        precision: Precision = "int8",
        cache_dtype: str | None = None,
        max_length: int | None = None,
    ) -> Decoder:
        """Load the decoder of a GGUF file.

        Parameters
        ----------
        model : an open file, or a path
        precision : "int8" or "exact"
            See `qattn.matmul`.
        cache_dtype : "float32", "float16" or "bfloat16", optional
            Of the KV caches: bfloat16, or float32 for precision "exact".
        max_length : int, optional
            Tokens that the caches can hold: the model's context length, unless said otherwise.

        Raises
        ------
        GGUFError
            Tensors or metadata are missing, or don't fit together.
        NotImplementedError
            The architecture, or something that the file asks of it, is not supported.
        """
        if not isinstance(model, GGUFFile):
            with open_gguf(model) as opened:
                return cls.from_gguf(opened, precision=precision, cache_dtype=cache_dtype, max_length=max_length)
        config = ModelConfig.from_gguf(model)
        if max_length is None:
            max_length = config.context_length
        _check.at_least("max_length", max_length, 1)
        described = architectures.get(config.architecture)
        weights = _Weights(model, precision)
        dtype = cache_dtype or ("float32" if precision == "exact" else "bfloat16")
        hidden, inner = config.hidden_size, config.feed_forward_size
        layers = []
        for n in range(config.layers):
            attention = GGUFQAttentionWithRope.from_gguf(
                model, n, precision=precision, cache_dtype=dtype, max_length=max_length
            )
            layers.append(
                Layer(
                    attention_norm=weights.vector(described.attention_norm.format(n), hidden),
                    attention=attention,
                    feed_forward_norm=weights.vector(described.feed_forward_norm.format(n), hidden),
                    gate_up=weights.linear([described.gate.format(n), described.up.format(n)], inner, hidden),
                    down=weights.linear([described.down.format(n)], hidden, inner),
                    epsilon=np.float32(config.norm_epsilon),
                )
            )
        embeddings = weights.matrix(described.embeddings, config.vocabulary_size, hidden)
        tied = f"{described.output}.weight" not in model
        head = Linear(embeddings, precision=precision) if tied else weights.linear(
            [described.output], config.vocabulary_size, hidden
        )  # fmt: skip
        return cls(config, embeddings, layers, weights.vector(described.output_norm, hidden), head, max_length)

    def __len__(self) -> int:
        """The number of tokens in the caches."""
        return self._length

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Decoder({c.architecture}, {c.layers} layers, hidden_size={c.hidden_size}, "
            f"{c.vocabulary_size} tokens, {len(self)} of {self.max_length} in the cache)"
        )

    def forward(self, tokens: Sequence[int] | Array, *, last_only: bool = False) -> Array:
        """Append tokens to the sequence, and return the logits of what follows each.

        Parameters
        ----------
        tokens : (tokens,) integers
        last_only : bool
            Compute the logits behind the last token alone.

        Returns
        -------
        (tokens, vocabulary) float32, or (1, vocabulary) with `last_only`

        Raises
        ------
        ValueError
            There are no tokens, or one isn't in the vocabulary.
        CacheError
            They don't fit into the cache.  Nothing was computed.
        """
        ids = self._check_tokens(tokens)
        logits = np.empty((1 if last_only else len(ids), self.config.vocabulary_size), np.float32)
        start = self._length
        try:
            if len(ids) == 1:
                self._one_more(ids, logits)
            else:
                for first in range(0, len(ids), _CHUNK):
                    x = self._hidden(ids[first : first + _CHUNK])
                    if not last_only:
                        self._head(x, logits[first : first + len(x)])
                if last_only:
                    self._head(x[-1:], logits)
        except BaseException:  # an interrupt too: layers must not disagree about what they have seen
            self.truncate(start)
            raise
        return logits

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of the sequence, and forget the rest."""
        for layer in self.layers:
            layer.attention.kv_cache.truncate(min(length, len(layer.attention.kv_cache)))
        self._length = length

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.attention.reset()
        self._length = 0

    def _check_tokens(self, tokens: Sequence[int] | Array) -> Array:
        ids = np.asarray(tokens)
        if not ids.size:
            raise ValueError("tokens are empty; a model needs at least one to continue (an empty prompt has none)")
        _check.shape("tokens", ids, ("tokens",))
        if ids.dtype.kind not in "iu":
            raise ValueError(f"tokens have dtype {ids.dtype}; expected integers")
        if ids.min() < 0 or ids.max() >= self.config.vocabulary_size:
            index = int(np.flatnonzero((ids < 0) | (ids >= self.config.vocabulary_size))[0])
            raise ValueError(
                f"tokens[{index}] is {ids[index]}; the vocabulary has tokens 0 to {self.config.vocabulary_size - 1}"
            )
        if self._length + len(ids) > self.max_length:
            before = f" after the {self._length} that it has" if self._length else ""
            raise CacheError(
                f"{len(ids)} tokens{before} don't fit into the cache of {self.max_length}; "
                "shorten the text, reset(), or load the model with a larger max_length"
            )
        return ids

    def _hidden(self, ids: Array) -> Array:
        """Run the layers over new tokens → (tokens, hidden_size) float32."""
        x = np.array(self._embeddings[ids], np.float32)
        places = np.arange(self._length, self._length + len(ids))
        self._run_layers(x, places)
        self._length += len(ids)
        return x

    def _run_layers(self, x: Array, places: Array) -> None:
        """Update x (tokens, hidden_size) float32 in place, for tokens at these places of the sequence."""
        batch = Batch(np.zeros_like(places), places, places, np.array([0, len(places)]))
        for layer in self.layers:
            layer.attention.kv_cache.reserve(places[-1:] + 1)
            layer(x, batch)

    def _one_more(self, ids: Array, logits: Array) -> None:
        """Append a single token.  Its kernels are recorded, and replayed for those that follow: see `Program`."""
        if self._step is None or not self._step.fits(self, self._length):
            self._step = _Step(self, ids, self._length)
        else:
            dequantize(self._embeddings[ids], out=self._step.x)
            self._step.places[0] = self._length
            self._step.program.replay()
        self._length += 1
        logits[...] = self._step.logits

    def _head(self, x: Array, logits: Array) -> None:
        """Write the logits behind rows of hidden states."""
        normed = np.empty_like(x)
        epsilon = np.float32(self.config.norm_epsilon)
        feed_forward.rms_norm(x, self._output_norm, epsilon, normed, parts=parts_of(len(x)))
        self._output(normed, out=logits)


class Layer:
    """One layer: attention and feed-forward network, each behind a norm, each added to what came in."""

    def __init__(
        self,
        attention_norm: Array,
        attention: GGUFQAttentionWithRope,
        feed_forward_norm: Array,
        gate_up: Linear,
        down: Linear,
        epsilon: np.float32,
    ) -> None:
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.gate_up, self.down = feed_forward_norm, gate_up, down
        self.epsilon = epsilon

    def __call__(self, x: Array, batch: Batch) -> None:
        """Update x (tokens, hidden_size) float32 in place; the attention's cache has room for the batch."""
        normed, parts = scratch("normed", x.shape), parts_of(len(x))
        feed_forward.rms_norm(x, self.attention_norm, self.epsilon, normed, parts=parts)
        feed_forward.add(x, self.attention.forward(normed, self.attention.kv_cache, batch), parts=parts)
        feed_forward.rms_norm(x, self.feed_forward_norm, self.epsilon, normed, parts=parts)
        gate_up = scratch("gate and up", (len(x), self.gate_up.shape[0]))
        gated = scratch("gated", (len(x), self.down.shape[1]))
        feed_forward.swiglu(self.gate_up(normed, out=gate_up), gated, parts=parts)
        feed_forward.add(x, self.down(gated, out=normed), parts=parts)


class _Step:
    """The recorded kernels of one token, at a place of the sequence that is set before each replay."""

    def __init__(self, decoder: Decoder, ids: Array, length: int) -> None:
        self.program, self.places = Program(), np.array([length])
        self.x = np.array(decoder._embeddings[ids], np.float32)
        self.logits = np.empty((1, decoder.config.vocabulary_size), np.float32)
        with self.program.recording():
            decoder._run_layers(self.x, self.places)
            decoder._head(self.x, self.logits)
        self._parts = self._parts_of(decoder)
        self._end = min(self._room(layer.attention) for layer in decoder.layers)

    def fits(self, decoder: Decoder, length: int) -> bool:
        """Whether a replay at this length does what running the layers would."""
        now = self._parts_of(decoder)
        return length < self._end and all(a is b for a, b in zip(now, self._parts, strict=True))

    @staticmethod
    def _parts_of(decoder: Decoder) -> list[Any]:
        """What a recording depends on and somebody may replace."""
        parts: list[Any] = [get_num_threads()]
        for layer in decoder.layers:
            attention = layer.attention
            parts += attention.wqkv, attention.o_proj, attention.kv_cache.view().keys
        return parts

    @staticmethod
    def _room(attention: GGUFQAttentionWithRope) -> int:
        """The length up to which tables and cache stay where they are; 0 if there is code that can't be recorded."""
        recordable = type(attention.o_proj) is Linear
        return min(attention.kv_cache.capacity, len(attention.rope.table(0)[0])) if recordable else 0


class _Weights:
    """Takes weights out of a file, and checks their shapes."""

    def __init__(self, model: GGUFFile, precision: Precision) -> None:
        self._model, self._precision = model, precision

    def _take(self, name: str, *shape: int) -> Any:
        if name not in self._model:
            raise GGUFError(f"{self._model.path} has no tensor {name}")
        weights = self._model[name]
        if weights.shape != shape:
            raise GGUFError(f"{name} has shape {weights.shape}; the metadata of {self._model.path} needs {shape}")
        return weights

    def vector(self, name: str, size: int) -> Array:
        """A norm's weight or a bias, (size,) float32."""
        return np.array(self._take(name, size), np.float32)

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        """Quantized rows, a `QuantArray`."""
        return self._take(name, rows, columns)

    def linear(self, names: list[str], rows: int, columns: int) -> Linear:
        """Stack matrices of `rows` rows each, with their biases, into one layer: one pass over the activations."""
        stacked = np.concatenate([self.matrix(f"{name}.weight", rows, columns) for name in names])
        bias = None
        if any(f"{name}.bias" in self._model for name in names):
            zeros = np.zeros(rows, np.float32)
            parts = [self.vector(f"{name}.bias", rows) if f"{name}.bias" in self._model else zeros for name in names]
            bias = np.concatenate(parts)
        return Linear(stacked, bias, precision=self._precision)
