"""What the attention kernels are specialized on: the mask, what happens to scores, and whether sequences have pages.

A `Variant` says which options there are.  Each gives the kernels device functions, and one that is off gives functions
that the compiler makes nothing of.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import float32, int32, int64, uint32

from qattn._meaning import mask_key
from qattn.cuda import ptx
from qattn.cuda.kernel import device
from qattn.logits import Logits

LOG2E = 1.4426950408889634
HIDDEN = -1e30  # below every score; finite, so that a row without any visible key gives 0, not NaN
EMPTY = -3e38  # of a hidden key, or a part that saw no key; fast math knows no infinity
MASK_FIELDS = 4  # integers that a mask can have
Array = Any


class Storage(NamedTuple):
    """How a kernel reads a cache."""

    keys: str
    """The kind of keys, as `qattn.cache_types` calls it."""
    values: str
    exact: bool = False
    """Products are computed in float32; else in bfloat16 for a bfloat16 cache, in float16 for all others but float32:
    both factors rounded to that, and summed in float32."""

    @property
    def key(self) -> str:
        """A name for its kernels."""
        return self.keys if self.keys == self.values else f"{self.keys}_{self.values}"

    @property
    def memory(self) -> tuple[type, str]:
        """A `Memory` for a kernel's signature."""
        keys, values = (ELEMENT.get(kind, "u8") for kind in self[:2])
        return Memory, f"{keys}* {values}* i64* i32 i32 i32"


def computed(kind: str) -> str:
    """What tensor cores multiply keys or values of a kind as."""
    return "bf16" if kind == "bf16" else "f16"


ELEMENT = {"f32": "f32", "f16": "u16", "bf16": "u16"}  # of a cache, as kernels take it; all others are bytes


class Variant(NamedTuple):
    """The options of a kernel."""

    mask: Any
    """The mask's class."""
    cap: bool = False
    slopes: bool = False
    sinks: bool = False
    bias: bool = False
    distances: bool = False
    paged: bool = False
    """Whether sequences may have several pages."""

    @classmethod
    def of(cls, mask: Any, logits: Logits, pages: Array) -> Variant:
        """What a mask, `Logits` and a page table ask for."""
        slopes, sinks, bias, distances = (array is not None for array in logits[2:])
        return cls(type(mask), bool(logits.cap), slopes, sinks, bias, distances, pages.shape[1] > 1)

    @property
    def sees(self) -> bool:
        """Whether the mask hides keys within the bounds, too."""
        return hasattr(self.mask, "sees")

    @property
    def key(self) -> str:
        """A name for its kernels."""
        return "_".join(
            [mask_key(self.mask), *(name for name, on in zip(self._fields[1:], self[1:], strict=True) if on)]
        )


class Given(NamedTuple):
    """What the options need, as kernels take it: scores in units of log 2, null for arrays that there aren't."""

    cap: float
    per_cap: float
    slopes: Array
    sinks: Array
    bias: Array
    distances: Array
    bias_heads: int
    bias_keys: int
    span: int
    f0: int
    f1: int
    f2: int
    f3: int

    @classmethod
    def of(cls, mask: Any, logits: Logits) -> Given:
        """From a mask and `Logits`."""
        _, heads, keys = (0, 0, 0) if logits.bias is None else logits.bias.shape
        span = 0 if logits.distances is None else logits.distances.shape[1] // 2
        fields = [*map(int, mask), *[0] * (MASK_FIELDS - len(mask))]
        arrays = (logits.slopes, logits.sinks, logits.bias, logits.distances)
        cap = logits.cap * LOG2E
        return cls(cap, 1 / cap if cap else 0.0, *arrays, heads, keys, span, *fields)


GIVEN = (Given, "f32 f32 f32* f32* f32* f32* i32 i32 i32 i32 i32 i32 i32")
"""For a kernel's signature."""

# ---------------------------------------------------------------------------------------------------------- masks


@functools.cache
def bounds_of(mask: Any) -> Callable[..., Any]:
    """A device function (given, query, keys) → (first, end), int32, within 0 … keys, for a mask's class."""
    bounds = _method(mask, "bounds", "query, keys")

    @device
    def bounds_within(given, query, keys):
        first, end = bounds(given, query, keys)
        return int32(max(first, 0)), int32(min(end, keys))

    return bounds_within


@functools.cache
def sees_of(mask: Any) -> Callable[..., Any]:
    """A device function (given, query, key) → whether a key within the bounds is seen, for a mask's class."""
    if hasattr(mask, "sees"):
        return _method(mask, "sees", "query, key")

    @device
    def always(given, query, key):
        return True

    return always


def _method(mask: Any, name: str, arguments: str) -> Callable[..., Any]:
    """A mask's method as a device function (given, …)."""
    fields = len(mask._fields)
    if fields > MASK_FIELDS:
        raise TypeError(f"{mask.__name__} has {fields} fields; a mask has at most {MASK_FIELDS} on a GPU")
    # Numba builds the named tuple only from arguments that are counted in the source.
    instance = f"mask({', '.join(f'given.f{i}' for i in range(fields))}), "
    if isinstance(inspect.getattr_static(mask, name), staticmethod):
        instance = ""
    scope = {"mask": mask, "method": device(getattr(mask, name))}
    exec(f"def {name}(given, {arguments}):\n    return method({instance}{arguments})", scope)
    return device(scope[name])


