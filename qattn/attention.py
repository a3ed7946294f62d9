"""Attention layers: projection, rotary embedding, KV cache, softmax attention and output projection in one object."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qattn import _check, architectures, backends, devices, formats, ops
from qattn._backend import as_array, as_float32, as_host, as_numpy, device_of
from qattn.array import QuantArray
from qattn.batch import Batch
from qattn.errors import CacheError, DeviceError, GGUFError
from qattn.gguf_file import GGUFFile
from qattn.gguf_file import open as open_gguf
from qattn.kv_cache import KVCache, KVCacheParams
from qattn.linear import Linear
from qattn.masks import MHAMaskVariant
from qattn.masks import get as get_mask
from qattn.packing import PackedMatrix
from qattn.rope import RotaryEmbedding, Rotation

Array = np.ndarray[Any, Any]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class AttentionWithRope:
    """Self-attention with rotary embedding over float weights.

    Parameters
    ----------
    rope : RotaryEmbedding
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
    mask_variant : MHAMaskVariant
    precision : "int8" or "exact"
        See `qattn.matmul`; "exact" also multiplies a bfloat16 cache in float32.

    Raises
    ------
    ValueError
        For a parameter that does not fit, named.
    DeviceError
        If a device can't be used, with what is missing.
    NotImplementedError
        For a mask that is not there, or several devices.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding,
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
        mask_variant: MHAMaskVariant = MHAMaskVariant.CAUSAL_MASK,
        precision: ops.Precision = "int8",
    ) -> None:
        for name, value in (
            ("num_attention_heads", num_attention_heads),
            ("num_key_value_heads", num_key_value_heads),
            ("hidden_size", hidden_size),
        ):
            _check.at_least(name, value, 1)
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {num_attention_heads}; expected a multiple of num_key_value_heads, "
                f"{num_key_value_heads}"
            )
        if kv_params.n_kv_heads != num_key_value_heads:
            raise ValueError(
                f"kv_params has {kv_params.n_kv_heads} KV heads; num_key_value_heads is {num_key_value_heads}"
            )
        if rope.rope_dims > kv_params.head_dim:
            raise ValueError(f"rope turns {rope.rope_dims} elements; kv_params has heads of {kv_params.head_dim}")
        if clip_qkv is not None and not clip_qkv > 0:
            raise ValueError(f"clip_qkv is {clip_qkv}; expected a positive number")
        if scale is not None and not np.isfinite(scale):
            raise ValueError(f"scale is {scale}; expected a finite number")
        _check.choice("precision", precision, ops.PRECISIONS)
        self._check_dtype(np.dtype(dtype))
        self.device = _one_device(devices)
        """Where weights and cache are, and where `x` must be: "cpu", "cuda:0", …"""
        self.rope = rope
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.hidden_size, self.kv_params, self.dtype = hidden_size, kv_params, np.dtype(dtype)
        self.devices = [self.device]
        self.linear_cls, self.has_bias, self.clip_qkv = linear_cls, has_bias, clip_qkv
        self.scale = kv_params.head_dim**-0.5 if scale is None else float(scale)
        self.mask_variant, self.mask, self.precision = mask_variant, get_mask(mask_variant), precision
        self.kv_cache = KVCache(kv_params, device=self.device)
        """The layer's own cache, which a call without `kv_cache` continues."""
        self._wqkv: QuantArray | None = None
        self._bias: Array | None = None
        self._qkv_proj: PackedMatrix | None = None
        self.o_proj: Linear | None = None

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
            of ``o_proj`` may be missing.

        Raises
        ------
        KeyError
            If a weight is missing.
        ValueError
            If there is one that is unknown, or has a wrong shape, dtype or format.  The layer is as it was.
        """
        outputs = dict(zip(_PROJECTIONS, self._projection_rows(), strict=True))
        fused = "qkv_proj.weight" in state
        known = {f"{name}.{kind}" for name in (*_PROJECTIONS, "qkv_proj", "o_proj") for kind in ("weight", "bias")}
        unknown = sorted(set(state) - known)
        if unknown:
            raise ValueError(f"the layer has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        wanted = {"qkv_proj": sum(outputs.values())} if fused else outputs
        for name in (*wanted, "o_proj"):
            if f"{name}.weight" not in state:
                raise KeyError(f"{name}.weight is missing from the state dictionary")
        weights = [
            self._weight(f"{name}.weight", state[f"{name}.weight"], (rows, self.hidden_size))
            for name, rows in wanted.items()
        ]
        wqkv = weights[0] if fused else QuantArray.stack(weights)
        heads_size = self.num_attention_heads * self.kv_params.values
        wo = self._weight("o_proj.weight", state["o_proj.weight"], (self.hidden_size, heads_size))
        bias = self._stack_biases(state, wanted)
        if self.clip_qkv is not None:
            wqkv = _clipped(wqkv, self.clip_qkv)
        wqkv_packed = PackedMatrix(wqkv).to(self.device)
        packed_wo = PackedMatrix(wo).to(self.device) if self.linear_cls is Linear else wo
        self.o_proj = self.linear_cls(packed_wo, state.get("o_proj.bias"), precision=self.precision)
        self._wqkv, self._qkv_proj = wqkv, wqkv_packed
        self._bias = bias if bias is None else devices.asarray(bias, self.device)

    def _projection_rows(self) -> tuple[int, int, int]:
        p = self.kv_params
        return self.num_attention_heads * p.head_dim, p.n_kv_heads * p.head_dim, p.n_kv_heads * p.values

    def _stack_biases(self, state: Mapping[str, Any], wanted: Mapping[str, int]) -> Array | None:
        given = [name for name in (*wanted, "o_proj") if f"{name}.bias" in state]
        if given and not self.has_bias:
            raise ValueError(f"{given[0]}.bias was given, but has_bias is False")
        if not self.has_bias:
            return None
        biases = []
        for name, rows in wanted.items():
            if f"{name}.bias" not in state:
                raise KeyError(f"{name}.bias is missing from the state dictionary, and has_bias is True")
            bias = np.array(as_numpy(state[f"{name}.bias"], f"{name}.bias"), np.float32)
            _check.shape(f"{name}.bias", bias, (rows,))
            biases.append(bias)
        return np.concatenate(biases)

    @property
    def wqkv(self) -> QuantArray:
        """The fused weights of q, k and v, (outputs, hidden_size), clamped if there is a `clip_qkv`."""
        if self._wqkv is None:
            raise ValueError("the layer has no weights yet; give it some with load_state_dict() or from_gguf()")
        return self._wqkv

    @property
    def wqkv_bias(self) -> Array | None:
        """The fused bias of q, k and v, (outputs,) float32, or None."""
        return self._bias

    # Forward

    def __call__(
        self,
        x: Any,
        *,
        kv_cache: KVCache | None = None,
        row_offsets: Any = None,
        positions: Any = None,
    ) -> Array:
        """Attend: the tokens of `x` follow those in the cache.

        Parameters
        ----------
        x : (tokens, hidden_size) floats
        kv_cache : KVCache, optional
            Continued instead of the layer's own.
        row_offsets : (sequences + 1,) integers, optional
            Sequence s of the cache gets the tokens row_offsets[s] to row_offsets[s + 1] - 1.
        positions : (tokens,) integers, optional
            Angles of the rotary embedding; by default a token's index in its sequence.  Masks go by the index.

        Returns
        -------
        (tokens, hidden_size) float32

        Raises
        ------
        ValueError
            For a wrong shape, or NaN or infinity in `x`; on a GPU, where looking for them would make the host wait,
            they give NaN instead.
        DeviceError
            If `x` or the cache is elsewhere than the layer.
        CacheError
            If a sequence outgrows the cache.  The cache is as it was.
        """
        cache = self.kv_cache if kv_cache is None else kv_cache
        x, offsets = self._check_input(x, cache, row_offsets)
        batch = _batch(cache, offsets)
        if positions is not None:
            batch = batch._replace(angles=ops.token_positions(positions, len(x)))
        lengths = cache.lengths + np.diff(offsets)
        cache.reserve(lengths)
        rotation = self.rope.rotation(int(batch.angles.max(initial=-1)) + 1, self.device)
        with devices.current(self.device):
            out = self.forward(x, cache, batch.to(self.device), rotation)
        cache.note(lengths)
        return out

    def forward(self, x: Array, cache: KVCache, batch: Batch, rotation: Rotation) -> Array:
        """The steps of a call, without its checks.

        x : (tokens, hidden_size) float32, for which the cache has room
        batch : where they belong, on the layer's device
        rotation : for all of the batch's angles
        """
        backend = backends.of(x)
        qkv = self._project(x, backend)
        heads = self._rotate_and_attend(qkv, cache, batch, rotation, backend)
        return self.o_proj(heads.reshape(len(x), self.num_attention_heads * self.kv_params.values))  # type: ignore[misc]

    def _check_input(self, x: Any, cache: KVCache, row_offsets: Any) -> tuple[Array, Array]:
        _ = self.wqkv  # an error if there are no weights
        x = as_array(x, "x")
        for what, device in (("x is", device_of(x)), ("kv_cache is", cache.device)):
            if device != self.device:
                raise DeviceError(f"{what} on {device}, the layer on {self.device}; both must be on the same")
        with devices.current(self.device):
            x = as_float32(x)
        _check.shape("x", x, ("tokens", self.hidden_size))
        if self.device == "cpu" and not np.isfinite(x).all():
            token, column = np.argwhere(~np.isfinite(x))[0]
            raise ValueError(f"x[{token}, {column}] is {x[token, column]}; attention needs finite numbers")
        mine, its = self.kv_params, cache.params
        if (mine.n_kv_heads, mine.head_dim, mine.values) != (its.n_kv_heads, its.head_dim, its.values):
            raise CacheError(f"kv_cache is for {its}; the layer needs {mine}")
        if row_offsets is None:
            if cache.sequences > 1:
                raise ValueError(
                    f"kv_cache has {cache.sequences} sequences; row_offsets must say which tokens are whose"
                )
            return x, np.array([0, len(x)])
        offsets = as_host(row_offsets, "row_offsets")
        _check.shape("row_offsets", offsets, (cache.sequences + 1,))
        offsets = offsets.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(x) or (np.diff(offsets) < 0).any():
            raise ValueError(f"row_offsets is {offsets.tolist()}; expected to rise from 0 to {len(x)}, the tokens of x")
        return x, offsets

    def _project(self, x: Array, backend: Any) -> Array:
        """x → q, k and v side by side, (tokens, outputs) float32."""
        qkv = backend.scratch("qkv", (len(x), sum(self._projection_rows())))
        return ops.affine(x, self._qkv_proj, self._bias, out=qkv, precision=self.precision)  # type: ignore[arg-type]

    def _rotate_and_attend(self, qkv: Array, cache: KVCache, batch: Batch, rotation: Rotation, backend: Any) -> Array:
        """Rotate q and k, append k and v to the cache, and attend: (tokens, heads, value_dim) float32."""
        heads = backend.scratch("heads", (len(qkv), self.num_attention_heads, self.kv_params.values))
        exact = self.precision == "exact"
        backend.rotate_and_attend(qkv, rotation, batch, cache, self.mask, self.scale, exact=exact, out=heads)
        return heads  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Forget the tokens in the layer's own cache."""
        self.kv_cache.reset()

    def __repr__(self) -> str:
        p = self.kv_params
        weights = self._wqkv.format if self._wqkv is not None else "no weights"
        return (
            f"{type(self).__name__}(hidden_size={self.hidden_size}, heads={self.num_attention_heads}/{p.n_kv_heads}, "
            f"head_dim={p.head_dim}, wqkv={weights}, {self.rope!r}, cache={p.dtype}, device={self.device!r})"
        )


