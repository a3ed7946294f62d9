"""Attention over random caches, and what it should give: what several files test with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qattn import cache_types
from qattn.cache_types import stride
from qattn.cuda import attention as cuda_attention
from qattn.cuda.attention import CacheView, Partial, Storage
from qattn.kv_cache import layouts
from qattn.logits import Logits
from qattn.masks.causal import Causal
from qattn.masks.null import Null
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

CODES = [type_.kind for type_ in cache_types.TYPES if type_.bits <= 8]
NMSE = {"f32": 2e-12, "f16": 1e-5, "bf16": 1e-4}  # rounding q and the weights to float16, or bfloat16
LSE = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2}  # q·k of about 1, with q rounded, and log2 to 2e-7 of itself
OPTIONS = ("cap", "slopes", "sinks", "bias", "distances")


class Window(NamedTuple):
    """A mask with a field that qattn doesn't know."""

    window: int

    def bounds(self, query, keys):
        return max(0, query - self.window + 1), query + 1


class Before(NamedTuple):
    """A query sees the keys that lie at least `gap` before it; the first ones see nothing."""

    gap: int

    def bounds(self, query, keys):
        return 0, query + 1 - self.gap


class Strided(NamedTuple):
    """A query sees every `stride`-th key before it."""

    stride: int

    def bounds(self, query, keys):
        return 0, query + 1

    def sees(self, query, key):
        return (query - key) % self.stride == 0


MASKS = [Causal(), Null(), Window(37), Window(1), Before(5), Strided(3)]


def empty_cache(cupy, kind, sequences, kv_heads, capacity, head_dim, value_dim):
    """A cache without tokens, whose sequences have a page each."""
    keys, values = (
        cupy.zeros((sequences, kv_heads, capacity, stride(each, size)), ELEMENT.get(each, np.uint8))
        for each, size in zip(storage_of(kind)[:2], (head_dim, value_dim), strict=True)
    )
    return CacheView(keys, values, head_dim, value_dim, cupy.asarray(np.arange(sequences)[:, None]))


