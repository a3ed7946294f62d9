"""Attention of given queries, keys and values: the functional API of what layers do with their heads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from qattn import _check, backends, devices, masks
from qattn._backend import as_array, as_float32, as_host, check_device, device_of, namespace
from qattn.batch import Batch
from qattn.kv_cache import KVCache, KVCacheParams, SequenceCache, cascading
from qattn.logits import Logits
from qattn.masks import Mask
from qattn.ops import PRECISIONS, Precision, check_row_offsets, output, store

Array = np.ndarray[Any, Any]


def attention(
    q: Any,
    k: Any,
    v: Any = None,
    *,
    mask: Any = "causal",
    window: int | None = None,
    row_offsets: Any = None,
    key_offsets: Any = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: Any = None,
    sinks: Any = None,
    distances: Any = None,
    bias: Any = None,
    precision: Precision = "exact",
    out: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of queries over given keys and values, or over those in a cache.

    Parameters
    ----------
    q : (tokens, heads, head_dim) floats
    k : (keys, kv_heads, head_dim) floats;  v : (keys, kv_heads, value_dim) floats
        `heads` is a multiple of `kv_heads`.  float16 keys and values are kept as they are, others become float32.
        Or k is a cache, of any type, and v is left out: the queries belong to its last tokens.
    mask : str, MHAMaskVariant, mask, or array
        See `qattn.masks`; the last query is aligned with the last key.  An array (tokens, keys) or
        (tokens, heads, keys) of booleans says which keys are seen, one of floats is added to the scores.
    window : int, optional
        Of a mask by name that has one.
    row_offsets, key_offsets : (sequences + 1,) integers, optional
        Several sequences, packed: sequence s has the queries row_offsets[s] … row_offsets[s + 1] - 1 and the keys that
        key_offsets, by default the same, tells; those of a cache are in the cache.  Queries see their own sequence
        alone, and keys are counted in it: so an array as a mask, or a bias, has a column for each key of the longest.
    scale : float, optional
        Factor of the scores, 1 / sqrt(head_dim) by default.
    softcap : float
        Scores s become softcap · tanh(s / softcap); 0 leaves them.
    alibi : (heads,) floats, optional
        Slopes: a score loses its head's slope times the distance of query and key; see `alibi_slopes`.
    sinks : (heads,) floats, optional
        A score in the softmax of each head that no key and no value belong to.
    distances : (heads, 2 · span + 1) floats, optional
        Added to a score by how far its key is behind the query, from -span to span; see `relative_biases`.
    bias : (tokens, keys) or (tokens, heads, keys) floats, optional
        Added to the scores.
    precision : "exact" or "int8"
        In float32; or as fast as the type of a cache allows, as in a layer.
    return_lse : bool
        Return also the logarithm of each row's sum of exponentials, (tokens, heads).

    Returns
    -------
    (tokens, heads, value_dim) float32
        exp2 has a relative error below 3e-7.  A query that sees no key gives zeros.

    Raises
    ------
    ValueError
        For shapes that don't fit together.
    DeviceError
        If the arrays are on different devices.
    CacheError
        If queries see what a window of the cache has left behind.

    Examples
    --------
    >>> q, k, v = np.ones((2, 4, 8)), np.ones((5, 2, 8)), np.ones((5, 2, 8))
    >>> attention(q, k, v, mask="sliding_window_causal", window=3).shape
    (2, 4, 8)
    >>> cache = KVCache(KVCacheParams(n_kv_heads=2, head_dim=8, dtype="q8_0"))
    >>> cache.append(k, v)
    >>> attention(q, cache, alibi=alibi_slopes(4)).shape
    (2, 4, 8)
    """
    _check.choice("precision", precision, PRECISIONS)
    q = as_array(q, "q")
    _check.shape("q", q, ("tokens", "heads", "head_dim"))
    xp, device, (tokens, heads, head_dim) = namespace(q), device_of(q), q.shape
    scale = max(head_dim, 1) ** -0.5 if scale is None else scale
    _check.number("scale", scale)
    _check.number("softcap", softcap, least=0)
    with devices.current(device):
        kept = _kept if isinstance(k, SequenceCache) else _cached
        cache, rows = kept(q, k, v, row_offsets, key_offsets)
        shape = (tokens, heads, int(cache.lengths.max()))
        chosen, bias = _mask_and_bias(mask, window, bias, shape, device)
        _check_queries(chosen, cache, rows)
        given = {"alibi": alibi, "sinks": sinks, "distances": distances}
        arrays = (None if values is None else _per_head(name, values, heads, xp) for name, values in given.items())
        slopes, sinks, distances = arrays
        logits = Logits(scale, softcap, slopes, sinks, bias, distances)
        if isinstance(k, SequenceCache):
            batch = Batch.appended(cache.lengths, rows)
            positions = cache.positions_at(batch.slots, batch.places)
            chosen, logits = by_positions(chosen, logits, cache, positions, batch, cache.lengths)
        out = output(out, xp, (tokens, heads, cache.params.values))
        queries, exact = xp.array(q, np.float32), precision == "exact"  # a copy: back ends may use it as they like
        attend, offsets = (cascading.attend, rows) if cache.cascade else (backends.of(q).attend, xp.asarray(rows))
        _, lse = attend(queries, cache, offsets, chosen, logits, exact=exact, out=out)
    return (out, lse) if return_lse else out


