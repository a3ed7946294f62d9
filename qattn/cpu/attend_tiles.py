"""The micro-kernels of attention: a tile of 16 keys or values times rows of queries or weights, and the softmax.

See `qattn.cpu.attention` for how keys and values lie in tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from qattn import cache_types
from qattn.cache_types import CacheType
from qattn.cpu._jit import generated
from qattn.cpu.simd import LANES, Emitter, Pointer, Value, micro_kernel
from qattn.cpu.target import TARGET

KEY_BLOCK = 128  # keys per step of the online softmax: scores of 96 rows then take 48 KiB
MASKED = -1e30  # below every score; finite, so that a row without any visible key gives 0, not NaN
LOG2E = 1.4426950408889634
TOGETHER = 4  # rows whose softmax is computed at once, so that none waits for itself
STREAMED = max(TARGET.rows - 1, 8)  # rows at most for which memory binds, and is worth being asked ahead
AHEAD = 8192  # bytes of keys to ask for ahead: two tiles of 16 keys of 128 elements of 16 bits


class Storage(NamedTuple):
    """How a kernel reads keys or values: what is stored, and what the products are computed in."""

    kind: str
    """That of a `CacheType`."""
    compute: str
    """"f32"; "bf16": both factors rounded to bfloat16 and summed in float32, where they are stored so; "amx": likewise,
    in tile registers; or "int8": the other factor rounded to a byte, where codes are stored."""

    @classmethod
    def best(cls, kind: str, exact: bool) -> Storage:
        """The fastest way for a kind, or the exact one."""
        if exact:
            return cls(kind, "f32")
        if kind == "bf16":
            return cls(kind, "amx" if TARGET.amx else "bf16")
        return cls(kind, "int8" if cache_types.of_kind(kind).in_blocks else "f32")

    @property
    def type(self) -> CacheType:
        return cache_types.of_kind(self.kind)

    @property
    def pack(self) -> int:
        return pack(self.kind)

    @property
    def halves(self) -> bool:
        """Whether the left factor is bfloat16."""
        return self.compute in ("bf16", "amx")

    @property
    def words(self) -> int:
        """Broadcast words of the left factor for each vector of the right one."""
        return 2 if self.kind == "bf16" and self.compute == "f32" else 1

    @property
    def vector_bytes(self) -> int:
        """Bytes of the elements that all lanes take at once."""
        return LANES * self.pack * self.type.bits // 8


def pack(kind: str) -> int:
    """Elements that lie side by side in a lane."""
    return 2 if kind == "bf16" else 1


def _from_f8(e: Emitter, bits: Value) -> Value:
    """16 e4m3 numbers, as int8, to float32 (exact).  Moved to float16's place, their exponents are 8 too small."""
    return e.from_f16((bits.to(e.I16V) << 7) & -0x4080) * 256.0


def _accumulate(
    e: Emitter, storage: Storage, totals: list[Value], there: Pointer, left: list[list[Pointer]]
) -> list[Value]:
    """totals[m] + one vector of keys or values times the words that `left[m]` point to."""
    if storage.compute == "bf16":
        vector = there.load(e.I32V)
        return [e.dot2_bf16(t, vector, at[0].load(e.I32).splat(e.I32V)) for t, at in zip(totals, left, strict=True)]
    if storage.kind == "f32":
        vectors: tuple[Value, ...] = (there.load(e.F32),)
    elif storage.kind == "f16":
        vectors = (e.from_f16(there.load(e.I16V)),)
    elif storage.kind == "f8":
        vectors = (_from_f8(e, there.load(e.I8V)),)
    else:
        vectors = e.split_bf16(there.load(e.I32V))
    for i, vector in enumerate(vectors):
        totals = [e.fma(at[i].load(e.F32S).splat(e.F32), vector, t) for t, at in zip(totals, left, strict=True)]
    return totals


