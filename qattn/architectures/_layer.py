"""A layer of a file while it is described: its metadata and tensors, read the way llama.cpp reads them."""

from __future__ import annotations

from typing import Any, Literal

from qattn.architectures import _rope
from qattn.architectures._config import AttentionConfig, Gate, Norm
from qattn.architectures._metadata import Metadata
from qattn.errors import GGUFError
from qattn.masks import Causal, Mask, Null, SlidingWindow, SlidingWindowNoncausal
from qattn.rope import RotaryEmbedding


class NoAttention(NotImplementedError):
    """A layer without softmax attention: a recurrent one, or one that has no such block."""


class Layer:
    """What descriptions ask for, one layer's worth.

    Parameters
    ----------
    metadata : Metadata
    index : int
        The number of the layer.
    prefix : str
        What stands before the names of the block's tensors.
    """

    def __init__(self, metadata: Metadata, index: int, prefix: str) -> None:
        self.m, self.index, self.prefix = metadata, index, prefix
        self._first_windowed = False

    # Sizes

    @property
    def hidden(self) -> int:
        return self.m.integer("embedding_length")

    @property
    def heads(self) -> int:
        return self.m.integer("attention.head_count", layer=self.index)

    @property
    def kv_heads(self) -> int:
        return self.m.integer("attention.head_count_kv", self.heads, layer=self.index)

    @property
    def layers(self) -> int:
        """Layers of the model, but not those at the end that predict further tokens."""
        return self.m.integer("block_count") - self.m.integer("nextn_predict_layers", 0)

    def head_dims(self, window: bool | None = None) -> tuple[int, int]:
        """Elements of a head's key and of its value.

        Those of layers with a `window` may differ; few architectures heed that, in others all are like the first layer.
        """
        first = self.m.integer("attention.head_count", self.heads, least=0)  # the first layer's, as llama.cpp has it
        even = self.hidden // first or None
        key, value = self.m.integer("attention.key_length", even), self.m.integer("attention.value_length", even)
        if self._first_windowed if window is None else window:
            key = self.m.integer("attention.key_length_swa", key)
            value = self.m.integer("attention.value_length_swa", value)
        return key, value

    def has(self, name: str) -> bool:
        """Whether the block has a tensor."""
        return self.prefix + name in self.m.model

    # Masks

    @property
    def causal(self) -> bool:
        return bool(self.m.get("attention.causal", True))

    def windowed(self, period: int | None = None, *, dense_first: bool = False) -> bool:
        """Whether the layer has a sliding window.

        The file says so for each layer, or how often one comes that sees everything; without a `period` for those that
        say nothing, it has to.
        """
        name = "attention.sliding_window_pattern"
        listed = self.m.array(name)
        if listed is None and self.m.get(name) is not None:
            period = self.m.integer(name, least=0)
        if listed is None and period is None:
            raise GGUFError(f"metadata {self.m.key(name)} is missing")

        def of(index: int) -> bool:
            beyond = index >= self.layers
            if listed is not None and beyond and index >= len(listed):  # most writers leave these layers out
                return False
            if listed is not None:
                return bool(self.m.integer(name, layer=index, least=0))
            if not period or beyond:
                return not beyond
            return index % period != 0 if dense_first else index % period < period - 1

        self._first_windowed = of(0)
        return of(self.index)

    def mask(self, window: int = 0, *, causal: bool | None = None) -> Mask:
        """The mask of a layer that sees everything, or a window."""
        causal = self.causal if causal is None else causal
        if not window:
            return Causal() if causal else Null()
        return SlidingWindow(window) if causal else SlidingWindowNoncausal(window)

    def window(self, default: int | None = None) -> int:
        """Keys in the window of layers that have one."""
        return self.m.integer("attention.sliding_window", default)

    # Norms

    def norm(self, kind: Literal["rms", "layer"] = "rms", *, weighted: bool = True) -> Norm:
        """A norm with the epsilon of the model's norms of that kind."""
        name = "attention.layer_norm_rms_epsilon" if kind == "rms" else "attention.layer_norm_epsilon"
        return Norm(kind, self.m.number(name, 0.0), weighted)

    def qk_norms(self, kind: Literal["rms", "layer"] = "rms", *, optional: bool = False) -> dict[str, Any]:
        """Weighted norms of queries and keys; where they are optional, those that the file has weights of."""
        return {
            f"{name}_norm": self.norm(kind)
            for name in ("q", "k")
            if not optional or self.has(f"attn_{name}_norm.weight")
        }

    def gate(self, function: Literal["sigmoid", "softplus"]) -> dict[str, Any]:
        """A gate with a weight of its own, whose scale is not applied."""
        return {"gate": Gate(function), "unused": frozenset({"attn_gate.scale"})}

    # Positions

    @property
    def freq_base(self) -> float:
        return self.m.number("rope.freq_base", 10000.0)

    def freq_base_swa(self, default: float | None = None) -> float:
        """The base of layers with a window: that of the others if there is no default."""
        return self.m.number("rope.freq_base_swa", default or self.freq_base)

    def rope_dims(self, window: bool | None = None) -> int:
        """Elements of a head that turn; as with `head_dims`."""
        dims = self.m.integer("rope.dimension_count", self.head_dims(window=False)[0])
        window = self._first_windowed if window is None else window
        return self.m.integer("rope.dimension_count_swa", dims) if window else dims

    def rope(self, pairing: _rope.Pairing, **given: Any) -> RotaryEmbedding:
        """The rotary embedding: `rope_dims` and `freq_base`, unless given, and what `_rope.rotary` takes."""
        dims, base = given.pop("dims", None) or self.rope_dims(), given.pop("base", None) or self.freq_base
        return _rope.rotary(self.m, dims, base, pairing, **given)

    def unscaled_rope(self, pairing: _rope.Pairing, **given: Any) -> RotaryEmbedding:
        """The rotary embedding that knows no scaling of positions, whatever the metadata says of one."""
        return self.rope(pairing, scaling=_rope.Scaling(), **given)

    # The whole

    def attention(self, *, window: bool | None = None, **given: Any) -> AttentionConfig:
        """A description: fields that are not given are what most architectures have; `window` as in `head_dims`."""
        key, value = self.head_dims(window)
        fields: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": key,
            "value_dim": value,
            "scale": key**-0.5,
            "mask": self.mask(),
            "prefix": self.prefix,
        }
        return AttentionConfig(**(fields | given))

    def attention_scale(self) -> float:
        """``attention.scale``, for the architectures that read it."""
        return self.m.number("attention.scale", self.head_dims()[0] ** -0.5)

    def refuse(self, reason: str) -> NotImplementedError:
        """An error that names the architecture and the layer."""
        return NotImplementedError(f"{self.m.architecture}: layer {self.index} {reason}, which is not supported")

    def not_recurrent(self, recurrent: bool) -> None:
        """Refuse the layer of a hybrid model that is recurrent."""
        if recurrent:
            raise NoAttention(f"{self.m.architecture}: layer {self.index} is recurrent; it has no attention")

    def without_kv_heads(self) -> bool:
        """Whether the file says that this layer has no KV heads: that marks recurrent layers."""
        return self.m.integer("attention.head_count_kv", layer=self.index, least=0) == 0

    def sees_all_it_selects(self, keys: int) -> None:
        """Refuse a layer that selects the keys it sees, unless these are all that a context has."""
        context = min(self.m.integer("context_length"), self.m.context)
        if keys < context:
            raise self.refuse(f"selects {keys} of up to {context} keys by an indexer")