class GGUFQAttentionWithRope(AttentionWithRope):
    """Self-attention with rotary embedding over GGUF-quantized weights.

    Parameters
    ----------
    dtype
        Always uint8: quantized weights are bytes.
    quantization_encoding : str, optional
        The format that all weights have, such as "Q4_K".  Without it, each may have its own.
    others
        As in `AttentionWithRope`.
    """

    def __init__(self, *, dtype: Any = np.uint8, quantization_encoding: str | None = None, **parameters: Any) -> None:
        self.quantization_encoding = None
        if quantization_encoding is not None:
            self.quantization_encoding = formats.get(quantization_encoding).name
        super().__init__(dtype=dtype, **parameters)

    def _check_dtype(self, dtype: np.dtype[Any]) -> None:
        if dtype != np.uint8:
            raise ValueError(f"dtype is {dtype}; quantized weights are uint8 (for floats there is AttentionWithRope)")

    def _weight(self, name: str, value: Any, shape: tuple[int, int]) -> QuantArray:
        encoding = self.quantization_encoding
        if not isinstance(value, QuantArray):
            value = as_numpy(value, name)
            if value.dtype != np.uint8:
                raise ValueError(f"{name} has dtype {value.dtype}; expected a QuantArray, or uint8 blocks")
            if encoding is None:
                raise ValueError(f"{name} is plain bytes; say which format they have with quantization_encoding")
            value = QuantArray(value, encoding)
        if encoding is not None and value.format != encoding:
            raise ValueError(f"{name} has format {value.format}; quantization_encoding is {encoding}")
        _check.shape(name, value, shape)
        return value

    @classmethod
    def from_gguf(
        cls,
        model: GGUFFile | str | os.PathLike[str],
        layer: int = 0,
        *,
        precision: ops.Precision = "int8",
        cache_dtype: str = "bfloat16",
        max_length: int | None = None,
        device: str | None = None,
    ) -> GGUFQAttentionWithRope:
        """The attention of one layer of a GGUF file.

        Parameters
        ----------
        model : an open file, or a path
        layer : int
        cache_dtype, max_length
            Of the layer's own cache: see `KVCacheParams`.
        device : str, optional
            Where the layer computes; that of the file, unless said otherwise.

        Raises
        ------
        DeviceError
            If the device can't be used.
        GGUFError
            If tensors or metadata are missing.
        NotImplementedError
            If the architecture is not supported.
        """
        if not isinstance(model, GGUFFile):
            options: dict[str, Any] = {"precision": precision, "cache_dtype": cache_dtype, "max_length": max_length}
            with open_gguf(model) as opened:
                return cls.from_gguf(opened, layer, device=device, **options)
        config = architectures.describe(model, layer)
        state = _layer_tensors(model, layer)
        attention = cls(
            rope=config.rope,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            hidden_size=config.hidden_size,
            kv_params=KVCacheParams(
                config.num_key_value_heads, config.head_dim, config.value_dim, dtype=cache_dtype, max_length=max_length
            ),
            devices=[device or model.device],
            scale=config.scale,
            has_bias=any(name in state for name in ("q_proj.bias", "qkv_proj.bias")),
            mask_variant=config.mask_variant,
            precision=precision,
        )
        attention.load_state_dict(state)
        return attention


