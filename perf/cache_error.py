"""What each cache type costs in accuracy: the error of attention's output against a float32 cache.

The normalized mean squared error in exact arithmetic, for Gaussian queries, keys and values, and for those that a real
model makes of a text in its first, middle and last layer: SmolLM2-135M and Gemma 3 270M.  "turned" is with a Hadamard
matrix.  Takes half a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
from cases import gaussian

import qattn
from qattn import cache_types, masks
from qattn.models import Model
from qattn.models.fetch import SOURCES, fetch
from qattn.plot import Array

TEXT = Path(__file__).with_name("passage.txt")


def inputs(models: list[str], tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases by name: what `qattn.attention` takes, but for the cache."""
    q, k, v = (gaussian(tokens, heads, 128) for heads in (32, 8, 8))
    yield "Gaussian", {"q": q, "k": k, "v": v, "mask": masks.Causal(), "scale": 128**-0.5}
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    for name in models:
        model = Model.from_gguf(fetch(SOURCES[name]), precision="exact")
        ids = model.tokenizer.encode(text, eos=False)[:tokens]
        layers = model.decoder.layers
        chosen = [0, len(layers) // 2, len(layers) - 1]
        for n, captured in model.capture(ids, {"q", "k", "v"}, layers=chosen).items():
            config = layers[n].attention.config
            yield f"{name} {n}", {**captured, "mask": config.mask, "scale": config.scale}


def output(given: dict[str, Any], dtype: str, hadamard: bool) -> Array:
    """Attention over a cache of that type."""
    q, k, v = (given[name] for name in "qkv")
    cache = qattn.KVCache(qattn.KVCacheParams(*k.shape[1:], v.shape[2], dtype=dtype, hadamard=hadamard))
    cache.append(k, v)
    out: Array = qattn.attention(q, cache, mask=given["mask"], scale=given["scale"])
    return out.astype(np.float64)


def main() -> None:
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--models", nargs="*", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--tokens", type=int, default=256, help="of the text; %(default)s by default")
    args = harness.start(parser)
    cases = dict(inputs(args.models, args.tokens))
    wants = {name: output(given, "float32", hadamard=False) for name, given in cases.items()}
    rows: list[harness.Row] = []
    for type_ in cache_types.TYPES[1:]:
        for hadamard in (False, True) if type_.bits <= 8 else (False,):
            row: harness.Row = {"cache": type_.name, "turned": "yes" if hadamard else ""}
            for name, given in cases.items():
                error = output(given, type_.name, hadamard) - wants[name]
                row[name] = float(np.square(error).sum() / np.square(wants[name]).sum())
            rows.append(row)
    harness.report(args, rows, x="cache", y="Gaussian")


if __name__ == "__main__":
    main()
