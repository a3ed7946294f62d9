"""The grid of sizes and features that llama.cpp's own tests of its attention operator go through, against float64.

The whole grid has tens of thousands of points; each size is met, with features drawn from a fixed seed.
"""

import numpy as np
import pytest

import qattn
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

SIZES = [40, 64, 72, 80, 96, 128, 192, 256, 320, 512, 576, (576, 512), (192, 128), (96, 64), (65, 67)]
KEYS, BATCHES, GROUPS = [113, 512, 1024, 16384], [1, 3, 32, 75], [1, 4, 8, 16, 32]


def points():
    rng = np.random.default_rng(0)
    for size in SIZES:
        for keys in KEYS:
            tokens, group = (int(rng.choice(options)) for options in (BATCHES, GROUPS))
            features = {
                name: bool(rng.integers(2)) for name in ("causal", "float16", "sinks", "alibi", "softcap", "mask")
            }
            yield pytest.param(size, keys, tokens if keys < 9999 else 1, group, features)


@pytest.mark.parametrize(("size", "keys", "tokens", "group", "features"), list(points()))
def test_a_point_of_the_grid(size, keys, tokens, group, features):
    head_dim, value_dim = size if isinstance(size, tuple) else (size, size)
    kind = np.float16 if features["float16"] else np.float32
    kv_heads = 2 if group < 16 and keys < 9999 else 1
    q, k = normal((tokens, kv_heads * group, head_dim)), normal((keys, kv_heads, head_dim), 1).astype(kind)
    v = normal((keys, kv_heads, value_dim), 2).astype(kind)
    sinks = normal(kv_heads * group, 3) if features["sinks"] else None
    slopes = qattn.alibi_slopes(kv_heads * group) if features["alibi"] else None
    bias = np.where(normal((tokens, keys), 4) < 1, normal((tokens, keys), 5), -np.inf) if features["mask"] else None
    cap, causal = 10.0 * features["softcap"], features["causal"]
    out = qattn.attention(
        q, k, v, mask="causal" if causal else "null", softcap=cap, alibi=slopes, sinks=sinks, bias=bias
    )
    seen = reference.causal(tokens, keys) if causal else np.ones((tokens, keys), bool)
    added = 0.0 if bias is None else bias
    want, _ = reference.attention(q, k, v, head_dim**-0.5, seen, cap=cap, slopes=slopes, sinks=sinks, bias=added)
    assert nmse(out, want) < 1e-10