def in_pages(cupy, cache, tokens, seed=0):
    """The same cache in pages of so many tokens, in random order, and one that belongs to nobody."""
    sequences, kv_heads, capacity, _ = cache.keys.shape
    table = 1 + np.random.default_rng(seed).permutation(sequences * (capacity // tokens)).reshape(sequences, -1)
    made = []
    for array in (cache.keys.get(), cache.values.get()):
        paged = np.zeros((table.size + 1, kv_heads, tokens, array.shape[3]), array.dtype)
        paged[table] = array.reshape(sequences, kv_heads, -1, tokens, array.shape[3]).transpose(0, 2, 1, 3, 4)
        made.append(cupy.asarray(paged))
    return CacheView(*made, cache.head_dim, cache.value_dim, cupy.asarray(table[cache.pages.get()[:, 0]]))


def storage_of(kind, exact=False):
    """What kernels take for a kind, or for "keys/values"."""
    return Storage(kind.split("/")[0], kind.split("/")[-1], exact)


def random_rows(kind, shape, size, seed):
    """Rows of numbers that are about as large as normal ones: shape + (stride,)."""
    x, random = normal((*shape, stride(kind, size)), seed), np.random.default_rng(seed)
    if kind in ("f32", "f16"):
        return x.astype(ELEMENT[kind])
    if kind == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    rows = random.integers(0, 256, (*shape, stride(kind, size)), np.uint8)
    if kind == "f8":
        return rows & 0xBF  # below 2
    type_ = cache_types.of_kind(kind)
    blocks, signs = -(-size // 32), random.choice([-1, 1], (2, *shape, -(-size // 32)))
    scales = random.uniform(0.5, 1.5, signs.shape[1:]) * 2 / (type_.table[-1] if type_.table else 1 << type_.bits)
    factors = [scales * signs[0] if type_.signed_scale else scales, -scales * (1 << type_.bits - 1)]
    for i, factor in enumerate(factors[: 1 + type_.offset]):
        start = blocks * (4 * type_.bits + 2 * i)
        rows[..., start : start + 2 * blocks] = np.ascontiguousarray(factor.astype(np.float16)).view(np.uint8)
    return rows


ELEMENT = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def widened(kind, stored, size):
    """The numbers in rows (…, stride) of a cache: (…, size) float32."""
    rows, type_ = stored.get().reshape(-1, 1, stored.shape[-1]), cache_types.of_kind(kind)
    taken = layouts._row_codes(rows, type_, size) if type_.in_blocks else layouts._widened(rows, kind)[..., :size]
    return taken.reshape(*stored.shape[:-1], size)


def contents(kind, cache, sequence):
    """Keys and values of a sequence, (capacity, kv_heads, …) float32."""
    pages, made = cache.pages.get()[sequence], []
    for each, array, size in zip(storage_of(kind), cache[:2], (cache.head_dim, cache.value_dim), strict=False):
        taken = widened(each, array, size)[pages].transpose(0, 2, 1, 3)
        made.append(taken.reshape(-1, *taken.shape[2:]))
    return made


class Case(NamedTuple):
    """A ragged batch over a cache of random numbers: behind each sequence's end, too."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    new: tuple[int, ...]
    before: tuple[int, ...]
    capacity: int = 0
    exact: bool = False
    options: tuple[str, ...] = ()
    """Of `OPTIONS`; "one bias" is the same for all heads."""
    page: int = 0
    """Tokens of a page, if there are pages."""
    cap: float = 1.5

    @property
    def storage(self):
        return storage_of(self.kind, self.exact)

    @property
    def tolerance(self):
        """The kind of number that it is computed in, at the coarsest."""
        if cuda_attention.path(self.storage, self.head_dim, self.value_dim) == "exact":
            return "f32"
        return "bf16" if "bf16" in self.storage else "f16"

    @property
    def lengths(self):
        return np.add(self.new, self.before)

    @property
    def room(self):
        unit = self.page or 64
        return self.capacity or -(-int(self.lengths.max()) // unit) * unit

    @property
    def offsets(self):
        return np.concatenate([[0], np.cumsum(self.new)])

    def arrays(self, cupy, seed=0):
        """q and the cache, in which sequences lie in another order than in the batch."""
        slots = len(self.new) + 1
        q = cupy.asarray(normal((sum(self.new), self.heads, self.head_dim), seed))
        made = [
            cupy.asarray(random_rows(kind, (slots, self.kv_heads, self.room), size, seed + i))
            for i, (kind, size) in enumerate(zip(self.storage, (self.head_dim, self.value_dim), strict=False), 1)
        ]
        pages = cupy.asarray(np.arange(len(self.new))[::-1, None] + 1)
        cache = CacheView(*made, self.head_dim, self.value_dim, pages)
        return q, in_pages(cupy, cache, self.page, seed) if self.page else cache

    def logits(self, scale=None, seed=0):
        """`Logits` of NumPy arrays."""
        given: dict[str, Any] = {}
        if "cap" in self.options:
            given["cap"] = self.cap
        if "slopes" in self.options:
            given["slopes"] = np.exp2(-8 / self.heads * np.arange(1, self.heads + 1)).astype(np.float32)
        if "sinks" in self.options:
            given["sinks"] = normal(self.heads, seed + 3)
        if "bias" in self.options or "one bias" in self.options:
            heads = self.heads if "bias" in self.options else 1
            bias = normal((sum(self.new), heads, int(self.lengths.max())), seed + 4)
            given["bias"] = np.where(normal(bias.shape, seed + 5) > 1, np.float32(-np.inf), bias)
        if "distances" in self.options:
            given["distances"] = normal((self.heads, 2 * 5 + 1), seed + 6)
        return Logits(self.head_dim**-0.5 if scale is None else scale, **given)

    def run(self, cupy, mask, q, cache, logits=None):
        tokens, logits = len(q), logits or self.logits()
        out = cupy.full((tokens, self.heads, self.value_dim), np.nan, "f4")
        lse = cupy.full((tokens, self.heads), np.nan, "f4")
        there = Logits(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in logits))
        offsets, lengths = cupy.asarray(self.offsets), cupy.asarray(self.lengths)
        partial = Partial.room(tokens, len(self.new), self.heads, cache)
        cuda_attention.attend(self.storage, q, cache, offsets, lengths, mask, there, out, lse, partial)
        return out.get(), lse.get()

    def expected(self, mask, q, cache, logits=None):
        logits, outs, lses = logits or self.logits(), [], []
        for s, (new, length) in enumerate(zip(self.new, self.lengths, strict=True)):
            mine = slice(*self.offsets[s : s + 2])
            k, v = (a[:length] for a in contents(self.kind, cache, s))
            seen = np.array([[sees(mask, length - new + i, key, length) for key in range(length)] for i in range(new)])
            out, lse = reference.attention(
                q.get()[mine], k, v, logits.scale, seen.reshape(new, length), cap=logits.cap, slopes=logits.slopes,
                sinks=logits.sinks, bias=added(logits, mine, int(length)),
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        return np.concatenate(outs), np.concatenate(lses)

    def check(self, cupy, mask, seed=0):
        q, cache = self.arrays(cupy, seed)
        logits = self.logits(seed=seed)
        out, lse = self.run(cupy, mask, q, cache, logits)
        want, want_lse = self.expected(mask, q, cache, logits)
        kind = self.tolerance
        assert nmse(out, want) <= NMSE[kind]
        seen = np.isfinite(want_lse)
        assert np.array_equal(np.isneginf(lse), ~seen)
        assert np.abs(lse[seen] - want_lse[seen]).max(initial=0) < LSE[kind]
        assert not out[~seen].any()


def sees(mask, query, key, keys):
    """Whether a mask shows a key."""
    first, end = mask.bounds(query, keys)
    return first <= key < end and (not hasattr(mask, "sees") or mask.sees(query, key))


def added(logits, tokens, length):
    """What is added to the scores of a sequence's last tokens: (heads or 1, tokens, length)."""
    total = np.zeros((1, 1, 1))
    if logits.bias is not None:
        total = total + logits.bias[tokens, :, :length].transpose(1, 0, 2)
    if logits.distances is not None:
        span, new = logits.distances.shape[1] // 2, tokens.stop - tokens.start
        apart = np.arange(length) - np.arange(length - new, length)[:, None]
        total = total + logits.distances[:, np.clip(apart, -span, span) + span]
    return total


def decode(kind, group, head_dim, value_dim, before, **more):
    """One new token for each sequence."""
    return Case(kind, 2 * group, 2, head_dim, value_dim, (1,) * len(before), tuple(before), **more)
