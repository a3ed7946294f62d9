"""Activations times weights by cuBLAS, both in bfloat16.

The kernels of `qattn.cuda.matmul` make factors of packed weights once for every 64 tokens.  Here it is done once for
all, at the price of values that are written to memory and read again, 2 bytes each.  From some number of tokens on that
may be faster: where int8 tensor cores are not much faster than those for bfloat16, or where cuBLAS has instructions
that kernels for compute capability 8.0 don't.  `qattn.cuda.tuning` finds out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from qattn.layout import Layout

Array = Any  # of CuPy

FEWEST = 256  # tokens: for less, a GPU's memory takes longer over the values than its tensor cores over their products
LARGEST = 1 << 28  # weights: their values have to fit beside everything else


@functools.cache
def available() -> bool:
    """Whether there is a cuBLAS that CuPy can load."""
    try:
        import cupy_backends.cuda.libs.cublas  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def fits(tokens: int, shape: tuple[int, int], layouts: Iterable[Layout]) -> bool:
    """Whether a product may be worth trying here: weights that are floats stay as exact as they are."""
    quantized = all(layout.bits < 16 for layout in layouts)
    return tokens >= FEWEST and math.prod(shape) <= LARGEST and quantized and available()


def multiply(x: Array, weights: Array, out: Array) -> None:
    """out = x @ weights.T, summed up in float32.

    x : (tokens, columns) and weights : (rows, columns) uint16 (bfloat16);  out : (tokens, rows) float32; C-contiguous
    """
    import cupy
    from cupy_backends.cuda.libs import cublas

    tokens, (rows, columns) = len(x), weights.shape
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    bfloat16, float32 = cupy.cuda.runtime.CUDA_R_16BF, cupy.cuda.runtime.CUDA_R_32F
    # BLAS has matrices column by column, as which all three are transposed: out.T = weights @ x.T
    cublas.gemmEx(
        cupy.cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, rows, tokens, columns,
        one.ctypes.data, weights.data.ptr, bfloat16, columns, x.data.ptr, bfloat16, columns,
        zero.ctypes.data, out.data.ptr, float32, rows, cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
