"""What rounding costs a whole model: how far its next-token distributions are from those of exact arithmetic.

The Kullback-Leibler divergence KL(exact, rounded) in nats, behind each token of a text.  Exact are the weights of the
file, multiplied in float32 with a float32 cache.  llama.cpp runs, where llama-cpp-python is installed, on the file
itself, and with ``--check`` on a copy whose weights are all float32, 4 bytes each, which must agree with what is called
exact here.  Takes a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import harness
import numpy as np
from peers import have

import qattn
from qattn.models import Decoder, Tokenizer, fetch

Array = np.ndarray[Any, Any]
Logits = Callable[[Array], Array]
CHUNK = 64  # tokens whose logits are held at once: vocabularies have 262144 tokens


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(log_p: Array, log_q: Array) -> Array:
    """Of each position."""
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def write_exact(path: Path, copy: Path) -> Path:
    """Write a model with all its weights in float32."""
    with qattn.open(path) as model:
        writer = gguf.GGUFWriter(copy, model.metadata["general.architecture"])
        reader = gguf.GGUFReader(path)
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
        for name in model:
            writer.add_tensor(name, np.asarray(model[name], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return copy


def contestants(path: Path, tokens: int, args: argparse.Namespace) -> Iterator[tuple[str, Logits]]:
    """Everyone but the exact model, by name."""
    yield "qattn int8", Decoder.from_gguf(path, max_length=tokens).forward
    if not have("llama_cpp"):
        return
    from llama_peer import Llama

    for name, flash in (("llama.cpp", False), ("llama.cpp flash", True)):
        yield name, Llama(path, threads=args.threads, flash=flash, context=tokens).all_logits
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            copy = write_exact(path, Path(folder, "exact.gguf"))
            yield "llama.cpp, all float32", Llama(copy, threads=args.threads, context=tokens, exact=True).all_logits


def main() -> None:
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--model", type=Path, help="a GGUF file, SmolLM2-135M by default")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("passage.txt"), help="%(default)s")
    parser.add_argument("--tokens", type=int, default=800, help="of the text, at most; %(default)s by default")
    parser.add_argument("--check", action="store_true", help="let llama.cpp run in float32, too")
    args = harness.start(parser)
    path = args.model or fetch()
    text = " ".join(args.text.read_text(encoding="utf-8").split())
    tokens = np.array(Tokenizer.from_gguf(path).encode(text, eos=False)[: args.tokens])
    exact = Decoder.from_gguf(path, precision="exact", max_length=len(tokens)).forward
    others = dict(contestants(path, len(tokens), args))
    pieces: dict[str, list[Array]] = {name: [] for name in others}
    same = dict.fromkeys(others, 0)
    for first in range(0, len(tokens), CHUNK):
        chunk = tokens[first : first + CHUNK]
        log_p = log_softmax(exact(chunk))
        for name, forward in others.items():
            logits = forward(chunk)
            pieces[name].append(divergence(log_p, log_softmax(logits)))
            same[name] += int((logits.argmax(axis=1) == log_p.argmax(axis=1)).sum())
    rows = []
    for name, values in ((name, np.concatenate(parts)) for name, parts in pieces.items()):
        rows.append(
            {
                "who": name,
                "mean KL": float(values.mean()),
                "±": float(values.std(ddof=1) / len(values) ** 0.5),
                "median KL": float(np.median(values)),
                "largest KL": float(values.max()),
                "same best token %": 100 * same[name] / len(values),
                "tokens": len(values),
            }
        )
    args.model, args.text = path.name, args.text.name  # in the JSON, wherever they lie
    harness.report(args, rows, x="who", y="mean KL")


if __name__ == "__main__":
    main()
