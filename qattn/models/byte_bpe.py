"""Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have it: pairs of bytes are merged inside words.

What a word is, is a matter of regular expressions, and GGUF files only name them (``tokenizer.ggml.pre``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qattn.errors import GGUFError
from qattn.models._extra import require

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words: each pattern cuts the pieces that the one before left, at every match."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """A word that is in the vocabulary is one token, even if no merges lead to it."""
    add_bos: bool = False
    """Texts begin with the BOS token, unless the file says otherwise."""


_GPT2 = PreTokenizer((_GPT2_WORDS,))
_DIGIT_BY_DIGIT = PreTokenizer((r"\p{N}", _GPT2_WORDS))
_LLAMA3 = PreTokenizer((_LLAMA3_WORDS,), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((_LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),))

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGIT_BY_DIGIT,
    "starcoder": _DIGIT_BY_DIGIT,
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the pre-tokenizer that a file names in ``tokenizer.ggml.pre``.

    Raises
    ------
    NotImplementedError
        It is unknown.
    """
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise NotImplementedError(f"tokenizer.ggml.pre is {name!r}, which is not supported; there are: {known}")
    return PRE_TOKENIZERS[name]


class ByteBPE:
    """Text to tokens by merges of byte pairs.

    A byte that the vocabulary has no token for is left out, as in other implementations.

    Parameters
    ----------
    tokens : sequence of str
        The vocabulary, bytes written as printable characters.
    merges : sequence of str
        Pairs of tokens, a space between them, the first merged first.
    pre : PreTokenizer
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], pre: PreTokenizer) -> None:
        hf = require("tokenizers")
        vocabulary = {token: index for index, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        try:
            model = hf.models.BPE(vocabulary, pairs, ignore_merges=pre.whole_words)
        except Exception as error:  # the library raises nothing more particular
            raise GGUFError(f"tokenizer.ggml.merges must be pairs of tokens that make a token: {error}") from error
        self._tokenizer = hf.Tokenizer(model)
        cuts = [hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated") for pattern in pre.patterns]
        to_bytes = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([*cuts, to_bytes])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def token_bytes(token: str) -> bytes:
    """Return the bytes that a token of the vocabulary stands for."""
    byte_of: dict[str, Any] = _byte_of()
    if all(character in byte_of for character in token):
        return bytes(map(byte_of.__getitem__, token))
    return token.encode(errors="replace")  # written as it is, against the rule


@functools.cache
def _byte_of() -> dict[str, int]:
    """Map GPT-2's characters to bytes: printable Latin-1 is itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
