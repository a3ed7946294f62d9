"""Activations times quantized weights, by format and number of tokens.

One token reads all weights for two operations each, so memory binds; many tokens are bound by dot products.  The share
is that of whichever of the two limits takes longer on this machine (see roofline.py).  Calls go over copies of the
matrix that together exceed the processor's caches, as in a model.  Packed bytes are what the kernel reads, file bytes
what the format takes.
"""

from __future__ import annotations

import harness
import roofline
from cases import BLOCK_FORMATS, gaussian, random_weights

import qattn

COMMON = ["Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"]


def measure(name: str, shape: tuple[int, int], tokens: int, exact: bool, args) -> harness.Row:  # type: ignore[no-untyped-def]
    limits = roofline.limits(args.threads)
    weights = random_weights(name, *shape)
    first = qattn.PackedMatrix(weights)
    matrices = [first, *(qattn.PackedMatrix(weights) for _ in range(harness.copies(first.nbytes) - 1))]
    x = gaussian(tokens, shape[1])
    precision = "exact" if exact else "fast"
    time = harness.measure(harness.in_turn(matrices, lambda w: qattn.matmul(x, w, precision=precision)), args.rounds)
    operations = 2 * tokens * shape[0] * shape[1]
    kind = "f32" if exact else roofline.kind_of_products(first.layouts[0], tokens, shape[1])
    floor, bound = limits.floor(read=first.nbytes, **{kind: operations})
    return {
        "format": name,
        "tokens": tokens,
        "ms": 1e3 * time.median,
        "± %": 100 * time.spread,
        "packed GB/s": first.nbytes / time.median / 1e9,
        "file GB/s": weights.nbytes / time.median / 1e9,
        "GFLOP/s": operations / time.median / 1e9,
        "bound": bound,
        "share %": 100 * floor / time.median,
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--formats", nargs="+", default=COMMON, help="names, or: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--shape", default="4096x14336", metavar="ROWSxCOLUMNS", help="%(default)s by default")
    parser.add_argument("--exact", action="store_true", help="activations in float32")
    args = harness.start(parser)
    rows, columns = map(int, args.shape.split("x"))
    names = BLOCK_FORMATS if args.formats == ["all"] else args.formats
    results = [measure(name, (rows, columns), tokens, args.exact, args) for name in names for tokens in args.tokens]
    harness.report(args, results, x="format", y="share %", by="tokens")


if __name__ == "__main__":
    main()
