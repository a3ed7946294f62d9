"""A decoder: tokens in, logits out.  Every layer's attention is a `GGUFQAttentionWithRope`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qattn import _check, backends, devices
from qattn._backend import as_host
from qattn._changes import Watched
from qattn.batch import Batch
from qattn.cpu.attend_tiles import KEY_BLOCK
from qattn.cpu.threads import get_num_threads
from qattn.errors import CacheError
from qattn.gguf_attention import GGUFQAttentionWithRope
from qattn.gguf_file import GGUFFile, opened
from qattn.introspect import probed
from qattn.kv_cache import PagedKVCache, SequenceCache
from qattn.linear import Linear
from qattn.models import architectures
from qattn.models.config import ModelConfig
from qattn.models.layer import Layer, Weights
from qattn.ops import Precision
from qattn.packing import PackedMatrix

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
    device : str
        Where it computes.
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
        self.device: str = embeddings.device
        self._backend, self._xp = backends.get(self.device.split(":")[0]), devices.namespace(self.device)
        self._embeddings, self._output_norm, self._output = embeddings, output_norm, output
        self._embedding_factor = None
        if config.embedding_scale != 1:
            self._embedding_factor = self._xp.full(config.hidden_size, config.embedding_scale, np.float32)
        self.changes = 0
        """How often tokens have come or gone: who goes on with a text can see whether anybody else did."""
        self._length = 0
        self._room = 0
        """For so many tokens all caches have room."""
        self._step: _Step | None = None

    @classmethod
    def from_gguf(
        cls,
        model: GGUFFile | str | os.PathLike[str],
        *,
        precision: Precision = "fast",
        cache_dtype: str | None = None,
        hadamard: bool = False,
        max_length: int | None = None,
        window_caches: bool = False,
        device: str | None = None,
    ) -> Decoder:
        """Load the decoder of a GGUF file.

        Parameters
        ----------
        model : an open file, or a path
        precision : "fast", "int8" or "exact"
            See `qattn.matmul`.
        cache_dtype : str, optional
            Of the KV caches, see `qattn.KVCacheParams`; by default bfloat16, or float32 for precision "exact".
        hadamard : bool
            Turn keys and values before they are rounded to that: pays below 8 bits.
        max_length : int, optional
            Tokens that the caches can hold: the model's context length, unless said otherwise.
        window_caches : bool
            Let layers with sliding windows keep only what their windows show: far less memory for long texts.  Then
            `truncate` and `forget` reach back no farther than these, and a `forward` that fails may leave no tokens.
        device : str, optional
            Where it computes; that of the file, unless said otherwise.

        Raises
        ------
        DeviceError
            The device can't be used.
        GGUFError
            Tensors or metadata are missing, or don't fit together.
        NotImplementedError
            The architecture, or something that the file asks of it, is not supported.
        """
        with opened(model) as file:
            device = devices.resolve(device or file.device)
            config = ModelConfig.from_gguf(file)
            if max_length is None:
                max_length = config.context_length
            _check.at_least("max_length", max_length, 1)
            described = architectures.get(config.architecture)
            weights = Weights(file, config, precision, device)
            dtype = cache_dtype or ("float32" if precision == "exact" else "bfloat16")
            of_caches: dict[str, Any] = {"cache_dtype": dtype, "max_length": max_length, "hadamard": hadamard}
            layers = []
            for n in range(config.layers):
                attention = GGUFQAttentionWithRope.from_gguf(file, n, precision=precision, device=device, **of_caches)
                if window_caches:
                    attention.kv_cache = _window_cache(attention, max_length)
                layers.append(weights.layer(described, n, attention))
            embeddings = weights.matrix(described.embeddings, config.vocabulary_size, config.hidden_size)
            if f"{described.output}.weight" in file:
                head = weights.linear([described.output], config.vocabulary_size, config.hidden_size)
            else:
                head = Linear(PackedMatrix(embeddings).to(device), precision=precision)
            return cls(config, embeddings.to(device), layers, weights.norm(described.output_norm), head, max_length)

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
        (tokens, vocabulary) float32, or (1, vocabulary) with `last_only`; where the decoder computes

        Raises
        ------
        ValueError
            There are no tokens, or one isn't in the vocabulary.
        CacheError
            They don't fit into the cache.  Nothing was computed.
        """
        ids = self._check_tokens(tokens)
        start, self.changes = self._length, self.changes + 1
        try:
            with devices.current(self.device):
                return self._append(ids, last_only)
        except BaseException:  # an interrupt too: layers must not disagree about what they have seen
            try:
                self.truncate(start)
            except CacheError:  # windows have let go of what the next token would see
                self.reset()
            raise

    def _append(self, ids: Array, last_only: bool) -> Array:
        logits = self._xp.empty((1 if last_only else len(ids), self.config.vocabulary_size), np.float32)
        if len(ids) == 1:
            self._one_more(ids, logits)
            return logits
        for first in range(0, len(ids), _CHUNK):
            x = self._hidden(ids[first : first + _CHUNK])
            if not last_only:
                self._head(x, logits[first : first + len(x)])
        if last_only:
            self._head(x[-1:], logits)
        return logits

    def capture(
        self, tokens: Sequence[int] | Array, what: Iterable[str], *, layers: Iterable[int] | None = None
    ) -> dict[int, dict[str, Any]]:
        """Read tokens from empty caches, and return what the layers' attention computes.

        Parameters
        ----------
        tokens : (tokens,) integers
        what : set of str
            Names of what to take along: see `qattn.probe.Probe`.
        layers : iterable of int, optional
            All layers, by default.  Scores and weights take 4 · heads · tokens · tokens bytes for each.

        Returns
        -------
        dict
            ``captured[layer][name]``

        Raises
        ------
        ValueError
            There is no such name, layer or token.
        CacheError
            The tokens don't fit into the cache.
        """
        with probed(self, what, layers) as record, devices.current(self.device):
            self.reset()
            ids = self._check_tokens(tokens)
            try:
                for first in range(0, len(ids), _CHUNK):
                    self._hidden(ids[first : first + _CHUNK])
                    record.take()
            except BaseException:  # an interrupt too: see forward
                self.reset()
                raise
        return record.joined()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of the sequence, and forget the rest.

        Raises
        ------
        CacheError
            There are fewer, or a window cache has let go of what the next token would see.  All is as it was.
        """
        if not 0 <= length <= self._length:
            raise CacheError(f"length is {length}; there are {self._length} tokens")
        caches = [layer.attention.kv_cache for layer in self.layers]
        lengths = [cache.check_length(min(length, len(cache))) for cache in caches]
        for cache, each in zip(caches, lengths, strict=True):
            cache.truncate(each)
        self._length, self._room, self.changes = length, 0, self.changes + 1

    def forget(self, start: int, stop: int) -> None:
        """Forget tokens start … stop - 1; those behind them move up, and their keys turn to their new positions.

        So a text can go on when the cache is full.  What the others have taken from the forgotten tokens stays.

        Raises
        ------
        CacheError
            There are no such tokens, or a window cache has let go of some.  All is as it was.

        Examples
        --------
        >>> if len(decoder) == decoder.max_length:                      # doctest: +SKIP
        ...     decoder.forget(4, len(decoder) // 2)
        """
        if not 0 <= start <= stop <= self._length:
            raise CacheError(f"tokens {start} to {stop} were to be forgotten; there are {self._length}")
        gone = max(int(layer.attention.kv_cache.starts[0]) for layer in self.layers)
        if gone and start < stop:
            raise CacheError(f"window caches have let go of the tokens before {gone}, so that none can be forgotten")
        for layer in self.layers:
            attention = layer.attention
            attention.kv_cache.remove(0, start, stop)
            attention.kv_cache.shift(0, start, None, start - stop, attention.rope)
        self._length, self._room, self.changes = self._length - (stop - start), 0, self.changes + 1

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.attention.reset()
        self._length, self._room, self.changes = 0, 0, self.changes + 1

    def _check_tokens(self, tokens: Sequence[int] | Array) -> Array:
        ids = as_host(tokens, "tokens")
        if not ids.size:
            raise ValueError("tokens are empty; a model needs at least one to continue (an empty prompt has none)")
        _check.shape("tokens", ids, ("tokens",))
        if ids.dtype.kind not in "iu":
            raise ValueError(f"tokens have dtype {ids.dtype}; expected integers")
        given = ids.tolist()  # a list's minimum takes fewer steps than an array's, which a single token would notice
        if min(given) < 0 or max(given) >= self.config.vocabulary_size:
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
        return ids.astype(np.int64, copy=False)

    def _hidden(self, ids: Array) -> Array:
        """Run the layers over new tokens → (tokens, hidden_size) float32."""
        x = self._xp.empty((len(ids), self.config.hidden_size), np.float32)
        self._embed(ids, x)
        places = np.arange(self._length, self._length + len(ids))
        self._run_layers(x, places)
        self._length += len(ids)
        return x

    def _embed(self, ids: Array, out: Array) -> None:
        """Write the embeddings of tokens."""
        self._backend.take_rows(self._embeddings, self._xp.asarray(ids), out)
        if self._embedding_factor is not None:
            self._backend.finish(out, self._embedding_factor, None, None)

    def _run_layers(self, x: Array, places: Array) -> None:
        """Update x (tokens, hidden_size) float32 in place, for tokens at these places of the sequence."""
        self._reserve(int(places[-1]) + 1)
        batch = Batch(np.zeros_like(places), places, places, np.array([0, len(places)]), one_each=len(places) == 1)
        self._layers_of(x, batch.to(self.device), int(places[-1]) + 1)
        self._note(int(places[-1]) + 1)

    def _layers_of(self, x: Array, batch: Batch, positions: int) -> None:
        for layer in self.layers:
            layer(x, batch, layer.attention.rotation(positions))

    def _reserve(self, length: int) -> None:
        """Make room for a sequence of that length in all caches, and for some more tokens."""
        room = min(-(-length // KEY_BLOCK) * KEY_BLOCK, self.max_length)
        for layer in self.layers:
            layer.attention.kv_cache.reserve(np.array([room]))
        self._room = room

    def _note(self, length: int) -> None:
        for layer in self.layers:
            layer.attention.kv_cache.note(np.array([length]))

    def _one_more(self, ids: Array, logits: Array) -> None:
        """Append a single token.  Its kernels are recorded, and replayed for those that follow: see `Program`."""
        if self._length >= self._room:
            self._reserve(self._length + 1)
        if self._step is None or not self._step.fits(self, self._length):
            self._step = None  # it may hold caches that have been replaced by larger ones
            self._step = _Step(self, self._length)
        self._step.run(self, ids, self._length)
        self._length += 1
        logits[...] = self._step.logits

    def _head(self, x: Array, logits: Array) -> None:
        """Write the logits behind rows of hidden states."""
        normed = self._xp.empty_like(x)
        self._backend.rms_norm(x, self._output_norm, self.config.norm_epsilon, normed)
        self._output(normed, out=logits)
        if self.config.logit_softcap:
            self._backend.softcap(logits, self.config.logit_softcap)


def _window_cache(attention: GGUFQAttentionWithRope, max_length: int) -> SequenceCache:
    """A cache that keeps what a layer's sliding window shows; that which the layer has, if it has no window."""
    span = getattr(attention.mask, "span", None)
    if span is None:
        return attention.kv_cache
    pages = min(-(-(span + _CHUNK) // KEY_BLOCK) + 2, -(-max_length // KEY_BLOCK))  # the first and last may be begun
    return PagedKVCache(attention.kv_params, pages=pages, window=span, device=attention.device)


class _Step:
    """The recorded kernels of one token, with its id and its place in the sequence to be set before each run."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        xp, c = decoder._xp, decoder.config
        self.program: Any = None
        self.ids, self.places = xp.zeros(1, np.int64), xp.zeros(1, np.int64)
        offsets = xp.asarray(np.array([0, 1]))
        self._batch = Batch(xp.zeros(1, np.int64), self.places, self.places, offsets, one_each=True)
        self.x, self.logits = xp.empty((1, c.hidden_size), np.float32), xp.empty((1, c.vocabulary_size), np.float32)
        decoder._reserve(length + 1)
        self._seen, self._parts = self._changes(decoder), self._parts_of(decoder)
        self._positions = min(layer.attention.kv_cache.capacity for layer in decoder.layers)
        self._recordable = all(map(_is_recordable, decoder.layers))
        self._warm = False

    def run(self, decoder: Decoder, ids: Array, length: int) -> None:
        """Do what running the layers would, by a replay if they are recorded."""
        self.places[:], self.ids[:] = length, int(ids[0])
        if self.program is not None:
            self.program.replay()
        elif not self._recordable or (decoder.device != "cpu" and not self._warm):
            self._compute(decoder)  # on a GPU once before recording, so that kernels are loaded
            self._warm = True
        else:
            program = decoder._backend.Program()
            with program.recording():
                self._compute(decoder)
            self.program = program
        if decoder.device != "cpu":
            decoder._note(length + 1)

    def _compute(self, decoder: Decoder) -> None:
        decoder._embed(self.ids, self.x)
        decoder._layers_of(self.x, self._batch, self._positions)
        decoder._head(self.x, self.logits)

    def fits(self, decoder: Decoder, length: int) -> bool:
        """Whether a run at this length does what running the layers would."""
        now = self._changes(decoder)
        if now != self._seen:  # of something: is it among the parts?
            parts = self._parts_of(decoder)
            if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
                return False
            self._seen = now
        return length < self._positions

    @staticmethod
    def _changes(decoder: Decoder) -> tuple[Any, ...]:
        """What differs whenever one of the parts does.  All that a token touches must come from memory again."""
        return Watched.assignments, get_num_threads(), tuple(decoder.layers)

    @staticmethod
    def _parts_of(decoder: Decoder) -> list[Any]:
        """What a recording depends on and somebody may replace."""
        parts: list[Any] = [get_num_threads()]
        for layer in decoder.layers:
            for owner in (layer, layer.attention, *_linears(layer)):
                parts += vars(owner).values()
            cache = layer.attention.kv_cache
            view = cache.view()
            parts += view.keys, view.pages, cache.cascade
        return parts


def _linears(layer: Layer) -> list[Linear]:
    found = layer.attention.o_proj, layer.gate_up, layer.down
    return [linear for linear in found if type(linear) is Linear]


def _is_recordable(layer: Layer) -> bool:
    """Whether nothing but kernels computes: no layer of the user's own, and nobody who wants to see what is between."""
    return len(_linears(layer)) == 3 and layer.attention.probe is None
