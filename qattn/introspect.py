"""See what the layers of a model compute, switch heads off, and measure what a quantization costs.

>>> model = qattn.models.Model.from_gguf("model.gguf")                        # doctest: +SKIP
>>> seen = model.capture("The sky is blue", {"weights"}, layers=[3])          # doctest: +SKIP
>>> with ablated(model, 3, [0, 5]):                                           # doctest: +SKIP
...     logits = model.forward(tokens)
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qattn._backend import as_host, namespace
from qattn.architectures import describe
from qattn.attention import AttentionWithRope
from qattn.gguf_attention import GGUFQAttentionWithRope
from qattn.gguf_file import GGUFFile
from qattn.kv_cache import KVCache
from qattn.probe import Probe, Statistics

Array = np.ndarray[Any, Any]


def attentions(model: Any) -> list[AttentionWithRope]:
    """The attention of each layer of a `qattn.models.Model` or `Decoder`."""
    return [layer.attention for layer in getattr(model, "decoder", model).layers]


def attention_of(model: Any, layer: int) -> AttentionWithRope:
    """The attention of one layer."""
    found = attentions(model)
    if not 0 <= operator.index(layer) < len(found):
        raise ValueError(f"layer is {layer}; the model has layers 0 to {len(found) - 1}")
    return found[layer]


# Capture


@contextlib.contextmanager
def probed(model: Any, names: Iterable[str], layers: Iterable[int] | None = None) -> Iterator[Record]:
    """Let layers tell what they compute.

    Parameters
    ----------
    model : Model or Decoder
    names : str or iterable of str
        What to take, of `qattn.probe.NAMES`.
    layers : iterable of int, optional
        All, by default.

    Yields
    ------
    Record
        Whose `take` is to be called whenever the layers have computed.
    """
    chosen = range(len(attentions(model))) if layers is None else dict.fromkeys(layers)
    probes = {layer: Probe(names) for layer in chosen}
    with _probing((attention_of(model, layer), probe) for layer, probe in probes.items()):
        yield Record(probes)


@contextlib.contextmanager
def _probing(pairs: Iterable[tuple[AttentionWithRope, Probe]]) -> Iterator[None]:
    pairs = list(pairs)
    for attention, probe in pairs:
        attention.probe = probe
    try:
        yield
    finally:
        for attention, _ in pairs:
            attention.probe = None


class Record:
    """What layers of a model computed for a text that they read piece by piece."""

    def __init__(self, probes: Mapping[int, Probe]) -> None:
        self._probes = probes
        self._pieces: dict[int, list[dict[str, Any]]] = {layer: [] for layer in probes}

    def take(self) -> None:
        """Take what was computed for one more piece."""
        for layer, probe in self._probes.items():
            self._pieces[layer].append(probe.captured()[0])

    def joined(self) -> dict[int, dict[str, Any]]:
        """All pieces in one, by layers and names."""
        return {layer: _joined(pieces) for layer, pieces in self._pieces.items()}


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: _join(name, [piece[name] for piece in pieces]) for name in pieces[0]}


def _join(name: str, parts: list[Any]) -> Any:
    if len(parts) == 1 or name in ("k", "v"):
        return parts[-1]  # read from the cache, where all pieces are
    if name == "statistics":
        return Statistics(*(_join("", list(columns)) for columns in zip(*parts, strict=True)))
    xp = namespace(parts[0])
    if name not in ("scores", "weights"):
        return xp.concatenate(parts)
    heads, _, keys = parts[-1].shape
    tokens, nothing = sum(part.shape[1] for part in parts), 0 if name == "weights" else -np.inf
    whole, first = xp.full((heads, tokens, keys), nothing, np.float32), 0
    for part in parts:  # earlier pieces did not have the keys of later ones
        whole[:, first : first + part.shape[1], : part.shape[2]] = part
        first += part.shape[1]
    return whole


# Ablation


@contextlib.contextmanager
def ablated(model: Any, layer: int, heads: Iterable[int], factor: float = 0.0) -> Iterator[None]:
    """Switch heads of a layer off, or scale what they give, for what a model reads meanwhile.

    Parameters
    ----------
    model : Model or Decoder
    layer : int
    heads : iterable of int
    factor : float
        Of their output: see `AttentionWithRope.head_scale`.

    Raises
    ------
    ValueError
        The model has no such layer, or the layer no such head.
    """
    attention = attention_of(model, layer)
    before, count = attention.head_scale, attention.num_attention_heads
    scale = np.ones(count, np.float32) if before is None else before.copy()
    for head in dict.fromkeys(heads):
        if isinstance(head, (bool, np.bool_)) or not 0 <= operator.index(head) < count:
            raise ValueError(f"head is {head}; layer {layer} has heads 0 to {count - 1}")
        scale[head] *= factor
    attention.head_scale = scale
    try:
        yield
    finally:
        attention.head_scale = before


# What a quantization costs


class LayerCost(NamedTuple):
    """How far the attention of a layer is from that of another file, given the same input."""

    layer: int
    nmse: float
    """Normalized mean squared error of the block's output."""
    kl: Array
    """(heads,) float64: the Kullback-Leibler divergence of the weights, in nats, a mean over the tokens."""