def _cached(q: Array, k: Any, v: Any, row_offsets: Any, key_offsets: Any) -> tuple[SequenceCache, Array]:
    """A cache of given keys and values, and whose tokens q has."""
    k, v = as_array(k, "k"), as_array(v, "v")
    for other, name in ((k, "k"), (v, "v")):
        check_device(name, other, "q is", device_of(q))
    _check.shape("k", k, ("keys", "kv_heads", q.shape[2]))
    _check.shape("v", v, (*k.shape[:2], "value_dim"))
    for array, name in ((q, "q"), (k, "k"), (v, "v")):
        if 0 in array.shape[1:]:
            raise ValueError(f"{name} has shape {array.shape}; heads, and their elements, are at least one")
        if device_of(q) == "cpu":
            _check.finite(name, array)
    keys, kv_heads, value_dim = v.shape
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, k has {kv_heads}; expected a multiple")
    rows, columns = _offsets(row_offsets, key_offsets, len(q), keys)
    params = KVCacheParams(
        kv_heads, q.shape[2], value_dim, dtype="float16" if k.dtype == v.dtype == np.float16 else "float32"
    )
    cache = KVCache(params, len(rows) - 1, device=device_of(q))
    kv = namespace(q).concatenate(
        [k.reshape(keys, kv_heads * q.shape[2]), v.reshape(keys, kv_heads * value_dim)], axis=1
    )
    store(as_float32(kv, "k or v"), cache, columns)
    return cache, rows


def _kept(q: Array, cache: Any, v: Any, row_offsets: Any, key_offsets: Any) -> tuple[SequenceCache, Array]:
    """The same for a cache that there is."""
    if v is not None or key_offsets is not None:
        raise ValueError(
            "k is a cache, which has the values and tells whose keys are whose; leave v and key_offsets out"
        )
    return cache, cascading.check_queries(q, cache, row_offsets)


def alibi_slopes(heads: int, max_bias: float = 8.0) -> Array:
    """The slopes of attention with linear biases, (heads,) float32 (Press et al., 2022).

    They fall geometrically to ``2**-max_bias`` over the largest power of two of heads; heads beyond it take the odd
    terms of the sequence that is twice as long.
    """
    _check.at_least("heads", heads, 1)
    power = 2 ** int(np.log2(heads))
    first, rest = np.arange(1, power + 1), np.arange(1, 2 * (heads - power), 2)
    return np.exp2(-max_bias * np.concatenate([first / power, rest / (2 * power)])).astype(np.float32)


_FARTHEST = 128  # tokens: T5's buckets do not tell longer distances apart


