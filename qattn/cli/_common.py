"""What several subcommands share: options of a model, and loading it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qattn.models import Model


def say(text: str) -> None:
    """Write a line for the person at the terminal, apart from the output."""
    sys.stderr.write(f"{text}\n")


def text_or_file(text: str) -> str:
    """Return the text, or what is in the file if it is ``@path``, or standard input if it is ``-``."""
    if text == "-":
        return sys.stdin.read()
    return Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model runs."""
    parser.add_argument(
        "--precision",
        choices=["int8", "exact"],
        default="int8",
        help="int8: activations in 8 bits (default); exact: float32",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (default: all cores)")
    parser.add_argument(
        "--device", default="cpu", help="cpu (default), cuda:0 for a GPU, or auto for a GPU if one can be used"
    )


def load(path: str | Path | None, args: argparse.Namespace, max_length: int | None = None) -> Model:
    """Load a model file, or the default model, which is fetched if it isn't there."""
    import qattn
    from qattn import models

    if args.threads is not None:
        qattn.set_num_threads(args.threads)
    with qattn.open(path or fetch(), device=args.device) as file:
        if args.device == "auto":
            say(f"device: {file.device}")
        if file.device == "cpu":
            _announce_compilation()
        return models.Model.from_gguf(file, precision=args.precision, max_length=max_length)


def _announce_compilation() -> None:
    from qattn.cpu._jit import cache_directory

    directory = cache_directory()
    if directory is None or not os.path.isdir(directory) or not os.listdir(directory):
        later = "; later runs start at once" if directory is not None else ""
        say(f"compiling kernels for this CPU, which takes about 15 seconds{later}")


def fetch() -> Path:
    """Return where the default model lies; show progress while it is fetched, and then say where."""
    from qattn.models import fetch as fetch_model
    from qattn.models.fetch import fetched, shown_progress

    path = fetched()
    if path is None:
        with shown_progress() as progress:
            path = fetch_model(progress=progress)
        say(f"the model lies in {path}")
    return path


def rate(tokens: int, seconds: float) -> str:
    """Write how fast tokens came."""
    return f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else "at once"


def replace_unprintable() -> None:
    """Let a terminal that can't show a character show a question mark instead."""
    with contextlib.suppress(AttributeError):  # something else took the place of standard output
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