def costs(model: Any, other: GGUFFile, tokens: Any) -> Iterator[LayerCost]:
    """Compare the attention of a model's layers with that of another file's, one by one.

    Each layer of both is given what the layer of `model` gets when the model reads the tokens.

    Parameters
    ----------
    model : Model or Decoder
        The one that is taken for true.  Its caches are emptied.
    other : GGUFFile
        Of the same architecture and shape: see `differences`.
    tokens : (tokens,) integers
    """
    layers = attentions(model)
    shared = {attention.config.shares_cache_of for attention in layers}
    inputs = getattr(model, "decoder", model).capture(tokens, {"input"})
    caches: dict[int, list[KVCache]] = {}
    for number, attention in enumerate(layers):
        x = inputs.pop(number)["input"]
        theirs = GGUFQAttentionWithRope.from_gguf(
            other, number, precision=attention.precision, cache_dtype=attention.kv_params.dtype, device=attention.device
        )
        of = attention.config.shares_cache_of
        pair = [KVCache(attention.kv_params, device=attention.device) for _ in range(2)] if of is None else caches[of]
        probes = [Probe({"scores"}), Probe({"scores"})]
        with _probing(zip((attention, theirs), probes, strict=True)):
            output = [each(x, kv_cache=cache) for each, cache in zip((attention, theirs), pair, strict=True)]
        if number in shared:
            caches[number] = pair
        yield LayerCost(number, nmse(output[1], output[0]), _divergence(*probes))


def nmse(got: Array, want: Array) -> float:
    """Normalized mean squared error: |got - want|² / |want|²."""
    got, want = (as_host(array).astype(np.float64) for array in (got, want))
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-300))


def _divergence(one: Probe, other: Probe) -> Array:
    """The Kullback-Leibler divergence of each head's weights and sink, (heads,) float64: a mean over the tokens."""
    total, tokens = 0.0, 0
    for a, b in zip(one.blocks(), other.blocks(), strict=True):
        xp = namespace(a.scores)
        for mine, its in ((a.log_weights, b.log_weights), (a.log_sinks[..., None], b.log_sinks[..., None])):
            seen = mine > -np.inf
            away = xp.where(seen, xp.exp(mine), 0) * (xp.where(seen, mine, 0) - xp.where(seen, its, 0))
            total = total + away.sum(axis=(1, 2), dtype=np.float64)
        tokens += a.scores.shape[1]
    return as_host(total) / tokens


def differences(one: GGUFFile, other: GGUFFile) -> list[str]:
    """What stands against comparing the attention of two files, a phrase each; nothing if they fit."""
    names = [file.metadata.get("general.architecture") for file in (one, other)]
    if names[0] != names[1]:
        return [f"the architecture is {names[1]!r}, not {names[0]!r}"]
    found = []
    for name, tensor in one.tensors.items():
        if re.match(r"blk\.\d+\.attn_", name):
            its = other.tensors.get(name)
            if its is None:
                found.append(f"there is no {name}")
            elif its.shape != tensor.shape:
                found.append(f"{name} has shape {its.shape}, not {tensor.shape}")
    extra = [name for name in other if re.fullmatch(r"blk\.\d+\.attn_output\.weight", name) and name not in one]
    found += [f"there is {name}, which {one.path} lacks" for name in extra]
    if not found:
        ours, theirs = (describe(file, 0) for file in (one, other))
        for field in _SHAPE:
            if getattr(ours, field) != getattr(theirs, field):
                found.append(f"{field} is {getattr(theirs, field)}, not {getattr(ours, field)}")
    return found


_SHAPE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "value_dim")
