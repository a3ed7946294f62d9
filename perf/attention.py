"""Attention alone, `qattn.backends.cpu.attend` over a KV cache: prefill of 512 tokens, and decode behind long contexts.

Operations are those of the two products, over the pairs that a causal mask leaves: 4 · head_dim for each pair and head.
What binds is either those (in bfloat16 for that cache, in bytes for codes, else in float32) or reading K and V once;
the share is that of whichever takes longer on this machine (see roofline.py).  Calls go over copies of the cache that
together exceed the processor's caches; types of the cache are timed in turn, since memory is faster in some minutes
than in others.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import numpy as np
import roofline
from cases import Shape, gaussian, random_cache

import qattn
from qattn import masks
from qattn.backends import cpu
from qattn.logits import Logits

CASES = {
    "prefill 512 @ 0": (512, 0),
    "prefill 512 @ 4096": (512, 4096),
    "decode @ 4096": (1, 4096),
    "decode @ 16384": (1, 16384),
}  # tokens, and the depth behind which they come


def measure(case: str, shape: Shape, args) -> Iterator[harness.Row]:
    """A row for each type of the cache, which are timed in turn."""
    tokens, depth = CASES[case]
    q, offsets, mask = gaussian(tokens, shape.heads, shape.head_dim), np.array([0, tokens]), masks.get("causal")

    def attend(cache: qattn.KVCache) -> None:
        cpu.attend(q, cache, offsets, mask, Logits(shape.head_dim**-0.5), exact=args.exact)

    params = {dtype: qattn.KVCacheParams(shape.kv_heads, shape.head_dim, dtype=dtype) for dtype in args.dtypes}
    kv_bytes = {dtype: each.bytes_per_token * (depth + tokens) for dtype, each in params.items()}
    calls = {}
    for dtype, each in params.items():
        caches = [random_cache(each, depth + tokens) for _ in range(harness.copies(kv_bytes[dtype]))]
        calls[dtype] = harness.in_turn(caches, attend)
    operations = shape.attention_ops(tokens, depth)
    for dtype, time in harness.compare(calls, args.rounds).items():
        of_codes = params[dtype].key_type.in_blocks
        kind = "f32" if args.exact else "dot4" if of_codes else "bf16" if dtype == "bfloat16" else "f32"
        floor, bound = roofline.limits(args.threads).floor(read=kv_bytes[dtype], **{kind: operations})
        yield {
            "case": case,
            "cache": dtype,
            "head": shape.head_dim,
            "ms": 1e3 * time.median,
            "± %": 100 * time.spread,
            "GFLOP/s": operations / time.median / 1e9,
            "KV GB/s": kv_bytes[dtype] / time.median / 1e9,
            "bound": bound,
            "share %": 100 * floor / time.median,
        }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128], help="of 64, 80, 96, 128, 256, …")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "q8_0", "q4_0"], help="of the cache")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--exact", action="store_true", help="multiply a bfloat16 cache in float32")
    args = harness.start(parser)
    shapes = [Shape(args.heads * dim, args.heads, args.kv_heads, dim) for dim in args.head_dims]
    rows = [row for shape in shapes for case in args.cases for row in measure(case, shape, args)]
    harness.report(args, rows, x="case", y="share %", by="head" if len(shapes) > 1 else "cache")


if __name__ == "__main__":
    main()
