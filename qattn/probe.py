"""What a layer's attention computes on its way, for whoever asks.

Kernels keep neither scores nor weights: these are computed once more, in float32, from the queries and the cached keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qattn import _check, devices
from qattn._backend import as_host, device_of, namespace
from qattn.logits import Logits
from qattn.masks import Mask, visible

Array = np.ndarray[Any, Any]

NAMES = ("input", "q", "k", "v", "scores", "weights", "statistics", "heads", "lse", "output")
_OF_SCORES = {"scores", "weights", "statistics"}
_BLOCK = 1 << 22  # scores at once: what lies between them and the statistics takes some times 16 MiB


class Statistics(NamedTuple):
    """How the attention of each head is spread, (tokens, heads) float32 each."""

    entropy: Array
    """Of the weights, and of the sink as one more, in nats: log(n) if n keys have the same weight."""
    distance: Array
    """The mean of the distances to the keys by their weights, in tokens; 0 if no key is seen."""
    first: Array
    """The weight of the sequence's first token."""
    sink: Array
    """What the head's sink takes: the weights sum to 1 minus this."""


class Block(NamedTuple):
    """Some queries of a sequence, and all of its keys."""

    scores: Array
    """(heads, tokens, keys), as the softmax gets them; -inf for what a query does not see."""
    log_weights: Array
    """(heads, tokens, keys)."""
    log_sinks: Array
    """(heads, tokens); -inf where there is no sink."""
    distances: Array
    """(tokens, keys): how many tokens lie between."""


