"""Show what the heads of a model attend to in a text.

Without --layer, a line for each layer; with it, one for each of its heads; with --head, the map of that head, or where
the terminal is too narrow for it, its strongest links.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from qattn.cli import _common

if TYPE_CHECKING:
    from qattn.models import Model
    from qattn.probe import Statistics

Array = np.ndarray[Any, Any]

_SHADES = ((0.7, "█"), (0.4, "▓"), (0.2, "▒"), (0.05, "░"), (0.0, "·"))
_LEGEND = "weight: · below 0.05 ≤ ░ < 0.2 ≤ ▒ < 0.4 ≤ ▓ < 0.7 ≤ █"
_LABEL = 14  # columns of the terminal for a token
_LINKS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, the text and what of it to show."""
    parser.add_argument("file", nargs="?", help="GGUF file (default: SmolLM2-135M-Instruct, fetched on first use)")
    parser.add_argument("text", help="text, @FILE for what is in a file, or - for standard input")
    parser.add_argument("--layer", type=int, metavar="N", help="show the heads of this layer, counted from 0")
    parser.add_argument("--head", type=int, metavar="N", help="show the map of this head, counted from 0")
    _common.add_picture_options(parser)
    _common.add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print a table or a map, and draw one head's map, or those of all heads, to a file."""
    if args.layer is None and (args.head is not None or args.out):
        raise ValueError(f"{'--out' if args.head is None else '--head'} is for one layer; say which with --layer")
    _common.check_target(args.out, args.force)
    if args.file is None and args.text.endswith(".gguf"):
        raise ValueError(f"there is no text for {args.text}; say FILE and TEXT, one behind the other")
    text = _common.text_or_file(args.text)
    if not text:
        raise ValueError("the text is empty; heads need something to attend to")
    model = _common.load(args.file, args)
    _common.replace_unprintable()
    tokens = model.tokenizer.encode(text, eos=False)
    if args.layer is None:
        found = model.capture(tokens, {"statistics"})
        rows = [layer["statistics"] for layer in found.values()]
        _print_statistics(f"Layers: means over {len(tokens)} tokens and all heads", "layer", rows)
    else:
        _show_layer(model, tokens, args)


def _show_layer(model: Model, tokens: list[int], args: argparse.Namespace) -> None:
    from qattn._backend import as_host
    from qattn.introspect import attention_of
    from qattn.probe import Statistics

    heads = attention_of(model, args.layer).num_attention_heads
    if args.head is not None and not 0 <= args.head < heads:
        raise ValueError(f"--head is {args.head}; layer {args.layer} has heads 0 to {heads - 1}")
    names = {"statistics"} if args.head is None and not args.out else {"statistics", "weights"}
    captured = model.capture(tokens, names, layers=[args.layer])[args.layer]
    each = [Statistics(*(column[:, head] for column in captured["statistics"])) for head in range(heads)]
    labels = [label(model.tokenizer.token_bytes(token, special=True)) for token in tokens]
    if args.head is None:
        _print_statistics(f"Heads of layer {args.layer}: means over {len(tokens)} tokens", "head", each)
    else:
        title = f"layer {args.layer}, head {args.head}"
        weights = as_host(captured["weights"][args.head])
        _print_map(title, weights, labels)
    if args.out:
        from qattn import plot

        if args.head is None:
            figure = plot.attention_maps(as_host(captured["weights"]), f"layer {args.layer}")
        else:
            figure = plot.attention_map(weights, labels, title)
        _common.draw(args.out, figure, args.force)


def label(piece: bytes) -> str:
    """What a token stands for, in one line that can be printed: ␣ is a space, ↵ the end of a line."""
    text = piece.decode(errors="backslashreplace").replace(" ", "␣").replace("\n", "↵")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Tables


def _print_statistics(title: str, what: str, rows: list[Statistics]) -> None:
    """A line for each layer or head."""
    columns = [(name, "right") for name in (what, "entropy", "distance", "first token", "sink")]
    cells = []
    for number, statistics in enumerate(rows):
        entropy, distance, first, sink = (float(values.mean()) for values in statistics)
        cells.append([str(number), f"{entropy:.2f}", f"{distance:.1f}", f"{first:.1%}", f"{sink:.1%}"])
    _common.console().print(_common.table(title, columns, cells))


def _print_links(title: str, weights: Array, labels: list[str]) -> None:
    """The largest weights, but for those of the first token, which most heads give what they don't need."""
    inner = weights[:, 1:]
    chosen = np.argsort(inner, axis=None, kind="stable")[::-1][:_LINKS]
    columns = [("token", "right"), ("", "left"), ("attends to", "right"), ("", "left")]
    columns += [("weight", "right"), ("distance", "right")]
    rows = []
    for query, key in zip(*np.unravel_index(chosen, inner.shape), strict=True):
        weight = f"{inner[query, key]:.3f}"
        rows.append([str(query), labels[query], str(key + 1), labels[key + 1], weight, str(query - key - 1)])
    heading = f"{title}: strongest links; {weights[:, 0].mean():.1%} go to the first token"
    _common.console().print(_common.table(heading, columns, rows))


# The map


def _print_map(title: str, weights: Array, labels: list[str]) -> None:
    """A line for each token, with two columns for each that it may attend to."""
    from qattn.models._extra import require

    if 2 * len(labels) + _LABEL + 5 > _common.console().width:
        return _print_links(title, weights, labels)
    fit = require("rich.cells").set_cell_size
    numbers = "".join(f"{number:<10}" for number in range(0, len(labels), 5)).rstrip()
    lines = [f"{title}: tokens down, what they attend to across", " " * (_LABEL + 5) + numbers]
    for number, (text, row) in enumerate(zip(labels, weights, strict=True)):
        cells = "".join(2 * _shade(weight) for weight in row)
        lines.append(f"{number:>3} {fit(text, _LABEL)} {cells}".rstrip())
    sys.stdout.write("\n".join([*lines, _LEGEND, ""]))


def _shade(weight: float) -> str:
    return next((shade for least, shade in _SHADES if weight > least or weight == least > 0), " ")
