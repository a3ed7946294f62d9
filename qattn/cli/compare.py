"""Tell what a quantization costs, layer by layer: compare the attention of two GGUF files of the same model.

Each layer of both is given what the layer of the first file gets when it reads the text.  The error of the output is
that of the whole attention block; the Kullback-Leibler divergence is that of the weights, from the first to the second.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qattn.cli import _common

if TYPE_CHECKING:
    from qattn import GGUFFile
    from qattn.introspect import LayerCost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, the text, and where results go."""
    parser.add_argument("a", help="GGUF file that is taken for true")
    parser.add_argument("b", help="GGUF file of the same architecture and shape")
    parser.add_argument("text", help="text, @FILE for what is in a file, or - for standard input")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file")
    _common.add_picture_options(parser)
    _common.add_model_options(parser, precision="exact")


def run(args: argparse.Namespace) -> None:
    """Print a line for each layer."""
    import qattn
    from qattn import introspect

    _common.check_target(args.json, args.force, (".json",))
    _common.check_target(args.out, args.force)
    text = _common.text_or_file(args.text)
    if not text:
        raise ValueError("the text is empty; layers need something to compute")
    with qattn.open(args.a) as a, qattn.open(args.b) as b:
        different = introspect.differences(a, b)
        if different:
            more = f", and {len(different) - 1} more like this" if len(different) > 1 else ""
            raise ValueError(f"{args.b} can't be compared with {args.a}: {different[0]}{more}")
        model = _common.load(args.a, args)
        tokens = model.tokenizer.encode(text, eos=False)
        found = list(_watched(introspect.costs(model, b, tokens), len(model.decoder.layers)))
        title = f"{b.path.name} against {a.path.name}, over {len(tokens)} tokens"
        rows = [_row(cost, a, b) for cost in found]
    _common.replace_unprintable()
    columns = [("layer", "right"), ("formats", "left"), ("NMSE", "right"), ("KL", "right"), ("worst head", "right")]
    _common.console().print(_common.table(title, columns, rows))
    if args.json:
        layers = [{"layer": cost.layer, "nmse": cost.nmse, "kl": cost.kl.tolist()} for cost in found]
        content = {"a": args.a, "b": args.b, "tokens": len(tokens), "precision": args.precision, "layers": layers}
        _common.write(args.json, json.dumps(content, indent=1).encode(), args.force)
    if args.out:
        from qattn import plot

        _common.draw(args.out, plot.costs(found, title), args.force)


def _watched(costs: Any, total: int) -> Any:
    """The same, with a bar on a terminal that says how far it is."""
    from qattn.models._extra import require

    console = require("rich.console").Console(stderr=True)
    track = require("rich.progress").track
    return track(costs, "comparing layers", total, console=console, transient=True, disable=not console.is_terminal)


def _row(cost: LayerCost, a: GGUFFile, b: GGUFFile) -> list[str]:
    worst = int(cost.kl.argmax())
    formats = f"{_formats(a, cost.layer)} → {_formats(b, cost.layer)}"
    errors = f"{cost.nmse:.2e}", f"{cost.kl.mean():.2e}", f"{worst}: {cost.kl[worst]:.2e}"
    return [str(cost.layer), formats, *errors]


def _formats(file: GGUFFile, layer: int) -> str:
    """The formats of a layer's attention weights."""
    kinds = [
        tensor.type_name
        for name, tensor in file.tensors.items()
        if re.match(rf"blk\.{layer}\.attn_\w+\.weight", name) and len(tensor.shape) > 1
    ]
    return " ".join(dict.fromkeys(kinds))
