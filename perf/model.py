"""A whole model, SmolLM2-135M unless another file is named: reading a prompt, writing tokens, and starting up.

Tokens are random and no text is made, so that the decoder alone is timed.  Starting up is a fresh process from its
start to the first token of a short prompt.  Then the time of a decode step is taken apart: its recorded kernels, each
kind replayed alone, and Python around the replay.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

from qattn.models import Decoder, fetch

FIRST_TOKEN = """
import sys
from qattn.models import Model
print(next(iter(Model.from_gguf(sys.argv[1]).generate("Once upon a time", max_tokens=1))))
"""


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


def profile(decoder: Decoder, depth: int, rounds: int) -> list[harness.Row]:
    """Where the time of a decode step goes: each kind of kernel replayed alone, and Python around the replay."""
    write(decoder, depth, np.arange(2))
    program = decoder._step.program  # type: ignore[union-attr]
    kinds = {kernel.name: program.only(kernel) for kernel in program.kernels}
    calls = {name: part.replay for name, part in kinds.items()}

    def step() -> None:
        decoder._length = depth  # the same step again, without the work of forgetting the last one
        decoder.forward([0])

    calls |= {"step": step, "all kernels": program.replay}
    times = {name: timing.median for name, timing in harness.compare(calls, rounds).items()}
    whole, replay = times.pop("step"), times.pop("all kernels")
    rows = [(name, len(kinds[name]), seconds) for name, seconds in sorted(times.items(), key=lambda item: -item[1])]
    rows += [("all kernels", len(program), replay), ("Python around them", 0, whole - replay)]
    return [
        {"of a decode step": name, "calls": count, "µs": 1e6 * seconds, "share %": 100 * seconds / whole}
        for name, count, seconds in rows
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
    harness.table(profile(decoder, args.prompt, max(15, args.rounds)))
    harness.report(args, rows, x="what", y="tokens/s")
    print(f"\npeak memory {harness.peak_rss() / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
