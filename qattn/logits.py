"""What happens to scores between the product of queries and keys and the softmax: one value for all kernels."""

from __future__ import annotations

from typing import Any, NamedTuple


class Logits(NamedTuple):
    """For the score s of query head h at index q and key at index k, in this order::

        s = q · k * scale
        s = cap * tanh(s / cap)                      # if there is a cap
        s = s - slopes[h] * |q - k|                  # ALiBi
        s = s + distances[h, k - q + span]           # T5, with k - q clamped to ±span
        s = s + bias[token, h, k]                    # an additive mask; -inf hides a key

    and the sum of exponentials gains ``exp(sinks[h])``, of a key that no value belongs to.
    Arrays are float32, C-contiguous and on the device that computes; None where there is none.
    """

    scale: float
    cap: float = 0.0
    """The soft cap of scores (Gemma 2); 0: none."""
    slopes: Any = None
    """(heads,): attention with linear biases (Press et al., 2022)."""
    sinks: Any = None
    """(heads,): attention sinks (gpt-oss)."""
    bias: Any = None
    """(tokens of the batch, heads or 1, keys): a row for each token of the batch, and a column for each index in its
    sequence, from 0 on."""
    distances: Any = None
    """(heads, 2 · span + 1): relative position biases (T5)."""
