"""What happens to projected heads before they turn, as one value for kernels that do it on the way."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preparation(NamedTuple):
    """For the heads of a projected row x, in this order::

        x = clamp(x * factor + bias, -limit, limit)
        x = x / sqrt(mean(x²) + epsilon)             # where `norms` has "rms" for its part of the row
        x = (x - mean(x)) / sqrt(var(x) + epsilon)   # where it has "layer"
        x = x * weight + shift                       # where it has either

    Arrays are (columns of q, k and v,) float32, on the device that computes; None where there is none.
    """

    factor: Any = None
    bias: Any = None
    limit: Any = None
    weight: Any = None
    shift: Any = None
    norms: tuple[tuple[str, float] | None, ...] = (None, None, None)
    """Kind and epsilon for the heads of q, of k and of v."""
    after_rope: bool = False
    """Heads turn before they are normalized."""
