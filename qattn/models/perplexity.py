"""How well a model predicts a text."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from qattn import _check
from qattn._backend import as_host
from qattn.models.model import Model

_LOGITS = 2**25  # computed at once: 128 MiB


class Perplexity(NamedTuple):
    """What `perplexity` found."""

    value: float
    """exp of the mean negative log-likelihood of a token."""
    error: float
    """Standard error of `value`, as if tokens were independent."""
    tokens: int
    """How many were predicted."""
    seconds: float


def perplexity(model: Model, text: str, *, context: int = 2048) -> Perplexity:
    """Measure the perplexity of a text.

    The text is cut into pieces of at most `context` tokens, each of which the model sees without the others; every
    token but the first of a piece is predicted.

    Parameters
    ----------
    model : Model
        Its caches are emptied.
    text : str
    context : int
        At least 2; no more than the caches hold is used.

    Raises
    ------
    ValueError
        The text has less than two tokens, or the model gives NaN.
    """
    _check.at_least("context", context, 2)
    tokens = np.array(model.tokenizer.encode(text, eos=False), np.int64)
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; perplexity needs at least 2")
    context = min(context, model.decoder.max_length)
    rows = max(_LOGITS // model.decoder.config.vocabulary_size, 1)
    losses = []
    start = time.perf_counter()
    for first in range(0, len(tokens) - 1, context):
        piece = tokens[first : first + context]
        model.reset()
        for row in range(0, len(piece) - 1, rows):
            logits = as_host(model.forward(piece[row : min(row + rows, len(piece) - 1)]), "logits")
            losses.append(_losses(logits, piece[row + 1 : row + 1 + len(logits)]))
    seconds = time.perf_counter() - start
    loss = np.concatenate(losses)
    if np.isnan(loss).any():
        raise ValueError("the model gives NaN for this text; its weights may be damaged")
    value = float(np.exp(loss.mean()))
    error = value * float(loss.std(ddof=1)) / len(loss) ** 0.5 if len(loss) > 1 else float("inf")
    return Perplexity(value, error, len(loss), seconds)


def _losses(logits: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Negative log-likelihoods of the targets, (tokens,) float64."""
    peak = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - peak).sum(axis=1, dtype=np.float64)
    return np.log(total) - (logits[np.arange(len(targets)), targets] - peak[:, 0])
