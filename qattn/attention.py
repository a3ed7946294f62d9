"""Attention layers: projection, rotary embedding, KV cache, softmax attention and output projection in one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from qattn import _check, backends, devices, ops
from qattn._backend import as_array, as_float32, as_host, as_numpy, device_of
from qattn._changes import Watched
from qattn.architectures import AttentionConfig
from qattn.array import QuantArray
from qattn.batch import Batch
from qattn.devices import only as single_device
from qattn.errors import CacheError, DeviceError
from qattn.head_steps import rotation_at, rotation_to
from qattn.kv_cache import KVCache, KVCacheParams, SequenceCache, cascading
from qattn.latent import LatentProjection
from qattn.layer_weights import LayerWeights
from qattn.layer_weights import take as take_weights
from qattn.linear import Linear
from qattn.logits import Logits
from qattn.masks import Mask, MHAMaskVariant, Null
from qattn.masks import get as get_mask
from qattn.probe import Probe
from qattn.projection import heads_of, stores
from qattn.rope import RotaryEmbedding, Rotation
from qattn.softmax_attention import by_positions, score_bias
from qattn.state import State

Array = np.ndarray[Any, Any]
_Layer = TypeVar("_Layer", bound="AttentionWithRope")


class AttentionWithRope(Watched):
    """Self-attention with rotary embedding over float weights.

    Parameters
    ----------
    rope : RotaryEmbedding, optional
        None: nothing turns.
    num_attention_heads, num_key_value_heads : int
        The first is a multiple of the second.
    hidden_size : int
        Elements of a token's input and output.
    kv_params : KVCacheParams
        Head sizes, and what the layer's own cache stores.
    dtype
        Of the weights: float32 or float16.
    devices : sequence of str, optional
        ``["cpu"]``, or the GPU whose memory holds the weights and the cache: ``["cuda:0"]``, see `qattn.devices`.
    linear_cls : type
        Makes the output projection: ``linear_cls(weights, bias, precision=...)``.
    scale : float, optional
        Factor of the scores, 1 / sqrt(head_dim) by default.
    has_bias : bool
        The projections add a bias.
    clip_qkv : float, optional
        The weights of q, k and v are clamped to [-clip_qkv, clip_qkv].
    mask_variant : MHAMaskVariant or mask
    local_window_size : int, optional
        Of a mask variant that has a window or chunks.
    precision : "fast", "int8" or "exact"
        See `qattn.matmul`; "exact" also multiplies a bfloat16 cache in float32.
    features
        Further fields of `qattn.architectures.AttentionConfig`: ``clamp_qkv``, ``q_norm``, ``softcap``, ``gate``, …

    Raises
    ------
    ValueError
        For a parameter that does not fit, named.
    DeviceError
        If a device can't be used, with what is missing.
    NotImplementedError
        For several devices.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        dtype: Any = np.float32,
        devices: Iterable[str] | None = None,
        linear_cls: type[Linear] = Linear,
        scale: float | None = None,
        has_bias: bool = False,
        clip_qkv: float | None = None,
        mask_variant: MHAMaskVariant | Mask = MHAMaskVariant.CAUSAL_MASK,
        local_window_size: int | None = None,
        precision: ops.Precision = "fast",
        **features: Any,
    ) -> None:
        if clip_qkv is not None and not clip_qkv > 0:
            raise ValueError(f"clip_qkv is {clip_qkv}; expected a positive number")
        if clip_qkv is not None and features.get("latent") is not None:
            raise NotImplementedError("clip_qkv in multi-head latent attention is not implemented")
        if kv_params.n_kv_heads != num_key_value_heads:
            raise ValueError(
                f"kv_params has {kv_params.n_kv_heads} KV heads; num_key_value_heads is {num_key_value_heads}"
            )
        _check.choice("precision", precision, ops.PRECISIONS)
        self._check_dtype(np.dtype(dtype))
        self.config = AttentionConfig(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=kv_params.head_dim,
            value_dim=kv_params.values,
            rope=rope,
            scale=kv_params.head_dim**-0.5 if scale is None else float(scale),
            mask=get_mask(mask_variant, local_window_size),
            **features,
        )
        """All that the layer knows beside its weights."""
        self.device = single_device(devices)
        """Where weights and cache are, and where `x` must be: "cpu", "cuda:0", …"""
        self.rope = rope
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.hidden_size, self.kv_params, self.dtype = hidden_size, kv_params, np.dtype(dtype)
        self.devices = [self.device]
        self.linear_cls, self.has_bias, self.clip_qkv = linear_cls, has_bias, clip_qkv
        self.scale, self.mask_variant, self.mask = self.config.scale, mask_variant, self.config.mask
        self.precision = precision
        self.kv_cache: SequenceCache = KVCache(kv_params, device=self.device)
        """The layer's own cache, which a call without `kv_cache` continues."""
        self._weights: LayerWeights | None = None
        self._head_scale: Array | None = None
        self._head_factor: Any = None
        self.o_proj: Linear | None = None
        self.probe: Probe | None = None
        """Takes along what `forward` computes, for those who don't call it themselves: see `qattn.introspect`."""

    @classmethod
    def from_config(
        cls: type[_Layer],
        config: AttentionConfig,
        *,
        cache_dtype: str = "bfloat16",
        max_length: int | None = None,
        hadamard: bool = False,
        **parameters: Any,
    ) -> _Layer:
        """A layer of a description, still without weights.

        Parameters
        ----------
        config : AttentionConfig
        cache_dtype, max_length, hadamard
            Of the layer's own cache: see `KVCacheParams`.
        parameters
            Of the layer that are no part of a description: `devices`, `precision`, `has_bias`, …
        """
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        sizes = config.num_key_value_heads, fields.pop("head_dim"), fields.pop("value_dim")
        kv_params = KVCacheParams(*sizes, dtype=cache_dtype, max_length=max_length, hadamard=hadamard)
        return cls(kv_params=kv_params, mask_variant=fields.pop("mask"), **fields, **parameters)

    # Weights

    def _check_dtype(self, dtype: np.dtype[Any]) -> None:
        if dtype not in (np.float32, np.float16):
            raise ValueError(f"dtype is {dtype}; {type(self).__name__} takes float32 or float16 weights")

    def _weight(self, name: str, value: Any, shape: tuple[int, int]) -> QuantArray:
        """Check a weight of the state dictionary, and make it a QuantArray."""
        value = as_numpy(value, name)
        if value.dtype != self.dtype:
            raise ValueError(f"{name} has dtype {value.dtype}; expected {self.dtype}")
        _check.shape(name, value, shape)
        return QuantArray(np.ascontiguousarray(value).view(np.uint8), "F16" if self.dtype == np.float16 else "F32")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the layer's weights.

        Parameters
        ----------
        state : mapping
            ``q_proj.weight``, ``k_proj.weight``, ``v_proj.weight`` and ``o_proj.weight``, each (outputs, inputs), or
            ``qkv_proj.weight`` for the first three stacked; and with `has_bias` ``q_proj.bias`` and so on, where that
            of ``o_proj`` may be missing.  A number ``q_proj.scale`` multiplies products of that weight.  What further
            features need: ``q_norm.weight``, ``gate_proj.weight``, ``sinks.weight``, …

        Raises
        ------
        KeyError
            If a weight is missing.
        ValueError
            If there is one that is unknown, or has a wrong shape, dtype or format.  The layer is as it was.
        """
        self._weights = take_weights(
            self.config, State(state, self._weight), self.linear_cls,
            has_bias=self.has_bias, clip=self.clip_qkv, device=self.device, precision=self.precision,
        )  # fmt: skip
        self.o_proj = self._weights.output

    @property
    def wqkv(self) -> QuantArray:
        """The fused weights of q, k and v, (outputs, hidden_size), clamped if there is a `clip_qkv`."""
        projection = self._loaded().projection
        if isinstance(projection, LatentProjection):
            raise NotImplementedError("multi-head latent attention has no fused weights: its projection has two steps")
        return projection.wqkv

    @property
    def wqkv_bias(self) -> Array | None:
        """The fused bias of q, k and v, (outputs,) float32, or None."""
        return None if self._weights is None else self._weights.projection.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, all of which a step reads."""
        return self._loaded().nbytes

    def _loaded(self) -> LayerWeights:
        if self._weights is None:
            raise ValueError("the layer has no weights yet; give it some with load_state_dict() or from_gguf()")
        return self._weights

    @property
    def head_scale(self) -> Array | None:
        """Factors of what each head gives to the output projection, (heads,) float32: 0 ablates it; None: all are 1."""
        return self._head_scale

    @head_scale.setter
    def head_scale(self, factors: Any) -> None:
        if factors is None:
            self._head_factor = self._head_scale = None
            return
        c, factors = self.config, np.array(as_float32(as_host(factors, "head_scale"), "head_scale"))
        _check.shape("head_scale", factors, (c.num_attention_heads,))
        _check.finite("head_scale", factors)
        factors.flags.writeable = False
        size = c.value_dim if c.latent is None else c.latent.value_dim
        self._head_scale, self._head_factor = factors, devices.asarray(np.repeat(factors, size), self.device)

    # Forward

    def __call__(
        self,
        x: Any,
        *,
        kv_cache: SequenceCache | None = None,
        row_offsets: Any = None,
        positions: Any = None,
        mask: Any = None,
        return_lse: bool = False,
        capture: Iterable[str] | None = None,
    ) -> Any:
        """Attend: the tokens of `x` follow those in the cache.

        Parameters
        ----------
        x : (tokens, hidden_size) floats
        kv_cache : KVCache or PagedKVCache, optional
            Continued instead of the layer's own.  A layer that has no keys and values of its own reads this one, in
            which another layer has put those of the tokens of `x` already.
        row_offsets : (sequences + 1,) integers, optional
            Sequence s of the cache gets the tokens row_offsets[s] to row_offsets[s + 1] - 1.
        positions : (tokens,) integers, optional
            Of the rotary embedding, of biases by distance, and of masks; by default they follow on those of the
            sequence, from 0.  With the sections of a multi-section embedding (sections, tokens).  Cross attention that
            has any of these needs them, since its cache knows those of another sequence.
        mask : array, str, MHAMaskVariant or mask, optional
            An array (tokens, keys) or (tokens, heads, keys), beside the layer's own mask: booleans say which keys of
            its sequence a token sees, floats are added to the scores.  `keys` are those of the longest sequence, the
            new ones included.  Others, see `qattn.masks`, take the place of the layer's own.
        return_lse : bool
            Return also the logarithm of each sum of exponentials, (tokens, heads).
        capture : set of str, optional
            Return also a dictionary of what is named here: of `qattn.probe.NAMES`.

        Returns
        -------
        (tokens, hidden_size) float32
            With `return_lse` or `capture` the first of a tuple; see `qattn.probe.Probe` for what is captured.

        Raises
        ------
        ValueError
            For a wrong shape, or NaN or infinity in `x`; on a GPU, where looking for them would make the host wait,
            they give NaN instead.
        DeviceError
            If `x` or the cache is elsewhere than the layer.
        CacheError
            If a sequence outgrows the cache, or sees what the cache's window has left behind.  The cache is as it was.
        """
        probe = Probe(capture or ()) if return_lse or capture is not None else None
        cache = self.kv_cache if kv_cache is None else kv_cache
        x, offsets = self._check_input(x, cache, row_offsets)
        appends = stores(self.config)
        lengths = cache.lengths + np.diff(offsets) if appends else cache.lengths.copy()
        if self.config.shares_cache_of is not None and (lengths < np.diff(offsets)).any():
            raise CacheError(f"kv_cache has {cache.lengths.tolist()} tokens; the layer it shares must have added x's")
        chosen = self.mask if mask is None or hasattr(mask, "dtype") else get_mask(mask)
        if self.config.cross and positions is None and self._goes_by_positions(chosen):
            raise ValueError("positions of x's tokens are needed: the cache tells those of another sequence alone")
        (batch, at, rotation), logits = self._placed(cache, lengths, offsets, positions), self._loaded().logits
        if hasattr(mask, "dtype"):
            shape = (len(x), self.num_attention_heads, int(lengths.max(initial=0)))
            logits = logits._replace(bias=score_bias("mask", mask, shape, self.device))
        chosen, logits = by_positions(chosen, logits, cache, at, batch, lengths, others=self.config.cross)
        if appends:
            cache.reserve(lengths)
        with devices.current(self.device), cache.appending(lengths, offsets):
            out = self.forward(x, cache, batch.to(self.device), rotation, logits, probe, chosen)
        cache.note(lengths, None if positions is None or not appends else at, offsets)
        return out if probe is None else probe.answer(out, return_lse, capture is not None, row_offsets is not None)

    def remember(
        self,
        states: Any,
        *,
        kv_cache: SequenceCache | None = None,
        row_offsets: Any = None,
        positions: Any = None,
    ) -> None:
        """Append keys and values of other sequences' states, (tokens, hidden_size): what cross attention looks at.

        Sequence s of the cache gets those from row_offsets[s] to row_offsets[s + 1] - 1.  `positions` are as in a call.

        Raises
        ------
        ValueError
            If this is no layer of cross attention, or the shape is wrong.
        DeviceError, CacheError
            As in a call.
        """
        w = self._loaded()
        if w.memory is None or w.memory_steps is None:
            raise ValueError("the layer attends to its own input, not to another sequence: call it")
        cache = self.kv_cache if kv_cache is None else kv_cache
        states, offsets = self._check_input(states, cache, row_offsets)
        batch, at, rotation = self._placed(cache, cache.lengths + np.diff(offsets), offsets, positions)
        with devices.current(self.device):
            rows, there = w.memory(states), batch.to(self.device)
            rotation = w.memory_steps(rows, there.angles, rotation)
            ops.store(rows, cache, offsets, rotation, batch.angles)
        cache.note(cache.lengths, None if positions is None else at, offsets)

    def forward(
        self,
        x: Array,
        cache: SequenceCache,
        batch: Batch,
        rotation: Rotation,
        logits: Logits | None = None,
        probe: Probe | None = None,
        mask: Mask | None = None,
    ) -> Array:
        """The steps of a call, without its checks.

        x : (tokens, hidden_size) float32, for which the cache has room
        batch : where they belong, on the layer's device
        rotation : for all of the batch's angles
        logits, probe, mask : instead of the layer's own
        """
        w = self._loaded()
        probe, logits, mask = probe or self.probe, logits or w.logits, self.mask if mask is None else mask
        if w.steps.preparation is None or cache.params.hadamard:  # whose heads turn in memory
            rows = w.projection(x)
            rotation = w.steps(rows, batch.angles, rotation)
        else:
            rows, rotation = w.projection.unfinished(x), rotation._replace(preparation=w.steps.preparation)
        merged = self._merge(w, self._attend(rows, cache, batch, rotation, logits, probe, mask), rows)
        out: Array = self.o_proj(merged)  # type: ignore[misc]
        if probe is not None:
            probe.projected(x, merged, out)
        return out

    def rotation(self, positions: int) -> Rotation:
        """What positions 0 … at least `positions` - 1 do to heads: angles, and temperatures."""
        return rotation_to(positions, self.rope, self._loaded().temperatures, self.device)

    def _goes_by_positions(self, mask: Mask) -> bool:
        c = self.config
        return bool(self.rope or c.temperature or c.alibi or c.distances) or not isinstance(mask, Null)

    def _placed(
        self, cache: SequenceCache, lengths: Array, offsets: Array, positions: Any
    ) -> tuple[Batch, Array, Rotation]:
        """Tokens that are the last of sequences of these lengths: where they belong, their positions, and angles."""
        batch = Batch.appended(lengths, offsets)
        if positions is None:
            at = cache.positions_at(batch.slots, batch.places)
        else:
            at = ops.token_positions(positions, int(offsets[-1]), self.rope)
        rotation, rows = rotation_at(at, self.rope, self._loaded().temperatures, self.device)
        return batch._replace(angles=rows), at, rotation

    def _check_input(self, x: Any, cache: SequenceCache, row_offsets: Any) -> tuple[Array, Array]:
        self._loaded()
        if not isinstance(cache, SequenceCache):
            raise TypeError(f"kv_cache is {cache!r}; expected a KVCache or a PagedKVCache")
        x = as_array(x, "x")
        for what, device in (("x is", device_of(x)), ("kv_cache is", cache.device)):
            if device != self.device:
                raise DeviceError(f"{what} on {device}, the layer on {self.device}; both must be on the same")
        with devices.current(self.device):
            x = as_float32(x)
        _check.shape("x", x, ("tokens", self.hidden_size))
        if self.device == "cpu":
            _check.finite("x", x)
        mine, its = self.kv_params, cache.params
        if (mine.n_kv_heads, mine.head_dim, mine.values) != (its.n_kv_heads, its.head_dim, its.values):
            raise CacheError(f"kv_cache is for {its}; the layer needs {mine}")
        if row_offsets is None:
            if cache.sequences > 1:
                raise ValueError(
                    f"kv_cache has {cache.sequences} sequences; row_offsets must say which tokens are whose"
                )
            return x, np.array([0, len(x)])
        offsets = ops.check_row_offsets(row_offsets, len(x), "x")
        _check.shape("row_offsets", offsets, (cache.sequences + 1,))
        return x, offsets

    def _attend(
        self,
        rows: Array,
        cache: SequenceCache,
        batch: Batch,
        rotation: Rotation,
        logits: Logits,
        probe: Probe | None,
        mask: Mask,
    ) -> Array:
        """Rotate q and k, append k and v to the cache, and attend: (tokens, heads, value_dim) float32."""
        c, backend, exact = self.config, backends.of(rows), self.precision == "exact"
        heads = backend.scratch("heads", (len(rows), c.num_attention_heads, c.value_dim))
        if stores(c) and probe is None and not cache.cascade:
            backend.rotate_and_attend(rows, rotation, batch, cache, mask, logits, exact=exact, out=heads)
            return heads
        if stores(c):
            q = backend.scratch("q", (len(rows), c.num_attention_heads, c.head_dim))
            backend.rotate_and_store(rows, rotation, batch, cache, q)
        else:
            backend.rotate_heads(rows, c.num_attention_heads, c.head_dim, rotation, batch.angles)
            q = rows[:, : c.num_attention_heads * c.head_dim].reshape(len(rows), c.num_attention_heads, c.head_dim)
        if probe is not None:  # before attention, which may use q as it likes
            probe.prepared(q, cache, batch, mask, logits)
        attend = cascading.attend if cache.cascade else backend.attend
        _, lse = attend(q, cache, batch.row_offsets, mask, logits, exact=exact, out=heads)
        if probe is not None:
            probe.lse = lse
        return heads

    def _merge(self, w: LayerWeights, heads: Array, rows: Array) -> Array:
        """The heads' output (tokens, heads, value_dim) → the input of the output projection, (tokens, n) float32."""
        c, backend = self.config, backends.of(heads)
        if isinstance(w.projection, LatentProjection):
            heads = w.projection.expand(heads)
        if c.gate is not None:
            first = sum(count * size for count, size in heads_of(c))
            backend.gate(heads, rows, first, rows.shape[1] - first == c.num_attention_heads, c.gate.function)
        merged = heads.reshape(len(rows), heads.shape[1] * heads.shape[2])
        if w.output_norm is not None:
            w.output_norm(merged, 0)
        for factor in (w.output_factor, self._head_factor):
            if factor is not None:
                backend.finish(merged, factor, None, None)
        return merged

    def reset(self) -> None:
        """Forget the tokens in the layer's own cache."""
        self.kv_cache.reset()

    def __repr__(self) -> str:
        p, weights = self.kv_params, "no weights"
        if self._weights is not None:
            projection = self._weights.projection
            weights = "latent" if isinstance(projection, LatentProjection) else projection.wqkv.format
        return (
            f"{type(self).__name__}(hidden_size={self.hidden_size}, heads={self.num_attention_heads}/{p.n_kv_heads}, "
            f"head_dim={p.head_dim}, wqkv={weights}, {self.rope!r}, cache={p.dtype}, device={self.device!r})"
        )
