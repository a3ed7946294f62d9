"""Softmax attention over a KV cache in the memory of a GPU.

In NumPy, for one query row q (head_dim,) that sees keys k (n, head_dim) and values v (n, value_dim)::

    score = k @ q * scale
    weight = exp(score - score.max())
    out = weight @ v / weight.sum()
    lse = log(weight.sum()) + score.max()

and before the softmax, what `qattn.logits` says.  No kernel ever holds all scores of a row.  It walks the keys in steps
and keeps a running maximum, a running sum, and a sum of weighted values, and shrinks the last two when the maximum
grows (online softmax; Milakov and Gimelshein, 2018).  Scores are kept in units of log 2, since exp2 is an instruction
and exp is not: log2(e) is a part of the scale.

*Rows.*  All query heads of a KV head (a group) see the same keys.  So the rows of a KV head are its new tokens times
the heads of its group, and a tile of rows reads K and V once for all of them.  Each row has its own bounds, a first
key and an end, from the mask.  Steps that no row sees are skipped; where a step is partly seen, the hidden scores
weigh 0.  Stale numbers behind a sequence's end are read and weigh 0, too: they only have to be finite.

*Options.*  What may become of scores, masks that hide single keys, and pages are no branches: each combination has
kernels of its own, see `qattn.cuda.attend_variant`.  A sink is where a row's maximum and sum start, in the first part
of its keys alone.  A step's keys lie in one page, since pages come in 64s of tokens.

*Three kernels*, between which `path` and `Plan` choose:

`attend_decode`
    Few new tokens: reading K and V takes all the time.  A tile has 16 rows, mostly the heads of a group, and its keys
    are cut into parts, for otherwise a GPU would be mostly idle: a block each.  A part's result is normalized, and
    `merge` weighs the parts by their log-sum-exp (eq. 4 there), in order, so that the bits are the same each time.
`attend_prefill`
    Many new tokens, or groups of many heads: arithmetic takes the time.  A tile has 128 rows, or 64, K and V come to
    shared memory while the step before is worked on, and products run on tensor cores (flash attention; Dao, 2023).
    Where there are too few tiles for a GPU, their keys are cut into parts, too.
`attend_exact`
    Everything in float32, for float32 caches, heads that the others don't take, and where float32 is asked for.

A step of one token for each sequence has a fourth, `attend_fused`, which is `attend_decode` that rotates and stores the
token as well, in a cache of 16 bits, for groups of up to 32 heads.  All but the exact one round queries to bfloat16 for
keys in bfloat16 and to float16 for others, weights likewise for values, and sum in float32: with float16, a scaled
query must stay below 65504.  Codes become float16 on the way (`qattn.cuda.attend_codes`).  They take keys of up to 640
elements, values of any size.

The host never reads what is on the device.  How many new tokens and keys a sequence has, only the kernels know; grids
and the number of parts come from shapes and the cache's capacity.  A block finds its sequence in `row_offsets`, and
blocks for which nothing is left end at once.  So all launches can be captured in a CUDA graph and replayed while the
sequences grow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint32

from qattn.batch import Batch
from qattn.cuda import attend_decode, attend_exact, attend_fused, attend_prefill, ptx
from qattn.cuda.attend_stage import MOST_ROWS
from qattn.cuda.attend_tiles import RESULTS, SPLIT_BLOCK, Heads, Results, find_sequence, inverse, natural_lse
from qattn.cuda.attend_variant import EMPTY, LOG2E, Given, Memory, Storage, Variant
from qattn.cuda.heads import NO_STEPS, Steps
from qattn.cuda.kernel import kernel
from qattn.cuda.warps import warp_max, warp_sum
from qattn.logits import Logits

FEW = 4  # new tokens of each sequence, on average, up to which reading K and V is what takes the time
WIDE = 2 * attend_decode.ROWS  # heads of a group beyond which one token has rows enough for `attend_prefill`
MAX_PARTS = 128  # of a tile's keys: a thread each in `merge`
_WARPS = MAX_PARTS // 32
_BLOCKS = 1024  # that keep the largest GPU busy: 132 multiprocessors, two to four blocks each, two rounds or more
_PREFILL_BLOCKS = 264  # likewise, of 128 rows: they have long ways to go, and leave large results, so one round will do
Array = Any


class CacheView(NamedTuple):
    """A cache, as kernels see it: C-contiguous arrays on the device, keys rotated.

    Token p of sequence s lies in page ``pages[s, p // page_tokens]``, at ``p % page_tokens``.
    """

    keys: Array
    """(pages, kv_heads, page_tokens, stride), float32 or float16, or bfloat16 as uint16, float8 and codes as uint8;
    `qattn.cache_types.stride` says how long rows are.  page_tokens is a multiple of 64."""
    values: Array
    """Likewise."""
    head_dim: int
    value_dim: int
    pages: Array
    """(sequences, pages of each) int64; a cache without pages has one for each sequence."""

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return int(self.pages.shape[1] * self.keys.shape[2])


class Plan(NamedTuple):
    """What is launched for a batch, from shapes alone."""

    few: int
    """Sequences with at most so many new tokens go the decode way; 0: none does."""
    tiles: int
    """Decode tiles of a KV head: at least as many as there are."""
    parts: int
    """Into how many parts their keys are cut at most."""
    prefill: int
    """Into how many parts the keys of others are cut at most; 0: there are no sequences with more new tokens."""
    room: tuple[int, int]
    """Results of parts that there are at most, of either way."""

    @classmethod
    def of(cls, tokens: int, sequences: int, heads: int, kv_heads: int, capacity: int, exact: bool = False) -> Plan:
        """`exact` kernels cut only what goes the decode way."""
        group, busy, rows = heads // kv_heads, min(sequences, tokens), attend_decode.ROWS
        if group > WIDE and not exact:
            few, most = 0, 0
        elif tokens <= FEW * sequences:
            few, most = tokens, tokens
        else:
            few, most = (0, 0) if sequences == 1 else (1, busy)
        tiles = min(most * -(-group // rows), (most * group + (rows - 1) * sequences) // rows)
        others = (tokens * group + (MOST_ROWS - 1) * busy) // MOST_ROWS

        def parts(blocks: int, tiles: int) -> int:
            return max(1, min(blocks // max(tiles * kv_heads, 1), capacity // SPLIT_BLOCK, MAX_PARTS))

        mine, theirs = parts(_BLOCKS, tiles) if few else 1, parts(_PREFILL_BLOCKS, others)
        theirs = 0 if few == tokens else 1 if exact else theirs
        # One token each of some sequences, beside prompts of others, needs no room for those prompts' tokens.
        room = ((sequences if few == 1 else tokens) * heads * mine, tokens * heads * theirs)
        return cls(few, tiles, mine, theirs, (room[0] if mine > 1 else 0, room[1] if theirs > 1 else 0))


class Partial(NamedTuple):
    """Results of the parts that a row's keys are cut into, normalized each; rows are tokens · heads."""

    out: Array
    """(n, value_dim) float32: (rows, parts) of the decode way, and behind them those of the other.  If the first has
    one token for each sequence at most, its rows are sequences · heads."""
    lse: Array
    """(n,) float32, in units of log 2."""

    @classmethod
    def room(cls, tokens: int, sequences: int, heads: int, cache: CacheView) -> Partial:
        """Arrays for batches of that shape over a cache."""
        import cupy

        shape = tokens, sequences, heads, cache.keys.shape[1], cache.capacity
        count = max(sum(Plan.of(*shape, exact).room) for exact in (False, True))
        return cls(cupy.empty((count, cache.value_dim), "f4"), cupy.empty(count, "f4"))

    def behind(self, count: int) -> Partial:
        """What is left behind the first `count`."""
        return Partial(self.out[count:], self.lse[count:])


def path(storage: Storage, head_dim: int, value_dim: int) -> str:
    """Which kernels a cache and its heads get: "tensor" or "exact"."""
    fits = attend_decode.Sizes(head_dim, value_dim).fits and attend_prefill.Sizes(Heads(head_dim, value_dim)).fits
    return "tensor" if fits and not storage.exact and "f32" not in storage else "exact"


def fuses(storage: Storage, group: int, head_dim: int, value_dim: int) -> bool:
    """Whether `rotate_and_attend` takes a cache and its heads, `group` query heads for each."""
    sizes, plain = attend_decode.Sizes(head_dim, value_dim), {storage.keys, storage.values} <= {"f16", "bf16"}
    fits = sizes.slices == 1 and sizes.warps > 1 and group <= WIDE
    return plain and fits and path(storage, head_dim, value_dim) == "tensor"


def attend(
    storage: Storage, q: Array, cache: CacheView, row_offsets: Array, lengths: Array, mask: Any, logits: Logits,
    out: Array, lse: Array, partial: Partial,
) -> None:  # fmt: skip
    """The attention of the last tokens of each sequence.

    q : (tokens, heads, head_dim) float32, rotated
    row_offsets : (sequences + 1,) int64, the batch's tokens of each sequence: those of the cache, in order
    lengths : (sequences,) int64, their keys, the new ones included
    out : (tokens, heads, value_dim) float32;  lse : (tokens, heads) float32, natural logarithms; both overwritten
    partial : `Partial` with room for the batch's shape, overwritten

    Cost: decoding, K and V of a sequence once for 16 rows, else once for 128, 64 or 32; K once for each 256 elements of
    V.  The bits of a token depend on the batch's shape and on the capacity, through the kernel and the number of parts,
    but not on what else is in the batch.
    """
    tokens, heads, head_dim = q.shape
    sequences, value_dim, kv_heads = row_offsets.shape[0] - 1, out.shape[2], cache.keys.shape[1]
    exact = path(storage, head_dim, value_dim) == "exact"
    plan = Plan.of(tokens, sequences, heads, kv_heads, cache.capacity, exact)
    group, variant, given = heads // kv_heads, Variant.of(mask, logits, cache.pages), Given.of(mask, logits)
    results = Results(out, lse, *partial)
    arrays = (q, Memory.of(cache), row_offsets, lengths, logits.scale * LOG2E)
    if exact:
        sizes = attend_exact.Sizes(head_dim, value_dim)
        rows = attend_exact.ROWS * sizes.warps
        tiles = min(tokens * -(-group // rows), (tokens * group + (rows - 1) * sequences) // rows)
        attend_exact.exact_kernel(storage, variant)(
            *arrays, results, sequences, heads, head_dim, value_dim, plan.few, plan.parts, given,
            grid=(tiles * kv_heads, plan.parts), **sizes.launch(),
        )  # fmt: skip
    elif plan.few:
        decode = attend_decode.Sizes(head_dim, value_dim)
        attend_decode.decode_kernel(storage, variant, head_dim, value_dim)(
            *arrays, results, sequences, heads, plan.few, plan.parts, given,
            grid=(plan.tiles * kv_heads * decode.slices, plan.parts), **decode.launch(),
        )  # fmt: skip
    if plan.parts > 1:
        _merge_parts(results, row_offsets, 1, plan.few, plan.parts, by_sequence=plan.few == 1)
    if plan.prefill and not exact:
        prefill = attend_prefill.Sizes.of(variant, head_dim, value_dim)
        tiles = (tokens * group + (prefill.rows - 1) * min(sequences, tokens)) // prefill.rows
        results = Results(out, lse, *partial.behind(plan.room[0]))
        attend_prefill.prefill_kernel(storage, variant, head_dim, value_dim)(
            *arrays, results, sequences, heads, plan.few, plan.prefill, given,
            grid=(tiles * kv_heads * prefill.heads.slices, plan.prefill), **prefill.launch(),
        )  # fmt: skip
        if plan.prefill > 1:
            _merge_parts(results, row_offsets, plan.few + 1, tokens, plan.prefill)


def rotate_and_attend(
    storage: Storage, qkv: Array, cos: Array, sin: Array, batch: Batch, neox: bool, cache: CacheView, lengths: Array,
    mask: Any, logits: Logits, out: Array, lse: Array, partial: Partial, steps: Steps = NO_STEPS,
) -> None:  # fmt: skip
    """A decode step, from projected rows: preparation of heads, rotation, write to the cache and attention.

    It has the bits of two steps, one after the other.

    For what `fuses` says.  Arguments as in `qattn.cuda.rope.rotate_and_store` and in `attend`, and

    batch : `Batch` with one new token for each sequence, token t in slots[t], no slot twice
    lengths : by slot, the new tokens not yet counted in; updated

    Cost: a launch that reads K and V once, and a small one that merges parts.
    """
    tokens, heads, value_dim = out.shape
    kv_heads, head_dim = cache.keys.shape[1], cache.head_dim
    plan = Plan.of(tokens, tokens, heads, kv_heads, cache.capacity)
    results = Results(out, lse, *partial)
    variant, sizes = Variant.of(mask, logits, cache.pages), attend_decode.Sizes(head_dim, value_dim)
    attend_fused.fused_kernel(storage, variant, head_dim, value_dim, steps.flags != 0)(
        qkv, qkv.shape[1], steps, cos, sin, cos.shape[1], int(neox), batch, Memory.of(cache), lengths,
        logits.scale * LOG2E, results, heads, plan.parts, Given.of(mask, logits),
        grid=(plan.tiles * kv_heads, plan.parts), **sizes.launch(),
    )  # fmt: skip
    if plan.parts > 1:
        _merge_parts(results, batch.row_offsets, 1, tokens, plan.parts)


def _merge_parts(
    results: Results, row_offsets: Array, least: int, most: int, parts: int, *, by_sequence: bool = False
) -> None:
    tokens, heads, value_dim = results.out.shape
    merge(
        results, row_offsets, row_offsets.shape[0] - 1, tokens, heads, value_dim, least, most, parts, int(by_sequence),
        grid=tokens * heads, block=MAX_PARTS,
    )  # fmt: skip


@kernel("results i64* i32 i32 i32 i32 i32 i32 i32 i32", results=RESULTS)
def merge(results, row_offsets, sequences, tokens, heads, value_dim, least, most, parts, by_sequence):
    """Combine the parts of a row, in the order of their keys: a block for each row, a thread for each part.

    Rows of sequences with other than least … most new tokens are left alone.
    by_sequence : parts are those of sequences · heads
    """
    row, i, warp = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x), uint32(cuda.threadIdx.x >> 5)
    place = row
    if least > 1 or most < tokens or by_sequence:
        token = int32(uint32(row) // uint32(heads))
        sequence = find_sequence(row_offsets, sequences, token)
        new = int32(row_offsets[sequence + 1] - row_offsets[sequence])
        if new < least or new > most:
            return
        if by_sequence:
            place = int32(row + (sequence - token) * heads)
    peaks, sums = cuda.shared.array(_WARPS, float32), cuda.shared.array(_WARPS, float32)
    weights = cuda.shared.array(MAX_PARTS, float32)
    mine = float32(EMPTY)
    if i < parts:
        mine = results.parts_lse[int64(place) * parts + i]
    largest, lane = warp_max(mine), int32(i & 31)
    if lane == 0:
        peaks[warp] = largest
    cuda.syncthreads()
    for w in range(_WARPS):
        largest = max(largest, peaks[w])
    weight = float32(0)
    if ptx.bits_of(mine) != ptx.bits_of(float32(EMPTY)):  # NaN counts
        weight = ptx.exp2(float32(mine - largest))
    weights[uint32(i)] = weight
    whole = warp_sum(weight)
    if lane == 0:
        sums[warp] = whole
    cuda.syncthreads()
    whole = float32(0)
    for w in range(_WARPS):
        whole = float32(whole + sums[w])
    each, d = inverse(whole), i
    while d < value_dim:
        total, part = float32(0), int32(0)
        at = int64(place) * parts * value_dim + d
        while part < parts:
            weight = weights[uint32(part)]
            if ptx.bits_of(weight) != 0:  # the others' parts were not written
                total = float32(total + weight * results.parts_out[at])
            at += value_dim
            part = int32(part + 1)
        results.out[int64(row) * value_dim + d] = float32(total * each)
        d = int32(d + MAX_PARTS)
    if i == 0:
        results.lse[row] = natural_lse(largest, whole)
