"""llama.cpp, through the low-level interface of llama-cpp-python, beside qattn on the same file."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

from qattn.models import Decoder

Array = np.ndarray[Any, Any]
UBATCH = 512  # tokens computed at once, as in `qattn.models.decoder`


@lib.llama_log_callback
def _silence(level: int, text: bytes, data: Any) -> None:
    pass


class Llama:
    """A model and a context of one sequence; `exact`: its cache is float32."""

    def __init__(self, path: Path, *, threads: int, context: int, flash: bool = False, exact: bool = False) -> None:
        lib.llama_log_set(_silence, ctypes.c_void_p())
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise OSError(f"llama.cpp can't load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, UBATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise MemoryError(f"llama.cpp can't make a context of {context} tokens")
        self._length = 0
        self.vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def forward(self, tokens: Sequence[int] | Array) -> None:
        """Append tokens; logits are computed behind the last of each batch."""
        for first in range(0, len(tokens), UBATCH):
            part = np.array(tokens[first : first + UBATCH], np.int32)  # lives until its batch is computed
            pointer = part.ctypes.data_as(ctypes.POINTER(lib.llama_token))
            status = lib.llama_decode(self._context, lib.llama_batch_get_one(pointer, len(part)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")

    def all_logits(self, tokens: Sequence[int] | Array) -> Array:
        """Append tokens, at most `UBATCH`, and return the logits behind each."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), self._length + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += len(tokens)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(tokens), self.vocabulary)).copy()

    def logits(self) -> Array:
        """Those behind the last token."""
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), (self.vocabulary,)).copy()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if not lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, length, -1):
            raise RuntimeError(f"llama.cpp can't forget the tokens behind {length}")

    def close(self) -> None:
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)


class Contestants:
    """One model file in qattn and in llama.cpp with and without flash attention."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        self.mine, self._depth = Decoder.from_gguf(path, max_length=context), 0
        flash = {"llama.cpp": False, "llama.cpp flash": True}
        self.theirs = {k: Llama(path, threads=threads, flash=f, context=context) for k, f in flash.items()}
        self.vocabulary = self.mine.config.vocabulary_size
        self._rng = np.random.default_rng(0)

    def tokens(self, count: int) -> Array:
        return self._rng.integers(0, self.vocabulary, count)

    def fill(self, depth: int) -> None:
        """Let all of them have the same `depth` tokens, more than before."""
        tokens = self.tokens(depth - self._depth)
        for each in (self.mine, *self.theirs.values()):
            each.truncate(self._depth)
            if len(tokens):
                each.forward(tokens, **({"last_only": True} if each is self.mine else {}))
        self._depth = depth

    def calls(self, parts: list[Array]) -> dict[str, Callable[[], None]]:
        """For each a call that appends tokens behind the depth, part after part."""

        def mine() -> None:
            self.mine.truncate(self._depth)
            for part in parts:
                self.mine.forward(part, last_only=True)

        def peer(llama: Any) -> None:
            llama.truncate(self._depth)
            for part in parts:
                llama.forward(part)

        return {"qattn": mine} | {name: lambda llama=llama: peer(llama) for name, llama in self.theirs.items()}

    def difference(self) -> float:
        """How far apart the logits behind a prompt are: the normalized mean squared error of the closest peer's."""
        tokens, errors = self.tokens(64), []
        self.mine.truncate(self._depth)
        logits = self.mine.forward(tokens, last_only=True)[0].astype(np.float64)
        for llama in self.theirs.values():
            llama.truncate(self._depth)
            llama.forward(tokens)
            errors.append(np.square(llama.logits() - logits).sum() / np.square(logits).sum())
        return float(min(errors))

    def close(self) -> None:
        for llama in self.theirs.values():
            llama.close()
