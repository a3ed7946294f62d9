"""What several subcommands share: options of a model, and loading it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qattn.errors import MissingExtraError

if TYPE_CHECKING:
    from qattn.models import Model


def say(text: str) -> None:
    """Write a line for the person at the terminal, apart from the output."""
    sys.stderr.write(f"{text}\n")


def text_or_file(text: str) -> str:
    """Return the text, or what is in the file if it is ``@path``, or standard input if it is ``-``."""
    if text == "-":
        return sys.stdin.read()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text[1:]} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def add_model_options(parser: argparse.ArgumentParser, precision: str = "fast") -> None:
    """Add the options that say how a model runs."""
    parser.add_argument(
        "--precision",
        choices=["fast", "int8", "exact"],
        default=precision,
        help=f"int8: activations in 8 bits; fast: likewise, or in bfloat16 where that is faster; exact: float32 "
        f"(default: {precision})",
    )
    parser.add_argument(
        "--cache-type", metavar="TYPE", help='what keys and values are stored as: bfloat16, q8_0, "q8_0/q4_0", …'
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (default: all cores)")
    parser.add_argument(
        "--device", default="cpu", help="cpu (default), cuda:0 for a GPU, or auto for a GPU if one can be used"
    )


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that write a picture."""
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"draw to this file, {', '.join(_PICTURES)}")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


_PICTURES = (".png", ".svg", ".pdf")


def check_target(path: Path | None, force: bool, endings: tuple[str, ...] = _PICTURES) -> None:
    """Raise ValueError or OSError, before any work, for a file that can't be written, or that would be overwritten."""
    if path is None:
        return
    if endings is _PICTURES and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plot", "matplotlib")
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} ends in {path.suffix!r}; expected {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory, so {path.name} can't be written there")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; --force overwrites it")


def write(path: Path, content: bytes, force: bool) -> None:
    """Write a file, and say so."""
    with path.open("wb" if force else "xb") as file:
        file.write(content)
    say(f"wrote {path}")


def draw(path: Path, figure: Any, force: bool) -> None:
    """Write a figure of `qattn.plot` to a file."""
    from qattn.plot import rendered

    write(path, rendered(figure, path.suffix.lower()[1:]), force)


def console() -> Any:
    """What tables are printed to; they are made for 80 columns where there is no terminal."""
    from qattn.models._extra import require

    return require("rich.console").Console(file=sys.stdout, highlight=False)


def table(title: str, columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]]) -> Any:
    """Make a table; columns are (name, alignment), and cells are shown as they are."""
    from qattn.models._extra import require

    text = require("rich.text").Text
    box = require("rich.box")
    looks = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "pad_edge": False}
    made = require("rich.table").Table(title=title, **looks)
    for name, alignment in columns:
        made.add_column(name, justify=alignment, no_wrap=name != "value", overflow="fold")
    for row in rows:
        made.add_row(*map(text, row))
    return made


def load(path: str | Path | None, args: argparse.Namespace, **options: Any) -> Model:
    """Load a model file, or the default model, which is fetched if it isn't there."""
    import qattn
    from qattn import models

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; expected at least 1")
        qattn.set_num_threads(args.threads)
    with qattn.open(path or fetch(), device=args.device) as file:
        if args.device == "auto":
            say(f"device: {file.device}")
        args.compiling = file.device == "cpu" and _announce_compilation()
        return models.Model.from_gguf(file, precision=args.precision, cache_dtype=args.cache_type, **options)


def _announce_compilation() -> bool:
    """Say that kernels will be compiled, if they have to be → whether they have."""
    from qattn.cpu._jit import cache_directory

    directory = cache_directory()
    if directory is None or not os.path.isdir(directory) or not os.listdir(directory):
        later = "; later runs start at once" if directory is not None else ""
        say(f"compiling kernels for this CPU, which takes 10 to 30 seconds{later}")
        return True
    return False


def fetch(name: str = "smollm2-135m") -> Path:
    """Return where a model lies; show progress while it is fetched, and then say where."""
    from qattn.models import fetch as fetch_model
    from qattn.models.fetch import SOURCES, fetched, shown_progress

    path = fetched(SOURCES[name])
    if path is None:
        with shown_progress() as progress:
            path = fetch_model(SOURCES[name], progress)
        say(f"the model lies in {path}")
    return path


def rate(tokens: int, seconds: float) -> str:
    """Write how fast tokens came."""
    return f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else "at once"


def replace_unprintable() -> None:
    """Let a terminal that can't show a character show a question mark instead."""
    with contextlib.suppress(AttributeError):  # something else took the place of standard output
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
