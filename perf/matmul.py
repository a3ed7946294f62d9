"""Activations times quantized weights, by format and number of tokens.

One token reads all weights for two operations each, so memory binds; many tokens are bound by dot products.  The share
is that of whichever of the two limits takes longer on this machine (see roofline.py).  Formats take turns, and what
lies between two calls with the same matrix exceeds the processor's caches, as in a model.  Packed bytes are what the
kernel reads, file bytes what the format takes; of these each format's are compared with Q4_0's, if it comes first.
"""

from __future__ import annotations

import harness
import roofline
from cases import BLOCK_FORMATS, gaussian, random_weights

import qattn
from qattn import formats

Matrices = dict[str, list[qattn.PackedMatrix]]
COMMON = ["Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"]


def measure(matrices: Matrices, tokens: int, exact: bool, args) -> list[harness.Row]:
    """Time one call of each format after the other, round by round: what memory gives changes within minutes."""
    limits = roofline.limits(args.threads)
    rows, columns = next(iter(matrices.values()))[0].shape
    x, precision, operations = gaussian(tokens, columns), "exact" if exact else "fast", 2 * tokens * rows * columns
    calls = {
        name: harness.in_turn(copies, lambda w: qattn.matmul(x, w, precision=precision))
        for name, copies in matrices.items()
    }
    times = harness.compare(calls, args.rounds, sample=0, pause=0)
    made, base = [], None
    for name, (packed, *_) in matrices.items():
        kind = "f32" if exact else roofline.kind_of_products(packed.layouts[0], tokens, columns)
        floor, bound = limits.floor(read=packed.nbytes, **{kind: operations})
        time, file_bytes = times[name], rows * formats.get(name).bytes * columns // formats.get(name).block
        base = file_bytes / time.median if name == "Q4_0" else base
        made.append(
            {
                "format": name,
                "tokens": tokens,
                "ms": 1e3 * time.median,
                "± %": 100 * time.spread,
                "packed GB/s": packed.nbytes / time.median / 1e9,
                "file GB/s": file_bytes / time.median / 1e9,
                "of Q4_0's %": base and 100 * file_bytes / time.median / base,
                "packed / file": packed.nbytes / file_bytes,
                "GFLOP/s": operations / time.median / 1e9,
                "bound": bound,
                "share %": 100 * floor / time.median,
            }
        )
    return made


def main() -> None:
    parser = harness.parser(__doc__, rounds=21)
    parser.add_argument("--formats", nargs="+", default=COMMON, help="names, or: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--shape", default="4096x14336", metavar="ROWSxCOLUMNS", help="%(default)s by default")
    parser.add_argument("--exact", action="store_true", help="activations in float32")
    args = harness.start(parser)
    rows, columns = map(int, args.shape.split("x"))
    names = BLOCK_FORMATS if args.formats == ["all"] else args.formats
    weights = {name: random_weights(name, rows, columns) for name in names}
    packed = {name: qattn.PackedMatrix(w) for name, w in weights.items()}
    more = harness.copies(sum(w.nbytes for w in packed.values())) - 1
    matrices = {name: [packed[name], *(qattn.PackedMatrix(w) for _ in range(more))] for name, w in weights.items()}
    results = [row for tokens in args.tokens for row in measure(matrices, tokens, args.exact, args)]
    harness.report(args, results, x="format", y="share %", by="tokens")


if __name__ == "__main__":
    main()