_GGUF_NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_output": "o_proj",
}


def _layer_tensors(model: GGUFFile, layer: int) -> dict[str, Any]:
    """The tensors of a layer's attention, by the names of a state dictionary."""
    state: dict[str, Any] = {}
    for theirs, ours in _GGUF_NAMES.items():
        for kind in ("weight", "bias"):
            name = f"blk.{layer}.{theirs}.{kind}"
            if name in model:
                state[f"{ours}.{kind}"] = model.mapped(name)
    needed = ["attn_output"] if "qkv_proj.weight" in state else ["attn_q", "attn_k", "attn_v", "attn_output"]
    missing = [f"blk.{layer}.{name}.weight" for name in needed if f"{_GGUF_NAMES[name]}.weight" not in state]
    if missing:
        raise GGUFError(f"{model.path} has no tensor {', '.join(missing)}")
    return state


def _one_device(names: Iterable[str] | None) -> str:
    resolved = [devices.resolve(name) for name in names or ["cpu"]]
    if len(set(resolved)) > 1:
        raise NotImplementedError(f"devices are {', '.join(resolved)}; a layer on several devices is not implemented")
    return resolved[0]


def _batch(cache: KVCache, offsets: Array) -> Batch:
    """Where new tokens belong that continue the sequences of a cache."""
    slots = np.repeat(np.arange(cache.sequences), np.diff(offsets))
    places = np.arange(offsets[-1]) - (offsets[:-1] - cache.lengths)[slots]
    return Batch(slots, places, places, offsets, one_each=bool((np.diff(offsets) == 1).all()))


def _clipped(weights: QuantArray, limit: float) -> QuantArray:
    """Weights clamped to [-limit, limit]: rows in which none exceeds it stay quantized, the others become float32."""
    values = np.asarray(weights)
    exceeds = (np.abs(values) > limit).any(axis=1)
    if not exceeds.any():
        return weights
    edges = np.flatnonzero(np.diff(exceeds)) + 1
    runs = []
    for rows in np.split(np.arange(len(exceeds)), edges):
        if exceeds[rows[0]]:
            clipped = np.clip(values[rows], -limit, limit).astype(np.float32)
            runs.append(QuantArray(clipped.view(np.uint8), "F32"))
        else:
            runs.append(weights[rows[0] : rows[-1] + 1])
    return QuantArray.stack(runs)
