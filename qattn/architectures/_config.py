"""What a description of a layer's attention consists of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from qattn import _check
from qattn.masks import Mask, causal
from qattn.rope import RotaryEmbedding


class Norm(NamedTuple):
    """A norm of queries, keys or values.

    What it spans follows from the shape of its weight: (head_dim,) is the same for each head, (heads, head_dim) and
    (heads, 1) are a row of weights or a number for each head, (heads · head_dim,) spans all heads of a token together.
    """

    kind: Literal["rms", "layer"]
    epsilon: float
    weighted: bool = True
    """Whether there is a weight (and perhaps a bias): else it spans a head."""


class Temperature(NamedTuple):
    """Queries grow with the position p: they are multiplied by 1 + scale · log(1 + floor((p + offset) / length)).

    Of several positions of a token, p is the first, as in llama.cpp.
    """

    length: float
    scale: float
    offset: int = 0


GateFunction = Literal["sigmoid", "softplus"]


class Gate(NamedTuple):
    """The heads' output is multiplied by a function of x @ gate.T: a row of weights for each element, or each head."""

    function: GateFunction
    interleaved: bool = False
    """The rows of the gate lie in the weight of q: behind those of each head."""


class Latent(NamedTuple):
    """Multi-head latent attention (DeepSeek-AI, 2024): keys and values are made of a short vector for each token.

    The first `rank` numbers of that vector are normalized; the others, `rope_dims`, are a key that all heads share and
    the only part of a key that turns: the last elements of a head.  Where the weights are split (``attn_k_b`` and
    ``attn_v_b``), the vector itself is cached, and there is one KV head; where they are not (``attn_kv_b``), each
    head's key and value are.  `AttentionConfig.head_dim` and `value_dim` are those of what is cached.
    """

    rank: int
    rope_dims: int
    """Without an embedding (`rope` is None) this part is there as well, and does not turn."""
    key_dim: int
    """Elements of a head's key, `rope_dims` included, before it is absorbed."""
    value_dim: int
    """Elements of a head's value."""
    epsilon: float
    """Of the norms of the vector and of the compressed queries."""
    q_rank: int = 0
    """Elements of the compressed query (``attn_q_a``); 0: there is none."""
    absorbed: bool = True
    shared_norm: bool = False
    """The shared key is normalized before it turns: ``attn_k_norm``, RMS, with the same epsilon."""


_CAUSAL = causal.Causal()


@dataclass(frozen=True)
class AttentionConfig:
    """All that a layer's attention needs to know beside its weights.

    The steps, in order: x @ w.T · w.scale + bias → clamp → norms (unless `norm_after_rope`) → rotation → norms (if
    `norm_after_rope`) → temperature → scores and softmax → gate → `output_norm` → @ wo.T · wo.scale + bias.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    rope: RotaryEmbedding | None
    """None: nothing turns (NoPE layers, and models with absolute positions)."""
    scale: float
    """Factor of the scores; that of a query's own pre-scaling is a part of it."""
    mask: Mask = _CAUSAL
    clamp_qkv: float | None = None
    """Projected q, k and v are clamped to [-clamp_qkv, clamp_qkv]."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    norm_after_rope: bool = False
    temperature: Temperature | None = None
    softcap: float = 0.0
    """Soft cap of the scores; 0: none."""
    alibi: float = 0.0
    """The largest bias of ALiBi, from which the heads' slopes follow; 0: none."""
    sinks: bool = False
    """There is a sink for each head: ``attn_sinks.weight``."""
    distances: Literal["", "one-sided", "two-sided"] = ""
    """T5's relative position biases, over buckets of earlier keys alone or of keys on both sides."""
    distance_table: str = ""
    """The tensor of these biases, by its whole name, (buckets, heads): layers without one use the first layer's."""
    cross: bool = False
    """Keys and values are made of another sequence, which an encoder gave out; all of it is seen."""
    gate: Gate | None = None
    value_from_key: bool = False
    """There is no weight of v: it is what the weight of k gives, before its norm."""
    shares_cache_of: int | None = None
    """The layer whose keys and values this one reads, having none of its own."""
    output_norm: Norm | None = None
    """Of all heads' output together, before the output projection (BitNet's ``attn_sub_norm``)."""
    value_scale: float = 1.0
    """Factor of the heads' output."""
    output_scale: float = 1.0
    """Factor of the block's output, its bias not included."""
    latent: Latent | None = None
    prefix: str = ""
    """What stands before the names of the block's tensors: ``blk.3.``, ``enc.blk.3.``, ``dec.blk.3.cross_``."""
    output: str = "attn_output"
    """What the weight of the output projection is called, behind `prefix`."""
    unused: frozenset[str] = frozenset()
    """Tensors that a file may have and that this architecture does not apply, with their endings: ``attn_q.bias``,
    ``attn_gate.scale``.  (``.input_scale`` is never applied.)"""
    tensors: frozenset[str] = frozenset()
    """Tensors of the block that are understood beside the weights, biases and scales of q, k, v, qkv and output and
    those that the fields above speak of, without `prefix` before and the ``.weight`` behind them."""

    def __post_init__(self) -> None:
        """Raise ValueError for what can't be computed."""
        for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"):
            _check.at_least(name, getattr(self, name), 1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; expected a multiple of num_key_value_heads, "
                f"{self.num_key_value_heads}"
            )
        if self.rope is not None and self.rope.rope_dims > self.head_dim:
            raise ValueError(f"rope turns {self.rope.rope_dims} elements; kv_params has heads of {self.head_dim}")
        for name in ("scale", "softcap", "alibi", "value_scale", "output_scale"):
            _check.number(name, getattr(self, name))
        if self.latent is not None:
            for name in ("clamp_qkv", "q_norm", "k_norm", "v_norm", "cross"):
                if getattr(self, name) not in (None, False):
                    raise NotImplementedError(f"{name} in multi-head latent attention is not implemented")
        _check.choice("distances", self.distances, ("", "one-sided", "two-sided"))
        if self.temperature is not None:
            for name, least in (("length", 1e-9), ("scale", None), ("offset", 0)):
                _check.number(f"temperature.{name}", getattr(self.temperature, name), least)
        if self.gate is not None:
            if not isinstance(self.gate, Gate):
                raise ValueError(f"gate is {self.gate!r}; expected a Gate")
            _check.choice("gate.function", self.gate.function, get_args(GateFunction))
        for name in ("q_norm", "k_norm", "v_norm", "output_norm"):
            norm = getattr(self, name)
            if norm is not None:
                if not isinstance(norm, Norm):
                    raise ValueError(f"{name} is {norm!r}; expected a Norm")
                _check.choice(f"{name}.kind", norm.kind, ("rms", "layer"))
                if not norm.epsilon >= 0:
                    raise ValueError(f"{name}.epsilon is {norm.epsilon}; expected 0 or more")
        if self.softcap < 0:
            raise ValueError(f"softcap is {self.softcap}; expected 0 (none) or more")
        if self.clamp_qkv is not None and not self.clamp_qkv > 0:
            raise ValueError(f"clamp_qkv is {self.clamp_qkv}; expected a positive number")
        if self.value_from_key and self.head_dim != self.value_dim:
            raise ValueError(f"values are keys, but have {self.value_dim} elements, not {self.head_dim}")

    def scaled(self, factor: float) -> AttentionConfig:
        """The same with scores that are `factor` times as large."""
        return dataclasses.replace(self, scale=self.scale * factor)