def relative_biases(buckets: Any, two_sided: bool) -> Array:
    """T5's relative position biases (Raffel et al., 2020) by distance, as `attention` takes them.

    Parameters
    ----------
    buckets : (buckets, heads) float32
        Half of the buckets, or all if keys on one side only are told apart, hold a distance each for the first half of
        them, and then distances that grow by equal factors up to 128.
    two_sided : bool
        Later keys have half of the buckets to themselves.

    Returns
    -------
    (heads, 257) float32

    Examples
    --------
    >>> relative_biases(np.arange(32.0)[:, None], two_sided=False)[0, [128, 127, 126, 28]]
    array([ 0.,  1.,  2., 30.], dtype=float32)
    """
    buckets = as_host(buckets, "buckets")
    _check.shape("buckets", buckets, ("buckets", "heads"))
    least, most = (4, 511) if two_sided else (2, 255)
    if not least <= len(buckets) <= most:
        raise ValueError(f"buckets has {len(buckets)} rows; expected {least} to {most}")
    away = np.arange(-_FARTHEST, _FARTHEST + 1)
    count = len(buckets) // 2 if two_sided else len(buckets)
    exact, distance = count // 2, np.abs(away) if two_sided else np.maximum(-away, 0)
    with np.errstate(divide="ignore"):
        growth = np.log(distance / exact) / np.log(_FARTHEST / exact) * (count - exact)
    far = np.minimum(exact + np.maximum(growth, 0).astype(np.int64), count - 1)
    chosen = np.where(distance < exact, distance, far) + (count * (away > 0) if two_sided else 0)
    return np.ascontiguousarray(buckets[chosen].T, np.float32)


def score_bias(name: str, array: Any, shape: tuple[int, int, int], device: str) -> Array:
    """A mask or bias that is an array, as what is added to scores: (tokens, heads or 1, keys) float32."""
    tokens, _, keys = shape
    array = as_array(array, name)
    check_device(name, array, "the queries are", device)
    if array.shape not in ((tokens, keys), shape):
        raise ValueError(f"{name} has shape {array.shape}; expected ({tokens}, {keys}) or {shape}")
    xp, array = namespace(array), array if array.ndim == 3 else array[:, None]
    with devices.current(device):
        if array.dtype.kind not in "bf":
            raise ValueError(
                f"{name} has dtype {array.dtype}; expected booleans (what is seen) or floats (what is added)"
            )
        if array.dtype == bool:
            array = xp.where(array, np.float32(0), np.float32(-np.inf))
        elif device == "cpu":
            _check.scores(name, array)
        return xp.ascontiguousarray(array, dtype=np.float32)


def by_positions(
    mask: Mask,
    logits: Logits,
    cache: SequenceCache,
    positions: Array,
    batch: Batch,
    lengths: Array,
    others: bool = False,
) -> tuple[Mask, Logits]:
    """A mask and biases by distance for kernels, which know indices alone: as an array if positions are no indices.

    positions : (tokens,) or (rows, tokens) int64, of which the largest counts, of a batch on the host
    lengths : (sequences,) int64, the new tokens included
    others : whether the cache has tokens of other sequences, so that not even what comes before is a matter of indices

    Raises
    ------
    CacheError
        If a token sees what the cache's window has left behind.
    """
    at, given, first = positions if positions.ndim == 1 else positions.max(axis=0), mask, None
    if not (cache.indexed and np.array_equal(at, batch.places)):
        mask, logits, first = _folded(mask, logits, cache, at, batch, lengths, others)
    cache.check_mask(given, lengths, batch.row_offsets, first)
    return mask, logits


