"""Text to tokens and back, wholly from the vocabulary in a GGUF file."""

from __future__ import annotations

import codecs
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from gguf.constants import Keys, TokenType

from qattn.errors import GGUFError
from qattn.gguf_file import GGUFFile, opened
from qattn.models import byte_bpe, sentencepiece

_KEYS = Keys.Tokenizer

# Tokens that end a turn or a text by their names: many files have several and name one as EOS.
_END_TEXTS = {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"}
_END_TEXTS |= {"<end_of_turn>", "<EOT>"}


class _Pieces(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """The tokenizer that a GGUF file describes.  Made by `from_gguf` or from a file's metadata.

    Parameters
    ----------
    metadata : mapping
        With the keys ``tokenizer.ggml.*`` of a GGUF file.

    Raises
    ------
    GGUFError
        Metadata is missing or contradicts itself.
    NotImplementedError
        The kind of tokenizer is not supported; the message lists those that are.
    MissingExtraError
        The package ``tokenizers`` is needed and not installed.

    Attributes
    ----------
    bos, eos : int or None
        The tokens that begin and end a text.
    ends : frozenset of int
        All tokens after which a model has said what it wants to say.
    adds_bos, adds_eos : bool
        Whether the model expects them around a text.
    chat_template : str or None
        The Jinja template that makes a text of a conversation.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        reader = _Reader(metadata)
        self._tokens = reader.strings(_KEYS.LIST)
        self._types = reader.types(len(self._tokens))
        kind = metadata.get(_KEYS.MODEL)
        if kind == "gpt2":
            pre = byte_bpe.pre_tokenizer(metadata.get(_KEYS.PRE, "default"))
            self._plain: _Pieces = byte_bpe.ByteBPE(self._tokens, reader.strings(_KEYS.MERGES), pre)
            self._ordinary_bytes = byte_bpe.token_bytes
            adds_bos = pre.add_bos
        elif kind == "llama":
            self._plain = self._sentencepiece(reader)
            self._ordinary_bytes = sentencepiece.token_bytes
            adds_bos = True
        else:
            raise NotImplementedError(f"{_KEYS.MODEL} is {kind!r}, which is not supported; there are: 'gpt2', 'llama'")
        spm = kind == "llama"
        self._space_prefix = reader.flag(_KEYS.ADD_PREFIX, spm)
        self.adds_bos, self.adds_eos = reader.flag(_KEYS.ADD_BOS, adds_bos), reader.flag(_KEYS.ADD_EOS, False)
        self.bos, self.eos = (
            reader.token(_KEYS.BOS_ID, 1 if spm else None),
            reader.token(_KEYS.EOS_ID, 2 if spm else None),
        )
        template = metadata.get(_KEYS.CHAT_TEMPLATE)
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._id_of = self._texts(TokenType.USER_DEFINED, *_SPECIAL)
        self.ends = self._find_ends(reader)
        self._strips = self._find_stripping(metadata)

    @classmethod
    def from_gguf(cls, model: GGUFFile | str | os.PathLike[str]) -> Tokenizer:
        """Make the tokenizer of an open file, or of the file at a path."""
        with opened(model) as file:
            return cls(file.metadata)

    def _sentencepiece(self, reader: _Reader) -> sentencepiece.SentencePieceBPE:
        tokens, scores = self._tokens, reader.scores(len(self._tokens))
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        # Text must never become a control token, so these take no part in merging.
        ordinary = np.flatnonzero(~np.isin(self._types, [*_SPECIAL, TokenType.BYTE, TokenType.USER_DEFINED]))
        mergeable = {tokens[index]: scores[index] for index in ordinary.tolist() if ids[tokens[index]] == index}
        return sentencepiece.SentencePieceBPE(mergeable, ids, reader.token(_KEYS.UNK_ID, 0))

    def _find_ends(self, reader: _Reader) -> frozenset[int]:
        named = {reader.token(key, None) for key in (_KEYS.EOT_ID, _KEYS.EOM_ID)} | {self.eos}
        markup = self._texts(TokenType.USER_DEFINED).get("</s>")  # Gemma's strikes text out
        known = {index for text, index in self._id_of.items() if text in _END_TEXTS and index != markup}
        return frozenset(known | {token for token in named if token is not None})

    def _find_stripping(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        """The special tokens that swallow white space behind them.  GGUF has no word for it: Phi 3's name says it."""
        name = str(metadata.get(Keys.General.NAME, "")).lower()
        if not any(phi in name for phi in ("phi-3", "phi3")):
            return frozenset()
        return frozenset(token for text, token in self._id_of.items() if text not in _KEEP_SPACE)

    @functools.cached_property
    def _always(self) -> Any:
        """Cuts a text at the tokens that are found in any text."""
        return _splitter(self._texts(TokenType.USER_DEFINED))

    @functools.cached_property
    def _special(self) -> Any:
        """Cuts a text at control tokens, too: thousands of alternatives, which take a while to compile."""
        return _splitter(self._id_of)

    def _texts(self, *types: int) -> dict[str, int]:
        found = np.flatnonzero(np.isin(self._types, types)).tolist()
        return {self._tokens[index]: index for index in found if self._tokens[index]}

    def __len__(self) -> int:
        """The number of tokens in the vocabulary."""
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, bos={self.bos}, eos={self.eos})"

    # Text to tokens

    def encode(
        self, text: str, *, special: bool = False, bos: bool | None = None, eos: bool | None = None
    ) -> list[int]:
        """Return the tokens of a text.

        Parameters
        ----------
        text : str
        special : bool
            Let ``<|im_start|>`` and the like in the text become control tokens.  Leave it off for text of others:
            it could pretend to be another speaker.  (Tokens that a file calls user-defined are found always.)
        bos, eos : bool, optional
            Begin with the BOS token, end with the EOS token; by default as the model expects it.

        Raises
        ------
        ValueError
            The text can't be written as UTF-8, or `bos` or `eos` is asked of a vocabulary that has none.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at index {error.start}"
            raise ValueError(f"text has {found}, half of a surrogate pair; decode it with errors='replace'") from None
        tokens = self._edge("bos", self.bos, self.adds_bos, bos)
        after_special, strip = True, False
        for index, fragment in enumerate((self._special if special else self._always)(text)):
            if index % 2:
                tokens.append(self._id_of[fragment])
                after_special, strip = True, tokens[-1] in self._strips
            elif fragment := fragment.lstrip(_SPACES) if strip else fragment:
                prefix = " " if self._space_prefix and after_special else ""
                tokens.extend(self._plain.encode(prefix + fragment))
                after_special = False
        return tokens + self._edge("eos", self.eos, self.adds_eos, eos)

    def _edge(self, name: str, token: int | None, default: bool, asked: bool | None) -> list[int]:
        if asked and token is None:
            raise ValueError(f"{name} is True, but the vocabulary has no {name.upper()} token")
        return [token] if token is not None and (default if asked is None else asked) else []

    # Tokens to text

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Return what a token stands for, which may be a part of a character; control tokens are shown if `special`.

        Raises
        ------
        ValueError
            There is no such token.
        """
        if not 0 <= token < len(self._tokens):
            raise ValueError(f"token is {token}; the vocabulary has tokens 0 to {len(self._tokens) - 1}")
        text, kind = self._tokens[token], int(self._types[token])  # a NumPy integer may swallow Ctrl-C
        if kind in _SPECIAL:
            return text.encode(errors="replace") if special else b""
        if kind == TokenType.BYTE and (match := _BYTE.fullmatch(text)):
            return bytes([int(match[1], 16)])
        if kind == TokenType.USER_DEFINED:
            return text.encode(errors="replace")
        return self._ordinary_bytes(text)

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD, control tokens nothing unless `special`.

        It undoes `encode`, so that a space which `encode` puts before a text is taken away.
        """
        tokens = list(tokens)
        text = b"".join(self.token_bytes(token, special=special) for token in tokens).decode(errors="replace")
        return text[1:] if self._space_prefix and text.startswith(" ") else text

    def stream(self, *, special: bool = False) -> TextStream:
        """Return a decoder for tokens that come one by one and continue a text."""
        return TextStream(self, special)


class TextStream:
    """Turns tokens into text as they come, and holds back what is not yet a whole character."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take one token, and return the characters that are complete with it; often one, sometimes none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, special=self._special))

    def finish(self) -> str:
        """Return what was held back: U+FFFD if the text stopped within a character, else nothing."""
        return self._utf8.decode(b"", final=True)


_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # of Phi 3
_SPACES = " \t\n\v\f\r"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _splitter(texts: Iterable[str]) -> Any:
    """Return a function that cuts a text into ordinary, special, ordinary, … fragments; the longest match wins."""
    ordered = sorted(texts, key=len, reverse=True)
    if not ordered:
        return lambda text: [text]
    return re.compile(f"({'|'.join(map(re.escape, ordered))})").split


class _Reader:
    """A tokenizer's metadata, with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if value is None:
            raise GGUFError(f"metadata {key} is missing, and without it there is no tokenizer")
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise GGUFError(f"metadata {key} is {value!r}; expected an array of strings")
        return list(value)

    def types(self, count: int) -> np.ndarray[Any, Any]:
        """(tokens,) int32; all normal if the file says nothing."""
        value = self._metadata.get(_KEYS.TOKEN_TYPE)
        return (
            np.full(count, TokenType.NORMAL) if value is None else self._per_token(_KEYS.TOKEN_TYPE, value, count, "iu")
        )

    def scores(self, count: int) -> list[float]:
        value = self._metadata.get(_KEYS.SCORES)
        if value is None:
            raise GGUFError(f"metadata {_KEYS.SCORES} is missing; a tokenizer of the kind 'llama' merges by scores")
        scores = self._per_token(_KEYS.SCORES, value, count, "f")
        if np.isnan(scores).any():
            raise GGUFError(f"metadata {_KEYS.SCORES} has NaN for token {int(np.isnan(scores).argmax())}")
        return scores.tolist()

    def _per_token(self, key: str, value: Any, count: int, kinds: str) -> np.ndarray[Any, Any]:
        array = np.asarray(value)
        if array.shape != (count,) or array.dtype.kind not in kinds:
            raise GGUFError(
                f"metadata {key} is {array.dtype} of shape {array.shape}; expected a number for each of {count} tokens"
            )
        return array

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise GGUFError(f"metadata {key} is {value!r}; expected true or false")
        return bool(value)

    def token(self, key: str, default: int | None) -> int | None:
        value = self._metadata.get(key, default)
        count = len(self._metadata[_KEYS.LIST])
        if value is None or (key not in self._metadata and not 0 <= value < count):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < count:
            raise GGUFError(f"metadata {key} is {value!r}; expected a token, 0 to {count - 1}")
        return int(value)
