"""What the attention kernels share: which rows a block works on, and which keys these see."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, uint32

from qattn.cuda import ptx
from qattn.cuda.kernel import device
from qattn.cuda.warps import ALL_LANES

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
HIDDEN = -1e30  # below every score; finite, so that a row without any visible key gives 0, not NaN
EMPTY = -3e38  # the logarithm of the sum of a part that saw no key; fast math knows no infinity
MASK_FIELDS = 4  # integers that a mask can have
SPLIT_BLOCK = 64  # keys: capacities are multiples of it, and so are the ranges that keys are split into


@functools.cache
def bounds_of(mask: Any) -> Callable[..., Any]:
    """A device function (fields, query, keys) → (first, end), int32, within 0 … keys, for a mask's class."""
    names = [f"f{i}" for i in range(MASK_FIELDS)]
    fields = len(mask._fields)
    if fields > MASK_FIELDS:
        raise TypeError(f"{mask.__name__} has {fields} fields; a mask has at most {MASK_FIELDS} on a GPU")
    scope = {"mask": mask, "bounds": device(mask.bounds), "int32": int32}
    text = f"""def bounds_within({", ".join(names)}, query, keys):
        first, end = bounds(mask({", ".join(names[:fields])}), query, keys)
        return int32(max(first, 0)), int32(min(end, keys))"""
    exec(text, scope)  # Numba builds the named tuple only from arguments that are counted in the source
    return device(scope["bounds_within"])  # type: ignore[no-any-return]


@functools.cache
def mask_key(mask: Any) -> str:
    """A name for the kernels of a mask.  One that is not ours may change: its name tells its module's text, too."""
    name = re.sub(r"\W+", "_", f"{mask.__module__}.{mask.__qualname__}")
    if mask.__module__.startswith("qattn."):
        return name.rsplit("_", 1)[-1]
    try:
        source = inspect.getsource(sys.modules[mask.__module__])
    except (OSError, TypeError):
        source = ""
    function = mask.bounds
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    told = repr((source, function.__code__.co_code, function.__code__.co_consts, cells))
    return f"{name}_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def mask_fields(mask: Any) -> list[int]:
    """The fields of a mask as kernel arguments."""
    return [*map(int, mask), *[0] * (MASK_FIELDS - len(mask))]


@device
def find_tile(row_offsets, sequences, tile, group, rows, least, most):  # type: ignore[no-untyped-def]
    """(sequence, tile in it): number `tile` of the tiles of `rows` rows of all sequences; (-1, 0) if there are fewer.

    A sequence has a row for each of its new tokens and each of `group` query heads; sequences with other than
    least … most new tokens have none.  All lanes of a warp look together, at 32 sequences at a time.
    """
    lane = int32(cuda.threadIdx.x & 31)
    found, within, passed, start = int32(-1), int32(0), int32(0), int32(0)
    while start < sequences and found < 0:
        s = int32(start + lane)
        count = int32(0)
        if s < sequences:
            new = int32(row_offsets[s + 1] - row_offsets[s])
            if new >= least and new <= most:
                count = int32(uint32(new * group + rows - 1) // uint32(rows))
        total = count
        for step in (1, 2, 4, 8, 16):
            other = int32(cuda.shfl_up_sync(ALL_LANES, total, step))
            if lane >= step:
                total = int32(total + other)
        hit = cuda.ballot_sync(ALL_LANES, passed + total > tile)
        if hit != 0:
            first = int32(cuda.ffs(hit) - 1)
            found = int32(start + first)
            within = int32(tile - passed - cuda.shfl_sync(ALL_LANES, int32(total - count), first))
        passed = int32(passed + cuda.shfl_sync(ALL_LANES, total, 31))
        start = int32(start + 32)
    return found, within


@device
def part_of(low, high, part, parts):  # type: ignore[no-untyped-def]
    """(first, end) of one part of the keys low … high - 1, which are cut into at most `parts` at multiples of 64."""
    low = int32(low & ~(SPLIT_BLOCK - 1))
    each = int32(uint32(max(high - low, 0) + parts - 1) // uint32(parts))
    each = int32((max(each, 1) + SPLIT_BLOCK - 1) & ~(SPLIT_BLOCK - 1))
    first = int32(low + part * each)
    return first, int32(min(high, first + each))


@device
def row_min(value):  # type: ignore[no-untyped-def]
    """The least over the rows of an mma fragment, which lie in lanes 4 r + c, for each lane."""
    for step in (4, 8, 16):
        value = int32(min(value, int32(cuda.shfl_xor_sync(ALL_LANES, value, step))))
    return value


@device
def row_max(value):  # type: ignore[no-untyped-def]
    """The largest, likewise."""
    for step in (4, 8, 16):
        value = int32(max(value, int32(cuda.shfl_xor_sync(ALL_LANES, value, step))))
    return value


@device
def quad_max(value):  # type: ignore[no-untyped-def]
    """The largest over the four lanes that hold a row of an mma fragment, for each of them."""
    for step in (1, 2):
        value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, step))
    return value


@device
def quad_sum(value):  # type: ignore[no-untyped-def]
    """Their sum, likewise."""
    for step in (1, 2):
        value = float32(value + cuda.shfl_xor_sync(ALL_LANES, value, step))
    return value


@device
def natural_lse(peak, total):  # type: ignore[no-untyped-def]
    """The natural logarithm of Σ exp, from the largest score and the sum in units of log 2; -inf if nothing is seen."""
    bits = ptx.bits_of(float32((peak + ptx.log2(max(total, float32(1e-37)))) * float32(LN2)))
    return ptx.float_of(bits if total > float32(0) else 0xFF800000)


@device
def inverse(total):  # type: ignore[no-untyped-def]
    """1 / total, or 0 where nothing was seen."""
    return float32(1) / total if total > float32(0) else float32(0)


@device
def find_sequence(row_offsets, sequences, token):  # type: ignore[no-untyped-def]
    """The sequence of a token: how many later ones begin at or before it."""
    count, s = int32(0), int32((cuda.threadIdx.x & 31) + 1)
    while s < sequences:
        count = int32(count + (1 if row_offsets[s] <= token else 0))
        s = int32(s + 32)
    for step in (16, 8, 4, 2, 1):
        count = int32(count + cuda.shfl_xor_sync(ALL_LANES, count, step))
    return count


@device
def row_at(token, flat, group, heads, first_head):  # type: ignore[no-untyped-def]
    """The row of q (tokens · heads, …) that row `flat` of a sequence and KV head is: its tokens begin at `token`."""
    new = int32(uint32(flat) // uint32(group))
    return (token + new) * heads + int32(first_head + flat - new * group)


@device
def leave_empty(token, group, heads, first_head, first_row, last_row, part, parts, partial_lse):  # type: ignore[no-untyped-def]
    """Note that this part of a tile of 16 rows saw nothing."""
    flat = int32(first_row + cuda.threadIdx.x)
    if cuda.threadIdx.x < 16 and flat <= last_row:
        partial_lse[row_at(token, flat, group, heads, first_head) * parts + part] = float32(EMPTY)
