"""Dequantization and packing of every block format, beside `gguf.quants.dequantize`.

Values go to a new array as with gguf, and into an array that is there already; the share is that of the second in what
this machine can write (see roofline.py).  Packing runs on one thread, and counts bytes of the file.
"""

from __future__ import annotations

import argparse

import harness
import numpy as np
import roofline
from cases import BLOCK_FORMATS, random_weights
from gguf import GGMLQuantizationType, quants

import qattn

COLUMNS = 4096


def gguf_reads(name: str) -> bool:
    """Whether the gguf package that is installed can dequantize a format."""
    try:
        quants.dequantize(random_weights(name, 1, COLUMNS).data, GGMLQuantizationType[name])
    except (KeyError, NotImplementedError):
        return False
    return True


def measure(name: str, args: argparse.Namespace) -> harness.Row:
    weights = random_weights(name, args.weights * 10**6 // COLUMNS, COLUMNS)
    out = np.empty(weights.shape, np.float32)
    calls = {"new": lambda: qattn.dequantize(weights), "out": lambda: qattn.dequantize(weights, out=out)}
    if gguf_reads(name):
        calls["gguf"] = lambda: quants.dequantize(weights.data, GGMLQuantizationType[name])
    times = {key: timing.median for key, timing in harness.compare(calls, args.rounds).items()}
    slice_ = weights[: max(16, len(weights) // 8)]
    harness.set_threads(1)
    packing = harness.measure(lambda: qattn.PackedMatrix(slice_), args.rounds).median
    harness.set_threads(args.threads)
    millions = weights.size / 1e6
    return {
        "format": name,
        "M weights/s": millions / times["new"],
        "gguf": millions / times["gguf"] if "gguf" in times else None,
        "ratio": times["gguf"] / times["new"] if "gguf" in times else None,
        "into out": millions / times["out"],
        "written GB/s": out.nbytes / times["out"] / 1e9,
        "share %": 100 * roofline.limits(args.threads).floor(write=out.nbytes, read=weights.nbytes)[0] / times["out"],
        "packing GB/s": slice_.nbytes / packing / 1e9,
    }


def main() -> None:
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--formats", nargs="+", default=BLOCK_FORMATS)
    parser.add_argument("--weights", type=int, default=16, help="millions of weights, %(default)s by default")
    args = harness.start(parser)
    rows = [measure(name, args) for name in args.formats]
    harness.report(args, rows, x="format", y="M weights/s")


if __name__ == "__main__":
    main()
