"""What each architecture's description says, as it was when it was last compared with llama.cpp's graph of it.

Recorded blocks tell of a part of the architectures alone; this keeps the others from changing unnoticed.  Whoever
changes a description on purpose records them anew, and reads the difference: ``python -m tests.test_descriptions``.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest

from qattn import architectures
from qattn.architectures import AttentionConfig
from tests.conftest import GOLDEN
from tests.gguf_headers import MORE, SIZES, Headers

FILE = GOLDEN / "descriptions.txt"
METADATA = MORE | {"full_attention_interval": 4}
USUAL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "value_dim": 16} | {
    "scale": 0.25
}


def described(headers, name):
    """A line for each description that some of an architecture's layers have: their numbers, and what is not usual."""
    model, layers = headers(name, METADATA), {}
    for layer in range(SIZES["block_count"]):
        try:
            text = in_words(architectures.describe(model, layer))
        except NotImplementedError as error:
            text = str(error).split(f"layer {layer} ")[-1]
        layers.setdefault(text, []).append(layer)
    return [f"{name} {','.join(map(str, numbers))}: {text}" for text, numbers in layers.items()]


def in_words(config):
    default = {field.name: USUAL.get(field.name, field.default) for field in dataclasses.fields(AttentionConfig)}
    values = {name: getattr(config, name) for name in default if name != "prefix"}
    return ", ".join(f"{name}={written(value)}" for name, value in values.items() if value != default[name])


def written(value):
    """Like repr, the same in every process, and with the digits that a file's float32 has."""
    if isinstance(value, frozenset):
        return " ".join(sorted(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(map(written, value))})"
    return f"{value:.7g}" if isinstance(value, float) else repr(value)


@pytest.mark.parametrize("name", architectures.names())
def test_a_description_is_as_it_was(tmp_path, name):
    with Headers(tmp_path) as headers:
        kept = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line.split()[0] == name]
        assert described(headers, name) == kept


def record():
    with tempfile.TemporaryDirectory() as folder, Headers(Path(folder)) as headers:
        lines = [line for name in architectures.names() for line in described(headers, name)]
    FILE.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    record()
