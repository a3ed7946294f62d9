"""What this machine can do at most: bandwidth of memory, and peaks of the products that the kernels are made of.

Read and write stream through a buffer of eight times the last-level cache; the best of several access patterns counts.
The peaks are loops without memory traffic, over as many independent sums as the kernels' own blocks have.  All of them
are measured for 1, 2, 4 … threads and kept in the user's cache directory; --fresh measures again.  The other scripts
relate their results to these limits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numba
import numpy as np
from llvmlite import ir

from qattn.cpu.amx import tiles
from qattn.cpu.amx_matmul import takes
from qattn.cpu.dots import Dots
from qattn.cpu.simd import Emitter, Value, micro_kernel
from qattn.cpu.target import TARGET
from qattn.layout import Layout
from qattn.models.fetch import cache_directory

LINE = 64  # bytes of a vector, and of a cache line
SUMS = TARGET.rows  # independent sums in flight
TURNS = 8  # products that are added to a sum in turn, as for a cell of 32 columns
ROUNDS = 40  # of single calls, of which the fastest counts: a limit is what was reached once


class Limits(NamedTuple):
    """GB/s of memory, and GFLOP/s (two for each product that is added) of the dot products; bf16 in tiles, if any."""

    read: float
    write: float
    dot4: float
    bf16: float
    f32: float

    def floor(self, *, read: float = 0, write: float = 0, **operations: float) -> tuple[float, str]:
        """Seconds that bytes read and written and operations of one kind take at least, and what binds."""
        times = {"read": read / self.read / 1e9, "write": write / self.write / 1e9}
        times |= {name: count / getattr(self, name) / 1e9 for name, count in operations.items()}
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


def _reader(streams: int, ahead: int) -> Any:
    """Add up the vectors of `streams` places of the buffer that are read side by side, asked for `ahead` of that."""

    @micro_kernel
    def read(e, data, out, lines, distance):
        unroll = 8 // streams
        totals = [e.register(e.constant(0, e.I32V)) for _ in range(8)]
        with e.loop(lines) as i:
            for n, total in enumerate(totals):
                at = (i * unroll + n // streams) * LINE + distance * (n % streams)
                total.set(total.get() + data.at(at).load(e.I32V))
                if ahead:
                    e.prefetch(data.at(at).at(ahead))
        for n, total in enumerate(totals):
            out.at(n * LINE).store(total.get())

    @numba.njit(parallel=True)
    def run(data, out, threads):
        share = data.size // threads
        for t in numba.prange(threads):
            read((data[t * share :], out[t], share // (8 * LINE), share // streams // LINE * LINE))

    return run


def _writer(streaming: bool) -> Any:
    """Fill the buffer; streaming stores don't read the line first."""

    @micro_kernel
    def write(e, data, value, lines):
        vector = value.splat(e.F32)
        with e.loop(lines) as i:
            there = e.builder.bitcast(data.at(i * LINE).ir, e.F32.as_pointer())
            store = e.builder.store(vector.ir, there, align=LINE)
            if streaming:
                store.set_metadata("nontemporal", e.builder.module.add_metadata([ir.Constant(e.I32, 1)]))

    @numba.njit(parallel=True)
    def run(data, value, threads):
        share = data.size // threads // LINE * LINE
        for t in numba.prange(threads):
            write((data[t * share :], value, share // LINE))

    return run


def _peak(step: Callable[[Emitter, Value, Value, list[Value]], Value], of_floats: bool) -> Any:
    """Repeat total = step(e, total, left, rights) for independent totals in registers, and a left of their own."""

    @micro_kernel
    def repeat(e, data, out, count):
        kind = e.F32 if of_floats else e.I32V
        totals = [e.register(data.at(n * LINE).load(kind)) for n in range(SUMS)]
        lefts = [data.at(n * LINE).load(e.I32V) for n in range(SUMS)]
        with e.loop(count) as i:  # no product is another one, or a compiler could compute it once
            rights = [data.at((i + turn & 7) * LINE).load(e.I32V) for turn in range(TURNS)]
            for left, total in zip(lefts, totals, strict=True):
                total.set(step(e, total.get(), left, rights))
        for n, total in enumerate(totals):
            out.at(n * LINE).store(total.get())

    @numba.njit(parallel=True)
    def run(data, out, count, threads):
        for t in numba.prange(threads):
            repeat((data, out[t], count))

    return run


def _tile_peak() -> Any:
    """Repeat products in tile registers, of four independent sums."""

    @micro_kernel
    def repeat(e, data, out, count):
        with tiles(e) as tile:
            for each in tile:
                each.load(data)
            with e.loop(count):
                for n in range(4):
                    tile[n].add_products(tile[4 + n // 2], tile[6 + n % 2])
            tile[0].store(out)

    @numba.njit(parallel=True)
    def run(data, out, count, threads):
        for t in numba.prange(threads):
            repeat((data, out[t], count))

    return run


def _dot4(e: Emitter, total: Value, left: Value, rights: list[Value]) -> Value:
    dots = Dots(e, [total], len(rights), 15)
    for right in rights:
        dots.add(0, left, right)
    return dots.total(0)


def _bf16(e: Emitter, total: Value, left: Value, rights: list[Value]) -> Value:
    for right in rights:
        total = e.dot2_bf16(total, left, right)
    return total


def _fma(e: Emitter, total: Value, left: Value, rights: list[Value]) -> Value:
    for right in rights:
        total = e.fma(left.bits(e.F32), right.bits(e.F32), total)
    return total


_PEAKS = {"dot4": (_dot4, 128), "bf16": (_bf16, 64), "f32": (_fma, 32)}  # operations a vector


def measure(counts: list[int]) -> dict[int, Limits]:
    """Measure the limits for some numbers of threads."""
    data = _aligned(max(8 * harness.last_level_cache(), 1 << 28))
    ones, out = _aligned(16 * LINE), np.zeros((max(counts), 16 * LINE), np.uint8)
    ones.view(np.float32)[:] = 1
    readers = [_reader(streams, ahead) for streams in (1, 2, 4) for ahead in (0, 16384)]
    writers = [_writer(streaming) for streaming in (False, True)]
    peaks = {name: (_peak(step, name != "dot4"), TURNS * SUMS * ops) for name, (step, ops) in _PEAKS.items()}
    if TARGET.amx:
        peaks["bf16"] = _tile_peak(), 4 * 2 * 16 * 16 * 32

    def best(runs: list[Any], *args: Any) -> float:
        """Seconds of the fastest, at its fastest."""
        calls = {n: functools.partial(run, *args) for n, run in enumerate(runs)}
        return min(timing.best for timing in harness.compare(calls, ROUNDS, sample=0, pause=0).values())

    found, repeats = {}, 1 << 17
    for n in counts:
        numba.set_num_threads(n)
        bandwidths = (best(readers, data, out, n), best(writers, data, np.float32(1), n))
        speeds = [n * repeats * ops / best([run], ones, out, repeats, n) / 1e9 for run, ops in peaks.values()]
        found[n] = Limits(*(data.size / seconds / 1e9 for seconds in bandwidths), *speeds)
    return found


def _aligned(size: int) -> np.ndarray[Any, Any]:
    memory = np.ones(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size]


def limits(threads: int, fresh: bool = False) -> Limits:
    """The limits of this machine for a number of threads, measured unless they are known."""
    return all_limits([threads], fresh)[threads]


def all_limits(counts: list[int], fresh: bool = False) -> dict[int, Limits]:
    path = _cache_file()
    known = {int(n): Limits(*values) for n, values in json.loads(path.read_text()).items()} if path.exists() else {}
    missing = [n for n in counts if fresh or n not in known]
    if missing:
        print(f"measuring what this machine can do, into {path}", file=sys.stderr, flush=True)
        before = numba.get_num_threads()
        known |= measure(missing)
        numba.set_num_threads(before)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return known


def _cache_file() -> Path:
    about = {key: value for key, value in harness.machine(0).items() if key not in ("date", "commit", "threads")}
    return cache_directory() / f"roofline-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"


def kind_of_products(layout: Layout, tokens: int, columns: int) -> str:
    """What so many rows of activations and such packed weights are multiplied in."""
    return "bf16" if takes(layout, tokens, columns) else "f32" if layout.bits >= 16 else "dot4"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure again")
    args = harness.start(parser)
    counts = sorted({args.threads, *(2**n for n in range(args.threads.bit_length() - 1))})
    found = all_limits(counts, args.fresh)
    units = {"read": "read GB/s", "write": "write GB/s"}
    rows = [
        {"threads": n, **{units.get(name, f"{name} GFLOP/s"): value for name, value in found[n]._asdict().items()}}
        for n in counts
    ]
    harness.report(args, rows, x="threads", y="read GB/s")


if __name__ == "__main__":
    main()