class Probe:
    """Takes along what is asked for while a layer computes.

    All is float32 and on the layer's device.  With `row_offsets` there is a list of each, an entry for each sequence.
    Scores, weights and statistics are those of float32 arithmetic; kernels that multiply a cache in bfloat16 or bytes
    (unless ``precision="exact"``) round more.

    Parameters
    ----------
    names : str or iterable of str
        - "input" (tokens, hidden_size): what the layer was given.
        - "q" (tokens, heads, head_dim): the queries as attention gets them, behind norm and rotation.
        - "k" (keys, kv_heads, head_dim), "v" (keys, kv_heads, value_dim): those of the whole sequence, as the cache has
          rounded them, and zeros where it has let go of them.  With absorbed latent attention they, and q, are in the
          space of the compressed vector.
        - "scores" (heads, tokens, keys): as the softmax gets them; -inf for what a token does not see.
        - "weights" (heads, tokens, keys): behind the softmax; with what a sink takes, they sum to 1.
        - "statistics": how the weights are spread, without keeping them; see `Statistics`.
        - "heads" (tokens, heads, value_dim): what the output projection is given.  Unless there is a gate, a norm, a
          factor or a compressed vector in between, the weights' mean of the values.
        - "lse" (tokens, heads): the logarithms of the sums of exponentials, sinks included, as the kernel has them.
        - "output" (tokens, hidden_size): what the layer gives.
    """

    def __init__(self, names: Iterable[str]) -> None:
        if not isinstance(names, Iterable):
            raise TypeError(f"capture is {names!r}; expected names, of {', '.join(NAMES)}")
        self.names = frozenset([names] if isinstance(names, str) else names)
        for name in sorted(self.names):
            _check.choice("capture", name, NAMES)
        self.lse: Any = None
        """(tokens, heads): the logarithm of each sum of exponentials."""
        self._taken: dict[str, Any] = {}
        self._where: Any = None

    # While the layer computes.  Much of what it gives is memory that it will use again.

    def prepared(self, q: Array, cache: Any, batch: Any, mask: Mask, logits: Logits) -> None:
        """Take what attention is given: q (tokens, heads, head_dim)."""
        if self.names & (_OF_SCORES | {"q"}):
            self._taken["q"] = q.copy()
        self._where = cache, batch, mask, logits

    def projected(self, x: Array, heads: Array, output: Array) -> None:
        """Take the input (tokens, hidden_size), what the output projection is given, and what it gives."""
        if "heads" in self.names:
            tokens, count = self.lse.shape
            self._taken["heads"] = heads.reshape(tokens, count, heads.shape[1] // count).copy()
        for name, array in (("input", x), ("output", output)):
            if name in self.names:
                self._taken[name] = array.copy()

    # Afterwards, while the cache has no further tokens

    def answer(self, out: Array, lse: bool, captured: bool, lists: bool) -> tuple[Any, ...]:
        """The output, and what else was asked for, lists of it if there may be several sequences."""
        answer: tuple[Any, ...] = (out, self.lse) if lse else (out,)
        if captured:
            each = self.captured()
            answer += ({name: [one[name] for one in each] for name in each[0]} if lists else each[0],)
        return answer

    def captured(self) -> list[dict[str, Any]]:
        """What was asked for, of each sequence: see `AttentionWithRope`."""
        offsets = as_host(self._where[1].row_offsets)
        return [self._of_sequence(n, slice(a, b)) for n, (a, b) in enumerate(itertools.pairwise(offsets.tolist()))]

    def _of_sequence(self, sequence: int, rows: slice) -> dict[str, Any]:
        found = {name: array[rows] for name, array in {**self._taken, "lse": self.lse}.items()}
        if self.names & {"k", "v"}:
            found["k"], found["v"] = self._read(sequence)
        if self.names & _OF_SCORES:
            found |= self._of_scores(sequence)
        return {name: found[name] for name in NAMES if name in self.names}

    def _read(self, sequence: int) -> list[Array]:
        """The keys and values of a sequence, where the layer is."""
        cache = self._where[0]
        gone = int(cache.starts[sequence])
        both = (np.pad(array, ((gone, 0), (0, 0), (0, 0))) for array in cache.read(sequence, gone))
        return [devices.asarray(array, cache.device) for array in both]

    def _of_scores(self, sequence: int) -> dict[str, Any]:
        parts: dict[str, list[Any]] = {name: [] for name in _OF_SCORES & self.names}
        for block in self.blocks(sequence):
            for name, part in parts.items():
                part.append(_FROM_BLOCK[name](block))
        xp = namespace(self.lse)
        joined: dict[str, Any] = {
            name: xp.concatenate(part, axis=1) for name, part in parts.items() if name != "statistics"
        }
        if "statistics" in parts:
            columns = zip(*parts["statistics"], strict=True)
            joined["statistics"] = Statistics(*(xp.concatenate(list(column)) for column in columns))
        return joined

    def blocks(self, sequence: int = 0) -> Iterator[Block]:
        """The queries of a sequence, some at a time; one block at least."""
        cache, batch, mask, logits = self._where
        rows = slice(*as_host(batch.row_offsets)[sequence : sequence + 2].tolist())
        places = as_host(batch.places)[rows]
        q, (keys, _) = self._taken["q"][rows], self._read(sequence)
        count = max(1, _BLOCK // max(1, q.shape[1] * len(keys)))
        for first in range(0, max(1, len(q)), count):
            some = slice(first, first + count)
            bias = None if logits.bias is None else logits.bias[rows][some]
            with devices.current(cache.device):
                yield _block(q[some], keys, places[some], mask, logits._replace(bias=bias))


def _block(q: Array, keys: Array, places: Array, mask: Mask, logits: Logits) -> Block:
    """q (tokens, heads, head_dim) at these places of a sequence of keys (keys, kv_heads, head_dim)."""
    xp, device, (tokens, heads, size), kv_heads = namespace(q), device_of(q), q.shape, keys.shape[1]
    away = devices.asarray(np.arange(len(keys)) - places[:, None], device)
    group = heads // kv_heads
    grouped = q.reshape(tokens, kv_heads, group, size).transpose(1, 2, 0, 3).reshape(kv_heads, group * tokens, size)
    scores = (grouped @ keys.transpose(1, 2, 0)).reshape(heads, tokens, len(keys)) * np.float32(logits.scale)
    if logits.cap:
        scores = np.float32(logits.cap) * xp.tanh(scores / np.float32(logits.cap))
    if logits.slopes is not None:
        scores -= logits.slopes[:, None, None] * xp.abs(away).astype(np.float32)
    if logits.distances is not None:
        span = logits.distances.shape[1] // 2
        scores += logits.distances[:, xp.clip(away, -span, span) + span]
    if logits.bias is not None:
        biased = scores[:, :, : logits.bias.shape[2]]
        biased += logits.bias[:, :, : len(keys)].transpose(1, 0, 2)
    seen = devices.asarray(visible(mask, places, np.arange(len(keys))), device)
    scores = xp.where(seen, scores, np.float32(-np.inf))
    return Block(scores, *_log_softmax(scores, logits.sinks), xp.abs(away))


def _log_softmax(scores: Array, sinks: Array | None) -> tuple[Array, Array]:
    """The logarithms of the weights, and of what the sinks take; -inf throughout for a query that sees nothing."""
    xp = namespace(scores)
    sink = xp.full((*scores.shape[:2], 1), -np.inf, np.float32)
    if sinks is not None:
        sink[...] = sinks[:, None, None]
    both = xp.concatenate([scores, sink], axis=2)
    peak = both.max(axis=2, keepdims=True)
    both -= xp.where(peak > -np.inf, peak, np.float32(0))
    total = xp.exp(both).sum(axis=2, keepdims=True)
    both -= xp.log(xp.where(total > 0, total, np.float32(1)))
    return both[..., :-1], both[..., -1]


def _statistics(block: Block) -> Statistics:
    xp = namespace(block.scores)
    weights, sinks = xp.exp(block.log_weights), xp.exp(block.log_sinks)
    entropy = -_times_log(weights, block.log_weights).sum(axis=2) - _times_log(sinks, block.log_sinks)
    seen = weights.sum(axis=2)
    distance = (weights * block.distances).sum(axis=2) / xp.where(seen > 0, seen, np.float32(1))
    first = weights[..., :1].sum(axis=2)
    return Statistics(*(part.T.astype(np.float32) for part in (entropy, distance, first, sinks)))


def _times_log(weights: Array, logarithms: Array) -> Array:
    """w · log(w), which is 0 for 0."""
    return weights * namespace(weights).where(weights > 0, logarithms, np.float32(0))


_FROM_BLOCK = {
    "scores": lambda block: block.scores,
    "weights": lambda block: namespace(block.scores).exp(block.log_weights),
    "statistics": _statistics,
}
