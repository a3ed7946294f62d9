"""Attention of given queries, keys and values: the functional API of what layers do with their heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from qattn import _check, backends, devices, masks
from qattn._backend import as_array, as_float32, device_of, namespace
from qattn.kv_cache import KVCache, KVCacheParams
from qattn.logits import Logits
from qattn.masks import Mask
from qattn.ops import check_row_offsets, output, same_device, store

Array = np.ndarray[Any, Any]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = "causal",
    window: int | None = None,
    row_offsets: Any = None,
    key_offsets: Any = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: Any = None,
    sinks: Any = None,
    bias: Any = None,
    out: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of queries over given keys and values.

    Parameters
    ----------
    q : (tokens, heads, head_dim) floats
    k : (keys, kv_heads, head_dim) floats;  v : (keys, kv_heads, value_dim) floats
        `heads` is a multiple of `kv_heads`.  float16 keys and values are kept as they are, others become float32.
    mask : str, MHAMaskVariant, mask, or array
        See `qattn.masks`; the last query is aligned with the last key.  An array (tokens, keys) or
        (tokens, heads, keys) of booleans says which keys are seen, one of floats is added to the scores.
    window : int, optional
        Of a mask by name that has one.
    row_offsets, key_offsets : (sequences + 1,) integers, optional
        Several sequences, packed: sequence s has the queries row_offsets[s] … row_offsets[s + 1] - 1 and the keys that
        key_offsets, by default the same, tells.  Queries see their own sequence alone, and keys are counted in it: so
        an array as a mask, or a bias, has a column for each key of the longest one.
    scale : float, optional
        Factor of the scores, 1 / sqrt(head_dim) by default.
    softcap : float
        Scores s become softcap · tanh(s / softcap); 0 leaves them.
    alibi : (heads,) floats, optional
        Slopes: a score loses its head's slope times the distance of query and key; see `alibi_slopes`.
    sinks : (heads,) floats, optional
        A score in the softmax of each head that no key and no value belong to.
    bias : (tokens, keys) or (tokens, heads, keys) floats, optional
        Added to the scores.
    return_lse : bool
        Return also the logarithm of each row's sum of exponentials, (tokens, heads).

    Returns
    -------
    (tokens, heads, value_dim) float32
        Computed in float32; exp2 has a relative error below 3e-7.  A query that sees no key gives zeros.

    Raises
    ------
    ValueError
        For shapes that don't fit together.
    DeviceError
        If the arrays are on different devices.
    """
    q, k, v = (as_array(a, name) for a, name in ((q, "q"), (k, "k"), (v, "v")))
    for other, name in ((k, "k is"), (v, "v is")):
        same_device(q, device_of(other), name)
    xp = namespace(q)
    _check.shape("q", q, ("tokens", "heads", "head_dim"))
    _check.shape("k", k, ("keys", "kv_heads", q.shape[2]))
    _check.shape("v", v, (*k.shape[:2], "value_dim"))
    tokens, heads, head_dim = q.shape
    keys, kv_heads, value_dim = v.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, k has {kv_heads}; expected a multiple")
    rows, columns = _offsets(row_offsets, key_offsets, tokens, keys)
    longest = int(np.diff(columns).max())
    chosen, bias = _mask_and_bias(mask, window, bias, (tokens, heads, longest), device_of(q))
    if (np.diff(rows) > np.diff(columns)).any() and chosen.bounds(0, longest) != (0, longest):
        raise ValueError(f"q has {tokens} tokens, k has {keys}; the last of each are aligned, so k needs as many")
    dtype = "float16" if k.dtype == v.dtype == np.float16 else "float32"
    with devices.current(device_of(q)):
        logits = Logits(
            head_dim**-0.5 if scale is None else scale,
            softcap,
            None if alibi is None else _per_head("alibi", alibi, heads, xp),
            None if sinks is None else _per_head("sinks", sinks, heads, xp),
            bias,
        )
        cache = KVCache(KVCacheParams(kv_heads, head_dim, value_dim, dtype=dtype), len(rows) - 1, device=device_of(q))
        kv = xp.concatenate(
            [k.reshape(keys, kv_heads * head_dim), v.reshape(keys, kv_heads * value_dim)], axis=1
        ).astype(np.float32, copy=False)
        store(as_float32(kv), cache, columns)
        out = output(out, xp, (tokens, heads, value_dim))
        _, lse = backends.of(q).attend(as_float32(q), cache, xp.asarray(rows), chosen, logits, exact=True, out=out)
    return (out, lse) if return_lse else out


def alibi_slopes(heads: int, max_bias: float = 8.0) -> Array:
    """The slopes of attention with linear biases, (heads,) float32 (Press et al., 2022).

    They fall geometrically to ``2**-max_bias`` over the largest power of two of heads; heads beyond it take the odd
    terms of the sequence that is twice as long.
    """
    power = 2 ** int(np.log2(heads))
    first, rest = np.arange(1, power + 1), np.arange(1, 2 * (heads - power), 2)
    return np.exp2(-max_bias * np.concatenate([first / power, rest / (2 * power)])).astype(np.float32)  # type: ignore[no-any-return]


def score_bias(name: str, array: Any, shape: tuple[int, int, int], device: str) -> Array:
    """A mask or bias that is an array, as what is added to scores: (tokens, heads or 1, keys) float32."""
    tokens, _, keys = shape
    array = as_array(array, name)
    same_device(array, device, f"{name} belongs to arrays that are")
    if array.shape not in ((tokens, keys), shape):
        raise ValueError(f"{name} has shape {array.shape}; expected ({tokens}, {keys}) or {shape}")
    xp, array = namespace(array), array if array.ndim == 3 else array[:, None]
    with devices.current(device):
        if array.dtype == bool:
            array = xp.where(array, np.float32(0), np.float32(-np.inf))
        return xp.ascontiguousarray(array, dtype=np.float32)  # type: ignore[no-any-return]


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


def _per_head(name: str, values: Any, heads: int, xp: Any) -> Array:
    values = xp.ascontiguousarray(xp.asarray(values), dtype=np.float32)
    _check.shape(name, values, (heads,))
    return values  # type: ignore[no-any-return]