# --------------------------------------------------------------------------------------------------------- scores


class Row(NamedTuple):
    """A row of q, and what its scores need; what they don't need is 0."""

    query: int
    """The index in its sequence."""
    head: int
    slope: float
    distance_at: int
    bias_at: int


@device
def _read(array, index):
    """An element, read where it stands: many reads that are brought forward would take all registers."""
    return ptx.float_of(ptx.load_4_constant(array, index))


def scores_of(variant: Variant, precise: bool = False) -> tuple[Callable[..., Any], ...]:
    """Device functions (row_of, change, sink_of): a `Row`, what becomes of its score for a key, and its sink."""
    _, cap, slopes, sinks, bias, distances, _ = variant
    return _row_of(slopes, bias, distances), _change(cap, slopes, bias, distances, cap and precise), _sink_of(sinks)


@functools.cache
def _row_of(with_slopes: bool, with_bias: bool, with_distances: bool) -> Callable[..., Any]:
    @device
    def row_of(given, target, heads, shift):
        """target : the number of the row in q, token · heads + head;  shift : a token's index less its number in q."""
        token = int32(uint32(target) // uint32(heads))
        head = int32(target - token * heads)
        query, slope, distance_at, bias_at = int32(token + shift), float32(0), int64(0), int64(0)
        if with_slopes:
            slope = float32(given.slopes[head] * float32(LOG2E))
        if with_distances:
            distance_at = int64(head) * int32(2 * given.span + 1) + given.span
        if with_bias:
            bias_at = (int64(token) * given.bias_heads + min(head, int32(given.bias_heads - 1))) * given.bias_keys
        return Row(query, head, slope, distance_at, bias_at)

    return row_of


@functools.cache
def _change(
    with_cap: bool, with_slopes: bool, with_bias: bool, with_distances: bool, precise: bool
) -> Callable[..., Any]:
    tanh = _tanh(precise)

    @device
    def change(given, row, s, key):
        """Keys behind the last are allowed; what becomes of them doesn't matter."""
        apart = int32(key - row.query)
        if with_cap:
            s = float32(given.cap * tanh(float32(s * given.per_cap)))
        if with_slopes:
            s = float32(s - row.slope * float32(abs(apart)))
        if with_distances:
            apart = int32(min(max(apart, int32(-given.span)), given.span))
            s = float32(s + float32(LOG2E) * _read(given.distances, row.distance_at + apart))
        if with_bias:
            bias = _read(given.bias, row.bias_at + min(int32(key), int32(given.bias_keys - 1)))
            s = float32(s + float32(LOG2E) * max(bias, float32(EMPTY / 2)))  # -inf would not survive fast math
        return s

    return change


@functools.cache
def _sink_of(with_sinks: bool) -> Callable[..., Any]:
    @device
    def sink_of(given, row, counts):
        """The sink of the row's head where it counts; elsewhere `HIDDEN`, which is none."""
        sink = float32(HIDDEN)
        if with_sinks and counts:
            sink = max(float32(given.sinks[row.head] * float32(LOG2E)), sink)
        return sink

    return sink_of


@functools.cache
def _tanh(precise: bool) -> Callable[..., Any]:
    """A device function: tanh to 2e-7, of 1 or, if `precise`, of itself."""

    @device
    def tanh(x):
        size = min(abs(x), float32(10))  # tanh(10) is 1
        power = ptx.exp2(float32(size * float32(2 * LOG2E)))
        y = float32(float32(1) - float32(2) / float32(power + float32(1)))
        if precise and size < float32(0.6):  # where 1 - … cancels: a polynomial, to 9e-8
            x2 = float32(size * size)
            tail = float32(0.13312598) + x2 * float32(float32(-0.0521884) + x2 * float32(0.0155801))
            y = float32(size + size * x2 * float32(float32(-0.33332564) + x2 * tail))
        return y if x > float32(0) else float32(-y)

    return tanh


# ---------------------------------------------------------------------------------------------------------- pages


class Memory(NamedTuple):
    """A cache as kernels take it, see `qattn.cuda.attention.CacheView`."""

    keys: Array
    values: Array
    pages: Array
    kv_heads: int
    page_tokens: int
    each: int
    """Pages that a sequence may have."""

    @classmethod
    def of(cls, cache: Any) -> Memory:
        """From a `CacheView`."""
        _, kv_heads, page_tokens, _ = cache.keys.shape
        return cls(cache.keys, cache.values, cache.pages, kv_heads, page_tokens, cache.pages.shape[1])


@functools.cache
def bases_of(paged: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (base_of, base_for): where a KV head of a sequence lies.

    base_of(cache, sequence, head, key) → base: key lies at base + key, counted in keys, and so do others of its page
    base_for(cache, sequence, head, key, base) → that for another key, given one
    """

    @device
    def only(cache, sequence, head, key):
        return (cache.pages[sequence] * cache.kv_heads + head) * cache.page_tokens

    @device
    def same(cache, sequence, head, key, base):
        return base

    @device
    def found(cache, sequence, head, key):
        page = int64(uint32(key) // uint32(cache.page_tokens))
        there = cache.pages[int64(sequence) * cache.each + page] * cache.kv_heads + head
        return (there - page) * cache.page_tokens

    @device
    def found_anew(cache, sequence, head, key, base):
        return found(cache, sequence, head, key)

    return (found, found_anew) if paged else (only, same)
