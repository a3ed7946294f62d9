"""A whole model, SmolLM2-135M unless another file is named: reading a prompt, writing tokens, and starting up.

Tokens are random and no text is made, so that the decoder alone is timed.  Starting up is a fresh process from its
start to the first token of a short prompt.  Then the time of a decode step is taken apart: calls into compiled kernels,
as Python sees them, and Python between them.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import harness
import numba
import numpy as np

from qattn.cpu import attention, dequantize, feed_forward, matmul, rope
from qattn.models import Decoder, fetch

KERNEL_MODULES = (attention, dequantize, feed_forward, matmul, rope)
FIRST_TOKEN = """
import sys
from qattn.models import Model
print(next(iter(Model.from_gguf(sys.argv[1]).generate("Once upon a time", max_tokens=1))))
"""


class Clocked:
    """A compiled kernel that adds up its calls and their seconds."""

    def __init__(self, kernel: Any, name: str, calls: dict[str, list[float]]) -> None:
        self._kernel, self._seconds = kernel, calls[name]

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        result = self._kernel(*args)
        self._seconds.append(time.perf_counter() - begin)
        return result


def clock_kernels(calls: dict[str, list[float]]) -> None:
    """Let every kernel that Python calls be timed: those of the modules, and those that their factories make."""
    for module in KERNEL_MODULES:
        for name, thing in list(vars(module).items()):
            full = f"{module.__name__.rpartition('.')[2]}.{name}"
            if isinstance(thing, numba.core.dispatcher.Dispatcher):
                setattr(module, name, Clocked(thing, full, calls))
            elif hasattr(thing, "cache_info") and thing.__module__ == module.__name__:
                setattr(module, name, _clocked_factory(thing, full, calls))


def _clocked_factory(factory: Any, name: str, calls: dict[str, list[float]]) -> Any:
    return functools.cache(lambda *args: Clocked(factory(*args), name, calls))


def first_token_seconds(path: Path) -> float:
    """Seconds from the start of an interpreter to a first token."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST_TOKEN, str(path)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def write(decoder: Decoder, depth: int, tokens: np.ndarray[Any, Any]) -> None:
    """Forget what stands behind `depth`, then append tokens one by one."""
    decoder.truncate(depth)
    for token in tokens:
        decoder.forward([token])


def profile(decoder: Decoder, depth: int, tokens: np.ndarray[Any, Any]) -> list[harness.Row]:
    """Where the time of a decode step goes."""
    calls: dict[str, list[float]] = defaultdict(list)
    clock_kernels(calls)
    write(decoder, depth, tokens[:4])
    for seconds in calls.values():
        seconds.clear()
    begin = time.perf_counter()
    write(decoder, depth, tokens)
    total = (time.perf_counter() - begin) / len(tokens)
    spent = {name: (len(seconds) / len(tokens), sum(seconds) / len(tokens)) for name, seconds in calls.items()}
    rest = total - sum(seconds for _, seconds in spent.values())
    spent = dict(sorted(spent.items(), key=lambda item: -item[1][1])) | {"Python between them": (0.0, rest)}
    return [
        {"of a decode step": name, "calls": count, "µs": 1e6 * seconds, "share %": 100 * seconds / total}
        for name, (count, seconds) in spent.items()
        if seconds
    ]


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--model", type=Path, help="a GGUF file")
    parser.add_argument("--prompt", type=int, default=512, help="tokens, %(default)s by default")
    parser.add_argument("--generate", type=int, default=64, help="tokens, %(default)s by default")
    args = harness.start(parser)
    path = args.model or fetch()
    decoder = Decoder.from_gguf(path)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, decoder.config.vocabulary_size, args.prompt)
    tokens = rng.integers(0, decoder.config.vocabulary_size, args.generate)

    def read() -> None:
        decoder.reset()
        decoder.forward(prompt, last_only=True)

    reading = harness.measure(read, args.rounds)
    writing = harness.measure(lambda: write(decoder, args.prompt, tokens), args.rounds)
    starting = harness.summary([first_token_seconds(path) for _ in range(3)])
    rows = [
        {"what": what, "ms": 1e3 * timing.median, "± %": 100 * timing.spread, "tokens/s": count / timing.median}
        for what, timing, count in (
            (f"prompt of {args.prompt}", reading, args.prompt),
            (f"generate {args.generate}", writing, args.generate),
            ("first token of a process", starting, 1),
        )
    ]
    print()
    harness.table(profile(decoder, args.prompt, tokens))
    harness.report(args, rows, x="what", y="tokens/s")
    print(f"\npeak memory {harness.peak_rss() / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
