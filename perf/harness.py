"""What every script here shares: flags, fair timing, a description of the machine, tables, JSON and plots.

A script makes its parser with `parser`, reads it with `start`, times with `compare` and ends with `report`::

    args = harness.start(harness.parser(__doc__))
    times = harness.compare({"mine": f, "theirs": g}, args.rounds)
    harness.report(args, [{"what": name, "ms": 1e3 * time.median} for name, time in times.items()], x="what", y="ms")
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba

import qattn
from qattn.cpu.target import TARGET

Row = dict[str, Any]
SAMPLE = 0.02  # seconds that a sample takes at least: ten thousand times what the clock and a call cost
PAUSE = 0.02  # seconds between competitors: GNU OpenMP threads spin for 8 ms before they sleep


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    spread: float
    """Half the distance between the quartiles, as a share of the median."""
    best: float
    """The fastest sample."""


def parser(doc: str, rounds: int = 7) -> argparse.ArgumentParser:
    """The flags that all scripts have; the docstring of the script is its help."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=qattn.get_num_threads(), help="threads, %(default)s by default")
    made.add_argument("--rounds", type=int, default=rounds, help="samples of each case, %(default)s by default")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine to a file")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table; needs matplotlib")
    return made


def start(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the flags, set the number of threads, and say what machine this is."""
    args = made.parse_args()
    set_threads(args.threads)
    print("  ".join(f"{key}: {value}" for key, value in machine(args.threads).items()), flush=True)
    return args


def set_threads(count: int) -> None:
    """Give kernels that many threads, those included that take all of Numba's pool."""
    qattn.set_num_threads(count)
    numba.set_num_threads(count)


def compare(
    calls: dict[Any, Callable[[], object]], rounds: int = 7, *, sample: float = SAMPLE, pause: float = PAUSE
) -> dict[Any, Timing]:
    """Time functions of no arguments in turn, so that whatever else the machine does falls on all of them alike.

    Each is called once beforehand.  A sample of a short call repeats it, after a call that isn't timed.
    """
    for call in calls.values():
        call()
    repeats, samples = dict.fromkeys(calls, 1), {key: [] for key in calls}
    for n in range(rounds + 1):
        for key, call in calls.items():
            if len(calls) > 1:
                time.sleep(pause)
            if repeats[key] > 1:
                call()
            if n < rounds or repeats[key] > 1:
                samples[key].append(_seconds(call, repeats[key]))
            if n == 0 and samples[key][0] < sample:  # too short a sample: it tells how often to repeat
                repeats[key] = max(2, math.ceil(sample / samples[key].pop()))
    return {key: summary(values) for key, values in samples.items()}


def measure(call: Callable[[], object], rounds: int = 7) -> Timing:
    """Time one function of no arguments."""
    return compare({None: call}, rounds)[None]


def _seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def summary(samples: list[float]) -> Timing:
    """What samples amount to."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    return Timing(median, (high - low) / 2 / median, min(samples))


def in_turn(items: Iterable[Any], use: Callable[[Any], object]) -> Callable[[], object]:
    """A call that uses the next of some equal things each time, so that none is found in the processor's caches."""
    endless = itertools.cycle(items)
    return lambda: use(next(endless))


def last_level_cache() -> int:
    """Bytes of the processor's largest cache; 32 MiB where the system doesn't say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def copies(nbytes: int) -> int:
    """How many things of that size exceed the last-level cache four times: as cold as the layers of a large model."""
    return max(1, math.ceil(4 * last_level_cache() / max(1, nbytes)))


def machine(threads: int) -> Row:
    """What numbers depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "simd": TARGET.level + (" bf16" if TARGET.bf16 else "") + (" amx" if TARGET.amx else ""),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"


def peak_rss() -> int:
    """Bytes of memory that this process has used at most, mapped files included."""
    status = Path("/proc/self/status")  # where there is one: getrusage inherits the peak of the parent process
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(rows: list[Row]) -> None:
    """Print rows under the names of their columns, numbers to three digits."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(value, str) and value != "" for value in rows[0].values()]
    for line in cells:
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True))
        print("  ".join(padded).rstrip())


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def report(args: argparse.Namespace, rows: list[Row], *, x: str, y: str, by: str | None = None) -> None:
    """Print the table, and write what ``--json`` and ``--plot`` ask for: bars of `y` over `x`, coloured by `by`."""
    print()
    table(rows)
    if args.json:
        flags = {key: value for key, value in vars(args).items() if key not in ("json", "plot")}
        content = {"script": Path(sys.argv[0]).name, "flags": flags, "machine": machine(args.threads), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    if args.plot:
        import plot

        plot.bars(args.plot, rows, f"{Path(sys.argv[0]).name}, {_cpu_name()}", x=x, y=y, by=by)
