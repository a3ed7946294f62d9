"""What the 32 threads of a warp do together."""

from __future__ import annotations

from numba import cuda, float32

from qattn.cuda.kernel import device

ALL_LANES = 0xFFFFFFFF


@device
def warp_sum(value):
    """The sum over the lanes of a warp, for each lane."""
    for step in (16, 8, 4, 2, 1):
        value = float32(value + cuda.shfl_xor_sync(ALL_LANES, value, step))
    return value


@device
def warp_max(value):
    """The largest over the lanes of a warp, for each lane."""
    for step in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, step))
    return value
