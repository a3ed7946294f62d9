"""Choose the next token from logits: small functions over one vector, and a sampler that applies them in order.

Each function takes logits (vocabulary,) float and returns a new array in which the tokens that it rules out have
-inf.  The token of the largest logit always stays.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from qattn import _check
from qattn._backend import as_host

Array = np.ndarray[Any, Any]


def softmax(logits: Array) -> Array:
    """Return probabilities, float64."""
    weights = np.exp(logits - np.max(logits), dtype=np.float64)
    return weights / weights.sum()


def top_k(logits: Array, k: int) -> Array:
    """Keep the `k` largest; of equal ones, the tokens with lower numbers."""
    if k >= len(logits):
        return logits.copy()
    threshold = np.partition(logits, -k)[-k]
    keep = logits > threshold
    equal = np.flatnonzero(logits == threshold)
    keep[equal[: k - np.count_nonzero(keep)]] = True
    return np.where(keep, logits, -np.inf)


def top_p(logits: Array, p: float) -> Array:
    """Keep the most probable tokens until their probabilities add up to `p` (Holtzman et al., 2020)."""
    order = np.argsort(-logits, kind="stable")
    total = np.cumsum(softmax(logits[order]))
    kept = order[: 1 + np.searchsorted(total, p)]
    result = np.full_like(logits, -np.inf)
    result[kept] = logits[kept]
    return result


def min_p(logits: Array, p: float) -> Array:
    """Keep the tokens that are at least `p` times as probable as the most probable one (Nguyen et al., 2024)."""
    least = np.max(logits) + math.log(p) if p > 0 else -np.inf
    return np.where(logits >= least, logits, -np.inf)


class Sampler:
    """Chooses tokens: greedily at temperature 0, else at random among those that the filters leave.

    The filters look at the model's own probabilities, in the order `top_k`, `top_p`, `min_p`; the temperature applies
    to what they leave.

    Parameters
    ----------
    temperature : float
        Logits are divided by it; 0 takes the largest logit.
    top_k : int
        Keep so many tokens; 0 keeps all.
    top_p : float
        Keep the most probable tokens of this total probability; 1 keeps all.
    min_p : float
        Keep tokens at least this much as probable as the most probable; 0 keeps all.
    seed : int, optional
        The same seed and the same logits give the same tokens.

    Raises
    ------
    ValueError
        A parameter is out of its range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
        _check.at_least("top_k", top_k, 0)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; expected more than 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p is {min_p}; expected 0 to 1 (0 keeps all tokens)")
        if seed is not None and operator.index(seed) < 0:
            raise ValueError(f"seed is {seed}; expected at least 0")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Array) -> int:
        """Choose a token.

        Parameters
        ----------
        logits : (vocabulary,) floats

        Raises
        ------
        ValueError
            There are no logits, one is NaN or +inf, or all are -inf.
        """
        logits = as_host(logits, "logits")
        _check.shape("logits", logits, ("vocabulary",))
        if not logits.size:
            raise ValueError("logits are empty; there is no token to choose")
        best = int(np.argmax(logits))  # a NaN counts as the largest
        if not np.isfinite(logits[best]):
            raise ValueError(
                f"logits[{best}] is {logits[best]}, so no token can be chosen; the model's weights may be damaged"
            )
        if self.temperature == 0:
            return best
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = min_p(logits, self.min_p)
        tokens = np.flatnonzero(logits > -np.inf)
        total = np.cumsum(softmax(logits[tokens].astype(np.float64) / self.temperature))
        return int(tokens[np.searchsorted(total[:-1], self._random.random(), side="right")])
