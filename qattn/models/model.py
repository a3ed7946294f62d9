"""A model that reads and writes text: decoder, tokenizer and sampler together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qattn import _check
from qattn._backend import as_host
from qattn.errors import CacheError
from qattn.gguf_file import GGUFFile, opened
from qattn.models.chat import ChatTemplate, TemplateError
from qattn.models.decoder import Decoder
from qattn.models.sampling import Sampler
from qattn.models.tokenizer import Tokenizer
from qattn.ops import Precision

Array = np.ndarray[Any, Any]


class Model:
    """A language model that reads and writes text.  Made by `from_gguf`.

    Attributes
    ----------
    decoder : Decoder
    tokenizer : Tokenizer
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        if len(tokenizer) > decoder.config.vocabulary_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, but the decoder embeds {decoder.config.vocabulary_size}"
            )
        self.decoder, self.tokenizer = decoder, tokenizer

    @classmethod
    def from_gguf(
        cls,
        model: GGUFFile | str | os.PathLike[str],
        *,
        precision: Precision = "fast",
        cache_dtype: str | None = None,
        hadamard: bool = False,
        max_length: int | None = None,
        window_caches: bool = False,
        device: str | None = None,
    ) -> Model:
        """Load a GGUF file; parameters and errors are those of `Decoder.from_gguf` and `Tokenizer`."""
        with opened(model) as file:
            tokenizer = Tokenizer.from_gguf(file)  # first: it fails in a moment where it fails
            decoder = Decoder.from_gguf(
                file,
                precision=precision,
                cache_dtype=cache_dtype,
                hadamard=hadamard,
                max_length=max_length,
                window_caches=window_caches,
                device=device,
            )
        return cls(decoder, tokenizer)

    def __repr__(self) -> str:
        return f"Model({self.decoder!r}, {self.tokenizer!r})"

    def forward(self, tokens: Sequence[int] | Array, *, last_only: bool = False) -> Array:
        """Append tokens, and return the logits of what follows: see `Decoder.forward`."""
        return self.decoder.forward(tokens, last_only=last_only)

    def reset(self) -> None:
        """Forget all tokens."""
        self.decoder.reset()

    def capture(
        self, text: str | Sequence[int] | Array, what: Iterable[str], *, layers: Iterable[int] | None = None
    ) -> dict[int, dict[str, Any]]:
        """Read a text, or tokens, from empty caches, and return what the layers compute: see `Decoder.capture`."""
        tokens = self.tokenizer.encode(text, eos=False) if isinstance(text, str) else text
        return self.decoder.capture(tokens, what, layers=layers)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant's answer begins.

        Parameters
        ----------
        messages : sequence of mappings
            ``{"role": "user", "content": "…"}`` each.

        Raises
        ------
        TemplateError
            The model has no chat template, or it fails or refuses these messages.
        """
        t = self.tokenizer
        if t.chat_template is None:
            raise TemplateError("the model has no chat template, so it can't chat; give it a plain prompt")
        bos, eos = (t.token_bytes(x, special=True).decode() if x is not None else "" for x in (t.bos, t.eos))
        text = ChatTemplate(t.chat_template, bos_token=bos, eos_token=eos).render(messages)
        has_bos = bool(bos) and text.startswith(bos)
        return t.encode(text, special=True, bos=False if has_bos else None, eos=False)

    def generate(
        self, prompt: str | Sequence[int] | Array, *, max_tokens: int | None = None, sampler: Sampler | None = None
    ) -> Generation:
        """Continue a prompt, from empty caches.

        Parameters
        ----------
        prompt : str or (tokens,) integers
            In text, control tokens have no meaning; tokens can be those of `chat_prompt`.
        max_tokens : int, optional
            Tokens to write; by default until the model ends the text or the cache is full.
        sampler : Sampler, optional
            Chooses the tokens; greedy by default.

        Returns
        -------
        Generation
            An iterator over pieces of text, which computes as it is read.

        Raises
        ------
        ValueError
            The prompt has no tokens.
        CacheError
            The prompt is longer than the cache.
        """
        tokens = self.tokenizer.encode(prompt, eos=False) if isinstance(prompt, str) else _ids(prompt)
        if not tokens:
            raise ValueError("the prompt is empty; a model needs at least one token to continue")
        if len(tokens) > self.decoder.max_length:
            raise CacheError(
                f"the prompt has {len(tokens)} tokens, but the cache holds {self.decoder.max_length}; "
                "shorten it, or load the model with a larger max_length"
            )
        if max_tokens is not None:
            _check.at_least("max_tokens", max_tokens, 0)
        return Generation(self, tokens, max_tokens, sampler or Sampler())


def _ids(tokens: Sequence[int] | Array) -> list[int]:
    ids = as_host(tokens, "prompt")
    if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1):
        raise ValueError(f"prompt has dtype {ids.dtype} and shape {ids.shape}; expected a text, or (tokens,) integers")
    return ids.tolist()


class Generation:
    """Text as it is written: an iterator over pieces.  Made by `Model.generate`.

    Attributes
    ----------
    prompt_tokens : list of int
    tokens : list of int
        What was written so far.
    prompt_seconds, seconds : float
        Time that it took to read the prompt and choose the first token, and to choose the others.
    steps : int
        How many others were chosen in `seconds`, one that ended the text included.
    finish_reason : str or None
        "end" (the model ended the text), "max_tokens", "full" (the cache is), or None before that.
    """

    def __init__(self, model: Model, prompt: list[int], max_tokens: int | None, sampler: Sampler) -> None:
        self.prompt_tokens = prompt
        self.tokens: list[int] = []
        self.prompt_seconds = self.seconds = 0.0
        self.steps = 0
        self.finish_reason: str | None = None
        self._pieces = self._write(model, max_tokens, sampler)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def _write(self, model: Model, max_tokens: int | None, sampler: Sampler) -> Iterator[str]:
        decoder, stream, vocabulary = model.decoder, model.tokenizer.stream(), len(model.tokenizer)
        decoder.reset()
        read, changes = self.prompt_tokens, decoder.changes
        while max_tokens is None or len(self.tokens) < max_tokens:
            if len(decoder) + len(read) > decoder.max_length:
                self.finish_reason = "full"
                break
            if decoder.changes != changes:
                raise RuntimeError("the model has read something else meanwhile; a generation needs it to itself")
            start = time.perf_counter()
            # Embeddings are often padded to a round number; beyond the vocabulary there is nothing to choose.
            token = sampler(as_host(decoder.forward(read, last_only=True)[0, :vocabulary], "logits"))
            elapsed, changes = time.perf_counter() - start, decoder.changes
            if read is self.prompt_tokens:
                self.prompt_seconds = elapsed
            else:
                self.seconds += elapsed
                self.steps += 1
            if token in model.tokenizer.ends:
                self.finish_reason = "end"
                break
            self.tokens.append(token)
            read = [token]
            piece = stream.push(token)
            if piece:
                yield piece
        self.finish_reason = self.finish_reason or "max_tokens"
        rest = stream.finish()
        if rest:
            yield rest
