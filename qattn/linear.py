"""A linear layer over packed weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from qattn import _check, devices, ops
from qattn._backend import as_host
from qattn._changes import Watched
from qattn.array import QuantArray
from qattn.packing import PackedMatrix

Array = np.ndarray[Any, Any]


class Linear(Watched):
    """y = x @ weights.T + bias.

    Parameters
    ----------
    weights : (rows, columns) QuantArray, PackedMatrix or floats
    bias : (rows,) floats, optional
    precision : "fast", "int8" or "exact"
        See `qattn.matmul`.
    """

    def __init__(
        self, weights: QuantArray | PackedMatrix | Array, bias: Any = None, *, precision: ops.Precision = "fast"
    ) -> None:
        _check.choice("precision", precision, ops.PRECISIONS)
        self.weights = weights if isinstance(weights, PackedMatrix) else PackedMatrix(weights)
        self.precision = precision
        self.bias: Array | None = None
        if bias is not None:
            bias = np.array(as_host(bias, "bias"), np.float32)
            _check.shape("bias", bias, self.shape[:1])
            self.bias = devices.asarray(bias, self.weights.device)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): outputs and inputs."""
        return self.weights.shape

    def __call__(self, x: Any, *, out: Array | None = None) -> Array:
        """x (..., columns) → (..., rows) float32."""
        return ops.affine(x, self.weights, self.bias, out=out, precision=self.precision)

    def __repr__(self) -> str:
        bias = ", bias" if self.bias is not None else ""
        return f"Linear({self.shape[1]} → {self.shape[0]}, {self.weights.format}{bias}, precision={self.precision!r})"