def _folded(
    mask: Mask, logits: Logits, cache: SequenceCache, at: Array, batch: Batch, lengths: Array, others: bool
) -> tuple[Mask, Logits, Array | None]:
    """What `by_positions` gives for tokens at (tokens,) positions, and the index of the first key that each sees."""
    masked = not isinstance(mask, masks.Null if others else (masks.Causal, masks.Null))
    if not masked and logits.slopes is None and logits.distances is None:
        return mask, logits, None
    shape = len(at), int(lengths.max(initial=0))
    apart, seen = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for s, (begin, end) in enumerate(itertools.pairwise(batch.row_offsets.tolist())):
        known, mine = cache.positions(s), at[begin:end]
        keys = np.concatenate([known, mine[len(mine) + len(known) - lengths[s] :]])  # with those still to come
        apart[begin:end, : len(keys)] = keys - mine[:, None]
        if masked:
            seen[begin:end, : len(keys)] = masks.visible(mask, mine, keys)
    xp, there = devices.namespace(cache.device), devices.asarray(apart, cache.device)
    bias, first = xp.zeros((shape[0], 1, shape[1]), np.float32) if logits.bias is None else logits.bias, None
    if logits.slopes is not None:
        bias = bias - logits.slopes[:, None] * xp.abs(there)[:, None].astype(np.float32)
    if logits.distances is not None:
        span = logits.distances.shape[1] // 2
        bias = bias + logits.distances[:, xp.clip(there, -span, span) + span].transpose(1, 0, 2)
    if masked:  # what is left to the kernel is a window that has it all, so that the rest needs no reading
        bias = xp.where(devices.asarray(seen, cache.device)[:, None], bias, np.float32(-np.inf))
        first = np.where(seen.any(axis=1), seen.argmax(axis=1), np.maximum(batch.places, 0))
        around = masks.SlidingWindow if mask.bounds(0, 2)[1] <= 1 else masks.SlidingWindowNoncausal
        mask = masks.Null() if others else around(max(1, 1 + int((batch.places - first).max(initial=0))))
    bias = xp.ascontiguousarray(bias, dtype=np.float32)
    return mask, logits._replace(slopes=None, distances=None, bias=bias), first


def _offsets(row_offsets: Any, key_offsets: Any, tokens: int, keys: int) -> tuple[Array, Array]:
    """Where the queries, and the keys, of each sequence begin."""
    if row_offsets is None:
        if key_offsets is not None:
            raise ValueError("key_offsets was given without row_offsets; say which queries belong to which keys")
        return np.array([0, tokens]), np.array([0, keys])
    rows = check_row_offsets(row_offsets, tokens, "q")
    columns = check_row_offsets(rows if key_offsets is None else key_offsets, keys, "k")
    if len(rows) != len(columns):
        raise ValueError(f"row_offsets has {len(rows)} numbers, key_offsets {len(columns)}; expected as many")
    return rows, columns


def _mask_and_bias(
    mask: Any, window: int | None, bias: Any, shape: tuple[int, int, int], device: str
) -> tuple[Mask, Array | None]:
    """A mask for kernels, and what is added to the scores, (tokens, heads or 1, keys) float32."""
    parts = [] if bias is None else [score_bias("bias", bias, shape, device)]
    if hasattr(mask, "dtype"):
        parts, mask = [*parts, score_bias("mask", mask, shape, device)], "null"
    chosen = masks.get(mask, window)
    if not parts:
        return chosen, None
    return chosen, parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _check_queries(mask: Mask, cache: SequenceCache, row_offsets: Array) -> None:
    """Check that sequences have enough keys for their queries."""
    new, lengths = np.diff(row_offsets), cache.lengths
    few = np.flatnonzero(new > lengths)
    if few.size and mask.bounds(0, int(lengths.max())) != (0, lengths.max()):
        s = int(few[0])
        whose = f" of sequence {s}" if len(lengths) > 1 else ""
        raise ValueError(
            f"q has {new[s]} tokens{whose}, k has {lengths[s]}; the last of each are aligned, so k needs as many"
        )


def _per_head(name: str, values: Any, heads: int, xp: Any) -> Array:
    values = xp.ascontiguousarray(xp.asarray(values), dtype=np.float32)
    _check.shape(name, values, (heads, "distances") if name == "distances" else (heads,))
    if values.ndim == 2 and values.shape[1] % 2 == 0:
        raise ValueError(f"distances has {values.shape[1]} columns; expected an odd number, the same for both sides")
    if xp is np:
        _check.finite(name, values)
    return values
