"""What the 32 threads of a warp, or all warps of a block, do together."""

from __future__ import annotations

from numba import cuda, float32, int32, uint32

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


@device
def sum_of_block(value, partial):
    """The sum of all threads' values, for all of them; `partial` has room for 32 warps."""
    lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
    value = warp_sum(value)
    if lane == 0:
        partial[uint32(warp)] = value
    cuda.syncthreads()
    return warp_sum(partial[uint32(lane)] if lane < cuda.blockDim.x >> 5 else float32(0))
