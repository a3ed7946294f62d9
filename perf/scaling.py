"""Whether cost grows as it must: lines fitted over depth and tokens, odd sizes, threads, and batches.

depth    decode of one token over the depth of the cache, prefill of 512 tokens over their number at a fixed depth: the
         largest distance of a measurement from the fitted line, and the line
odd      products of 1 to 17, 511 and 513 tokens, attention with heads of 64 to 256 elements and depths that are no
         multiple of a tile: time for each unit of work, relative to the even neighbour
window   attention with a sliding window over the depth behind it: it must not grow
options  attention with a soft cap, ALiBi, sinks, a bias, or a function as its mask, relative to that without
threads  how much faster two threads are than one
batch    tokens a second of 1, 2, 4, 8 and 16 sequences, relative to one

One format's layer of Llama 3 8B's shape; calls go over copies that together exceed the processor's caches.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import numpy as np
from cases import Layers, Shape, gaussian, random_cache, random_weights

import qattn
from qattn import masks
from qattn.backends import cpu
from qattn.logits import Logits

SHAPE = Shape()
DEPTHS = (0, 2048, 4096, 8192, 12288, 16384)
PROMPTS = (128, 256, 384, 512)
ODD_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 511, 512, 513)
ODD_HEADS = (64, 80, 96, 128, 256)
ODD_DEPTHS = (4080, 4095, 4096, 4097, 4111)
WINDOW, WINDOW_DEPTHS = 1024, (2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16)
Calls = dict[Any, Callable[[], object]]


def fitted(what: str, sizes: tuple[int, ...], calls: Calls, rounds: int) -> harness.Row:
    """Fit a line to times over sizes."""
    times = harness.compare(calls, rounds, pause=0)
    medians = np.array([times[size].median for size in sizes])
    slope, start = np.polyfit(sizes, medians, 1)
    off = np.abs(medians / (start + slope * np.array(sizes)) - 1).max()
    return {
        "case": what,
        "value": 100 * off,
        "unit": "% off the line at most",
        "more": f"{1e3 * start:.3g} ms + {1e6 * slope:.3g} µs each",
    }


def depth(args: argparse.Namespace) -> Iterator[harness.Row]:
    layers = Layers(args.format)
    yield fitted("decode over depth", DEPTHS, {n: layers.step(1, n) for n in DEPTHS}, args.rounds)
    yield fitted("prefill over tokens, behind 4096", PROMPTS, {n: layers.step(n, 4096) for n in PROMPTS}, args.rounds)


def odd(args: argparse.Namespace) -> Iterator[harness.Row]:
    w = random_weights(args.format, SHAPE.qkv_rows, SHAPE.hidden)
    packed = [qattn.PackedMatrix(w) for _ in range(harness.copies(w.nbytes))]
    calls: Calls = {
        n: harness.in_turn(packed, functools.partial(qattn.matmul, gaussian(n, SHAPE.hidden))) for n in ODD_TOKENS
    }
    times = harness.compare(calls, args.rounds, pause=0)
    for few, more in itertools.pairwise(ODD_TOKENS):
        if few > 1:
            ratio = times[more].median / times[few].median
            yield {
                "case": f"product, {more} tokens",
                "value": ratio,
                "unit": f"× the time of {few}",
                "more": f"{1e3 * times[more].median:.3g} ms",
            }
    yield from _attention("head size", {n: _attend(n, 4096) for n in ODD_HEADS}, lambda n: n, args)
    yield from _attention("depth", {n: _attend(128, n) for n in ODD_DEPTHS}, lambda n: n, args)


def _attention(
    what: str, calls: Calls, work: Callable[[int], float], args: argparse.Namespace
) -> Iterator[harness.Row]:
    times = harness.compare(calls, args.rounds, pause=0)
    best = min(times[n].median / work(n) for n in calls)
    for n in calls:
        yield {
            "case": f"attention, {what} {n}",
            "value": times[n].median / work(n) / best,
            "unit": "× the best, for its work",
            "more": f"{1e3 * times[n].median:.3g} ms",
        }


def _attend(head_dim: int, keys: int) -> Callable[[], object]:
    """Attention of 64 tokens over a bfloat16 cache."""
    return _attend_with(masks.Causal(), 64, head_dim, keys)


def _attend_with(mask: masks.Mask, tokens: int, head_dim: int, keys: int, **options: Any) -> Callable[[], object]:
    cache, q = random_cache(qattn.KVCacheParams(8, head_dim), keys), gaussian(tokens, 32, head_dim)
    logits = Logits(head_dim**-0.5, **options)
    return lambda: cpu.attend(q, cache, np.array([0, tokens]), mask, logits, exact=False)


def options(args: argparse.Namespace) -> Iterator[harness.Row]:
    keys, causal = 4096, masks.Causal()
    given: dict[str, Any] = {
        "a soft cap": {"cap": 50.0},
        "ALiBi": {"slopes": qattn.alibi_slopes(32)},
        "sinks": {"sinks": np.zeros(32, np.float32)},
    }
    seen = masks.from_function(lambda query, key: key <= query, lambda query, keys: (0, query + 1))
    for tokens in (1, 64):
        calls: Calls = {"none": _attend_with(causal, tokens, 128, keys)}
        bias = {"bias": np.zeros((tokens, 1, keys), np.float32)}
        calls |= {
            name: _attend_with(causal, tokens, 128, keys, **each) for name, each in (given | {"a bias": bias}).items()
        }
        calls["a function as mask"] = _attend_with(seen, tokens, 128, keys)
        times = harness.compare(calls, args.rounds, pause=0)
        for name in calls:
            yield {
                "case": f"{tokens} tokens @ {keys}, {name}",
                "value": times[name].median / times["none"].median,
                "unit": "× the time without",
                "more": f"{1e3 * times[name].median:.3g} ms",
            }


def window(args: argparse.Namespace) -> Iterator[harness.Row]:
    mask = masks.SlidingWindow(WINDOW)
    for tokens in (1, 64):
        times = harness.compare({n: _attend_with(mask, tokens, 128, n) for n in WINDOW_DEPTHS}, args.rounds, pause=0)
        for n in WINDOW_DEPTHS:
            yield {
                "case": f"a window of {WINDOW}, {tokens} tokens @ {n}",
                "value": times[n].median / times[WINDOW_DEPTHS[0]].median,
                "unit": f"× the time @ {WINDOW_DEPTHS[0]}",
                "more": f"{1e3 * times[n].median:.3g} ms",
            }


def threads(args: argparse.Namespace) -> Iterator[harness.Row]:
    layers = Layers(args.format)
    for what, tokens, behind in (("prefill 512", 512, 0), ("decode", 1, 0), ("decode @ 4096", 1, 4096)):
        step = layers.step(tokens, behind)

        def on(count: int, step: Callable[[], object] = step) -> None:
            harness.set_threads(count)
            step()

        times = harness.compare({n: functools.partial(on, n) for n in (1, 2)}, args.rounds)
        yield {
            "case": what,
            "value": times[1].median / times[2].median,
            "unit": "× faster with 2 threads than with 1",
            "more": f"{1e3 * times[2].median:.3g} ms",
        }
    harness.set_threads(args.threads)


def batch(args: argparse.Namespace) -> Iterator[harness.Row]:
    layers = Layers(args.format)
    times = harness.compare({n: layers.step(1, 0, n) for n in BATCHES}, args.rounds, pause=0)
    for n in BATCHES:
        speed = n * times[1].median / times[n].median
        yield {
            "case": f"decode of {n} sequences",
            "value": speed,
            "unit": "× the tokens/s of one",
            "more": f"{1e3 * times[n].median:.3g} ms",
        }


SECTIONS = {"depth": depth, "odd": odd, "window": window, "options": options, "threads": threads, "batch": batch}


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--format", default="Q4_0")
    args = harness.start(parser)
    rows = [row for name in args.only for row in SECTIONS[name](args)]
    harness.report(args, rows, x="case", y="value", by="unit")


if __name__ == "__main__":
    main()
