"""A whole `GGUFQAttentionWithRope` of Llama 3 8B's shape with random weights, by format.

Prefill of 512 tokens, decode of one token behind several depths, and of one token for each of several sequences.  Calls
go over copies of the layer that together exceed the processor's caches.  The share is that of the floor: the time that
this machine needs to read the weights and the cache, or to do the products (see NOTES.md and roofline.py).  Then: where
the time of a step goes, a line fitted to decode time over depth, and the peak memory of a process with one layer.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np
import roofline
from cases import Layers, Shape, gaussian, random_cache, write_llama

import qattn
from qattn import formats, packing
from qattn.backends import cpu
from qattn.batch import Batch
from qattn.logits import Logits

SHAPE = Shape()
STAGES = ("project", "rope+store", "attend", "output")
BATCH_DEPTH = 1024


class Bench:
    """Equal layers of one format, whose calls can be timed."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args, self.limits = name, args, roofline.limits(args.threads)
        self.layers = Layers(name)
        self.bytes = self.layers.bytes

    def case(self, case: str, tokens: int, depth: int, sequences: int = 1) -> harness.Row:
        """Time `tokens` new ones for each sequence, behind `depth` others."""
        params = self.layers.params
        timing = harness.measure(self.layers.step(tokens, depth, sequences), self.args.rounds)
        floor = self._floor(sequences * tokens, sequences * params.bytes_per_token * (depth + tokens), tokens, depth)
        return {
            "format": self.name,
            "case": case,
            "ms": 1e3 * timing.median,
            "± %": 100 * timing.spread,
            "tokens/s": sequences * tokens / timing.median,
            "floor ms": 1e3 * floor,
            "share %": 100 * floor / timing.median,
        }

    def _floor(self, rows: int, kv_bytes: int, tokens: int, depth: int) -> float:
        """Seconds for the projections, and for attention after them."""
        kind = roofline.kind_of_products(packing.layout_of(formats.get(self.name)), rows, SHAPE.hidden)
        products, _ = self.limits.floor(read=self.bytes, **{kind: 2 * rows * SHAPE.weights})
        operations = rows // tokens * SHAPE.attention_ops(tokens, depth)
        return products + self.limits.floor(read=kv_bytes, bf16=operations)[0]

    def stages(self, case: str, tokens: int, depth: int) -> harness.Row:
        """The median time of each stage of a step, in ms."""
        params, samples = self.layers.params, []
        turns = itertools.cycle([(layer, random_cache(params, depth, room=tokens)) for layer in self.layers.all])
        x = gaussian(tokens, SHAPE.hidden)
        for _ in range(2 + max(self.args.rounds, 30 // tokens)):
            samples.append(_stage_times(*next(turns), x, depth))
        medians = np.median(samples[2:], axis=0)
        return {"format": self.name, "case": case, **dict(zip(STAGES, 1e3 * medians, strict=True))}


def _stage_times(layer: Any, cache: qattn.KVCache, x: Any, depth: int) -> list[float]:
    """One step of a layer, call by call as in its ``__call__``: seconds of each."""
    cache.lengths[:] = depth
    offsets = np.array([0, len(x)])
    batch = Batch.appended(cache.lengths + np.diff(offsets), offsets)
    rotation = layer.rope.rotation(depth + len(x))
    times = [time.perf_counter()]

    def clock(call: Callable[[], Any]) -> Any:
        result = call()
        times.append(time.perf_counter())
        return result

    qkv = clock(lambda: layer._weights.projection(x))
    q = np.empty((len(x), layer.num_attention_heads, layer.kv_params.head_dim), np.float32)
    clock(lambda: cpu.rotate_and_store(qkv, rotation, batch, cache, q))
    heads, _ = clock(lambda: cpu.attend(q, cache, offsets, layer.mask, Logits(layer.scale), exact=False))
    clock(lambda: layer.o_proj(heads.reshape(len(x), -1)))
    return list(np.diff(times))


def memory(name: str, depth: int) -> list[float]:
    """What a fresh process needs for 512 tokens behind `depth`, in MB: peak before and after, weights, cache."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        small = write_llama(Path(folder, "small.gguf"), name, 1, Shape(256, 2, 1, 128))
        large = write_llama(Path(folder, "large.gguf"), name, 1, SHAPE)
        return pool.submit(_memory, small, large, depth).result()


def _memory(small: Path, large: Path, depth: int) -> list[float]:
    qattn.GGUFQAttentionWithRope.from_gguf(small)(gaussian(512, 256))  # loads the kernels
    before = harness.peak_rss()
    layer = qattn.GGUFQAttentionWithRope.from_gguf(large)
    layer.kv_cache = random_cache(layer.kv_params, depth, room=512)
    layer(gaussian(512, SHAPE.hidden))
    return [n / 1e6 for n in (before, harness.peak_rss(), layer.nbytes, layer.kv_cache.nbytes)]


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 4096, 16384], help="of decode")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="sequences of batched decode")
    args = harness.start(parser)
    rows, stages, fits, memories = [], [], [], []
    for name in args.formats:
        bench = Bench(name, args)
        rows += [bench.case(f"prefill 512 @ {depth}", 512, depth) for depth in (0, 4096)]
        decode = [bench.case(f"decode @ {depth}", 1, depth) for depth in args.depths]
        rows += decode
        rows += [bench.case(f"decode {n} @ {BATCH_DEPTH}", 1, BATCH_DEPTH, n) for n in args.batches]
        stages += [bench.stages("prefill 512 @ 4096", 512, 4096)]
        stages += [bench.stages(f"decode @ {depth}", 1, depth) for depth in args.depths]
        if len(decode) > 1:
            slope, start = np.polyfit(args.depths, [row["ms"] for row in decode], 1)
            speed = bench.layers.params.bytes_per_token / slope / 1e6
            fits.append({"format": name, "ms at depth 0": start, "µs per 1000 keys": 1e6 * slope, "KV GB/s": speed})
        del bench
        sizes = memory(name, 4096)
        memories.append({"format": name, **dict(zip(("before", "peak", "weights", "cache"), sizes, strict=True))})
    tables = {"stages, ms": stages, "decode over depth": fits, "memory of a process with one layer, MB": memories}
    for title, part in tables.items():
        if part:
            print(f"\n{title}")
            harness.table(part)
    harness.report(args, rows, x="case", y="share %", by="format")


if __name__ == "__main__":
    main()
