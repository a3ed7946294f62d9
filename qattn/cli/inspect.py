"""Show what is inside a GGUF file, and whether all of it is supported."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from qattn.array import in_bytes
from qattn.cli import _common

if TYPE_CHECKING:
    from qattn import GGUFFile
    from qattn.gguf_header import TensorInfo

_PROJECTIONS = ("attn_qkv", "attn_q", "attn_k", "attn_v")
_SHOWN = 3  # items of an array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file."""
    parser.add_argument("file", help="GGUF file")


def run(args: argparse.Namespace) -> None:
    """Print the report, its tables made for 80 columns where there is no terminal."""
    import qattn
    from qattn.models._extra import require

    console = _common.console()
    text = require("rich.text").Text
    with qattn.open(args.file) as model:
        size = model.path.stat().st_size
        console.print(text(f"{model.path}: {in_bytes(size)}, {len(model)} tensors", style="bold"), soft_wrap=True)
        console.print(text(str(qattn.capabilities(model))))
        console.print(text(_decoder(model)))
        console.print(_metadata_table(model), _attention_table(model), _format_table(model))


def _decoder(model: GGUFFile) -> str:
    from qattn.models.config import unsupported

    try:
        reasons = unsupported(model)
    except ValueError as error:
        reasons = [str(error)]
    return f"decoder: NOT supported: {'; '.join(reasons)}" if reasons else "decoder: supported"


# Metadata


def _metadata_table(model: GGUFFile) -> Any:
    rows = [(key, _value(value)) for key, value in model.metadata.items()]
    return _common.table("Metadata", [("key", "left"), ("value", "left")], rows)


def _value(value: Any) -> str:
    """Write a value in one line, long ones cut."""
    if isinstance(value, str):
        return _cut(value.replace("\n", "\\n"))
    if isinstance(value, float):
        return f"{value:.7g}"  # float32 has no more digits
    if hasattr(value, "__len__"):
        kind = value.dtype.name if isinstance(value, np.ndarray) else "string"
        shown = ", ".join(str(item).replace("\n", "\\n") for item in value[:_SHOWN])
        return _cut(f"{len(value)} × {kind}: {shown}" + (", …" if len(value) > _SHOWN else ""))
    return str(value)


def _cut(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# Attention


def _attention_table(model: GGUFFile) -> Any:
    layers: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in model.tensors.items():
        found = re.fullmatch(r"blk\.(\d+)\.(attn_\w+)\.weight", name)
        if found and len(tensor.shape) == 2:
            layers[int(found[1])][found[2]] = tensor
    columns = [("layer", "right"), ("heads", "right"), ("q, k, v", "left"), ("formats", "left")]
    columns += [("output", "left"), ("format", "left"), ("bits", "right"), ("bytes", "right")]
    rows = [_attention_row(model, layer, tensors) for layer, tensors in sorted(layers.items())]
    return _common.table("Attention: query/KV heads×size, rows×columns, bits per weight", columns, rows)


def _attention_row(model: GGUFFile, layer: int, tensors: dict[str, TensorInfo]) -> list[str]:
    projections = [tensors[name] for name in _PROJECTIONS if name in tensors]
    out = tensors.get("attn_output")
    kinds = [tensor.type_name for tensor in projections]
    total = sum(tensor.nbytes or 0 for tensor in tensors.values())
    return [
        str(layer),
        _heads(model, layer),
        f"{sum(t.shape[0] for t in projections)}×{projections[0].shape[1]}" if projections else "—",
        " ".join(kinds if len(set(kinds)) > 1 else kinds[:1]),
        f"{out.shape[0]}×{out.shape[1]}" if out else "—",
        out.type_name if out else "",
        _bits(tensors.values()),
        in_bytes(total),
    ]


def _heads(model: GGUFFile, layer: int) -> str:
    """Query heads, KV heads and their size, where the architecture is known."""
    from qattn import architectures

    try:
        config = architectures.describe(model, layer)
    except (ValueError, NotImplementedError):
        return "?"
    return f"{config.num_attention_heads}/{config.num_key_value_heads}×{config.head_dim}"


# Formats


def _format_table(model: GGUFFile) -> Any:
    kinds: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in model.tensors.values():
        kinds[tensor.type_name].append(tensor)
    everything = sum(tensor.nbytes or 0 for tensor in model.tensors.values())
    rows = []
    for kind, tensors in sorted(kinds.items(), key=lambda item: -sum(tensor.nbytes or 0 for tensor in item[1])):
        size = sum(tensor.nbytes or 0 for tensor in tensors)
        share = f"{size / everything:.1%}" if everything else ""
        rows.append([kind, str(len(tensors)), f"{_weights(tensors):,}", _bits(tensors), in_bytes(size), share])
    columns = [("format", "left"), ("tensors", "right"), ("weights", "right"), ("bits", "right"), ("bytes", "right")]
    return _common.table("Formats", [*columns, ("share", "right")], rows)


def _weights(tensors: Iterable[TensorInfo]) -> int:
    return sum(int(np.prod(tensor.shape, dtype=object)) for tensor in tensors)


def _bits(tensors: Iterable[TensorInfo]) -> str:
    """Bits per weight, scales included."""
    known = [tensor for tensor in tensors if tensor.nbytes]
    weights = _weights(known)
    return f"{8 * sum(tensor.nbytes or 0 for tensor in known) / weights:.2f}" if weights else "?"