def each_tile(scores: Callable[..., None]) -> Any:
    """The micro-kernel for several tiles of keys, of scores(e, q, keys, scores, steps), which is for one.

    It has further arguments: tiles, bytes from a tile to the next, values, bytes of a tile of these, and how many lines
    of each to ask memory for meanwhile.
    """

    @micro_kernel
    def run(e, q, keys, out, steps, tiles, tile_bytes, values, value_bytes, lines):
        with e.loop(tiles) as tile:
            _ask(e, values.at(tile * value_bytes), lines)
            scores(e, q, keys.at(tile * tile_bytes), out.at(tile * (4 * LANES)), steps)

    return run


def scores_kernel(storage: Storage, rows: int) -> Any:
    """`rows` query rows times one tile of keys → scores, a row every KEY_BLOCK floats."""
    words, step = storage.words, storage.vector_bytes

    @each_tile
    def run(e, q, keys, scores, steps):
        totals = [e.register(e.constant(0.0, e.F32)) for _ in range(rows)]
        with e.loop(steps) as k:
            if rows <= STREAMED:
                e.prefetch(keys.at(k * step + AHEAD))
            at = q.at(k * (4 * words * rows))
            left = [[at.at(4 * (i * rows + m)) for i in range(words)] for m in range(rows)]
            for register, total in zip(
                totals, _accumulate(e, storage, [t.get() for t in totals], keys.at(k * step), left), strict=True
            ):
                register.set(total)
        for m in range(rows):
            scores.at(m * 4 * KEY_BLOCK).store(totals[m].get())

    return run


