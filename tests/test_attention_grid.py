"""The grid of sizes and features that llama.cpp's own tests of its attention operator go through, against float64.

The whole grid has a hundred thousand points.  Each size is met, with all else drawn from a fixed seed, over float
caches; with ``QATTN_GRID_POINTS=1000`` in the environment as many points are drawn from all of the grid, quantized
caches included.
"""

import os

import numpy as np
import pytest

import qattn
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

SIZES = [40, 64, 72, 80, 96, 128, 192, 256, 320, 512, 576, (576, 512), (192, 128), (96, 64), (65, 67)]
KEYS, BATCHES, GROUPS = [113, 512, 1024, 16384], [1, 3, 32, 75], [1, 4, 8, 16, 32]
FLOATS, OTHERS = ["float32", "float16"], ["bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
FEATURES = ("causal", "sinks", "alibi", "softcap", "mask")
POINTS = int(os.environ.get("QATTN_GRID_POINTS", 0))


def points():
    rng = np.random.default_rng(0)
    chosen = [(size, keys) for size in SIZES for keys in KEYS]
    if POINTS:
        chosen = [(SIZES[rng.integers(len(SIZES))], int(rng.choice(KEYS))) for _ in range(POINTS)]
    for size, keys in chosen:
        tokens, group = (int(rng.choice(options)) for options in (BATCHES, GROUPS))
        kinds = rng.choice(FLOATS + OTHERS, 2).tolist() if POINTS else rng.choice(FLOATS, 1).tolist()
        features = {name: bool(rng.integers(2)) for name in FEATURES}
        yield pytest.param(size, keys, tokens if POINTS or keys < 9999 else 1, group, "/".join(kinds), features)


@pytest.mark.parametrize(("size", "keys", "tokens", "group", "dtype", "features"), list(points()))
def test_a_point_of_the_grid(size, keys, tokens, group, dtype, features):
    head_dim, value_dim = size if isinstance(size, tuple) else (size, size)
    kv_heads = 2 if group < 16 and keys < 9999 else 1
    heads = kv_heads * group
    cache = qattn.KVCache(qattn.KVCacheParams(kv_heads, head_dim, value_dim, dtype=dtype))
    cache.append(normal((keys, kv_heads, head_dim), 1), normal((keys, kv_heads, value_dim), 2))
    q, (k, v) = normal((tokens, heads, head_dim)), cache.read()
    sinks = normal(heads, 3) if features["sinks"] else None
    slopes = qattn.alibi_slopes(heads) if features["alibi"] else None
    bias = np.where(normal((tokens, keys), 4) < 1, normal((tokens, keys), 5), -np.inf) if features["mask"] else None
    cap, causal = 10.0 * features["softcap"], features["causal"]
    options = {"mask": "causal" if causal else "null", "softcap": cap, "alibi": slopes, "sinks": sinks, "bias": bias}
    seen = reference.causal(tokens, keys) if causal else np.ones((tokens, keys), bool)
    added = 0.0 if bias is None else bias
    want, _ = reference.attention(q, k, v, head_dim**-0.5, seen, cap=cap, slopes=slopes, sinks=sinks, bias=added)
    assert nmse(qattn.attention(q, cache, **options), want) < 1e-10
    if POINTS:  # as fast as the types allow: within llama.cpp's own bar
        assert nmse(qattn.attention(q, cache, precision="int8", **options), want) < 5e-4