def values_kernel(storage: Storage, rows: int) -> Any:
    """out = out · factor + weights times the tiles of a 16-lane slice of values; `out` holds a row every 16 floats.

    ahead : bytes from a tile to the one to ask memory for meanwhile
    """
    words, step = storage.words, storage.vector_bytes
    row = KEY_BLOCK * (2 if storage.compute == "bf16" else 4)

    @micro_kernel
    def run(e, weights, values, out, factors, tiles, tile_bytes, ahead):
        totals = []
        for m in range(rows):
            factor = factors.at(4 * m).load(e.F32S).splat(e.F32)
            totals.append(e.register(out.at(m * 4 * LANES).load(e.F32) * factor))
        with e.loop(tiles) as tile:
            at, there = weights.at(tile * (row * LANES // KEY_BLOCK)), values.at(tile * tile_bytes)
            sums = [t.get() for t in totals]
            for k in range(LANES // storage.pack):
                if rows <= STREAMED and k * step % 64 == 0:
                    e.prefetch(there.at(k * step).at(ahead))
                left = [[at.at(m * row + 4 * (k * words + i)) for i in range(words)] for m in range(rows)]
                sums = _accumulate(e, storage, sums, there.at(k * step), left)
            for register, total in zip(totals, sums, strict=True):
                register.set(total)
        for m in range(rows):
            out.at(m * 4 * LANES).store(totals[m].get())

    return run


def some_rows(make: Callable[[Storage, int], Any], storage: Storage) -> Any:
    """An njit function run(rows, arguments) that does the first row, or TOGETHER if there are so many → how many."""
    one, several = make(storage, 1), make(storage, TOGETHER)

    @generated(f"{make.__name__}-{storage}")
    def run(rows, arguments):
        if rows < TOGETHER:
            one(arguments)
            return 1
        several(arguments)
        return TOGETHER

    return run


def softmax_kernel(storage: Storage, rows: int, masked: bool = False) -> Any:
    """Rows of scores of `tiles` tiles → weights, and the running maxima, sums and rescaling factors.

    scores, weights : a row every KEY_BLOCK
    If `masked`, keys outside first … end - 1, counted from the block's start, weigh nothing.
    """
    degree = 5 if storage.compute == "f32" else 4  # weights rounded to 8 bits need no more
    item = 2 if storage.halves else 4

    @micro_kernel
    def run(e, scores, weights, tiles, first, end, row_max, row_sum, factor):
        lanes = e.constant(list(range(LANES)), e.I32V)
        low, high = (bound.to(e.I32).splat(e.I32V) for bound in (first, end))
        hidden = e.constant(float("-inf"), e.F32)
        largest = [e.register(e.constant(MASKED, e.F32)) for _ in range(rows)]
        with e.loop(tiles) as tile:
            for m in range(rows):
                there = scores.at(m * 4 * KEY_BLOCK).at(tile * (4 * LANES))
                score = there.load(e.F32)
                if masked:
                    key = lanes + (tile * LANES).to(e.I32).splat(e.I32V)
                    score = key.compare(">=", low).where(key.compare("<", high).where(score, hidden), hidden)
                    there.store(score)
                largest[m].set(e.maximum(score, largest[m].get()))
        peaks, shrinks = [], []
        for m in range(rows):
            old, peak = row_max.at(4 * m).load(e.F32S), e.largest(largest[m].get())
            peak = peak.compare(">", old).where(peak, old)
            row_max.at(4 * m).store(peak)
            peaks.append(peak.splat(e.F32))
            shrinks.append(e.exp2((old - peak).splat(e.F32), degree).lane(0))
        totals = [e.register(e.constant(0.0, e.F32)) for _ in range(rows)]
        with e.loop(tiles) as tile:
            for m in range(rows):
                p = e.exp2(scores.at(m * 4 * KEY_BLOCK).at(tile * (4 * LANES)).load(e.F32) - peaks[m], degree)
                totals[m].set(totals[m].get() + p)
                rounded = e.to_bf16(p) if storage.halves else p
                weights.at(m * item * KEY_BLOCK).at(tile * (item * LANES)).store(rounded)
        for m in range(rows):
            factor.at(4 * m).store(shrinks[m])
            there = row_sum.at(4 * m)
            there.store(there.load(e.F32S) * shrinks[m] + e.sum(totals[m].get()))

    return run


def query_kernel(storage: Storage) -> Any:
    """Scatter one query row, times `scale`, into a column-major block: element d of it goes to word d of `panel`."""

    @micro_kernel
    def run(e, q, panel, scale, dims, steps, stride):
        def element(d: Value) -> Value:
            """Element d times the scale; 0 past the end, where an odd head is padded to a pair."""
            inside = d.compare("<", dims)
            value = q.at(inside.where(d, d * 0) * 4).load(e.F32S) * scale
            return inside.where(value, e.constant(0.0, e.F32S))

        with e.loop(steps) as k:
            if storage.compute == "bf16":
                word = e.round_bf16(element(k * 2)) | (e.round_bf16(element(k * 2 + 1)) << 16)
                panel.at(k * stride).store(word)
            else:
                for i in range(storage.words):
                    d = k * storage.words + i
                    panel.at(d * stride).store(element(d))

    return run


@micro_kernel
def fetch(e, there, size):
    """Ask for so many bytes of an array."""
    _ask(e, there, (size + 63) >> 6)


def _ask(e: Emitter, there: Pointer, lines: Value) -> None:
    with e.loop(lines) as line:
        e.prefetch(there.at(line * 64))


@micro_kernel
def scale(e, x, out, factor, vectors, stride):
    """out = x · factor, where the vectors of x are `stride` bytes apart."""
    factors = factor.splat(e.F32)
    with e.loop(vectors) as i:
        out.at(i * (4 * LANES)).store(x.at(i * stride).load(e.F32) * factors)


@micro_kernel
def cap(e, scores, tiles, cap):
    """scores = cap · tanh(scores / cap), all in units of log 2; tanh(y) = ±(1 - t) / (1 + t) with t = exp(-2 |y|)."""
    one, zero = e.constant(1.0, e.F32), e.constant(0.0, e.F32)
    caps = cap.splat(e.F32)
    with e.loop(tiles) as tile:
        there = scores.at(tile * (4 * LANES))
        ratio = there.load(e.F32) / caps
        t = e.exp2(e.absolute(ratio) * (-2 * LOG2E))
        tanh = (one - t) / (one + t)
        there.store(ratio.compare("<", zero).where(zero - tanh, tanh) * caps)


@micro_kernel
def slope(e, scores, tiles, slope, distance):
    """scores -= slope · |distance + i| for score i."""
    slopes, lanes = slope.splat(e.F32), e.constant([float(lane) for lane in range(LANES)], e.F32)
    with e.loop(tiles) as tile:
        there = scores.at(tile * (4 * LANES))
        away = lanes + (distance + tile * LANES).to(e.I32).to(e.F32S).splat(e.F32)
        there.store(there.load(e.F32) - slopes * e.absolute(away))
