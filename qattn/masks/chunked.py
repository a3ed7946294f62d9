"""A query sees what came before it in its own chunk: Llama 4's local layers."""

from __future__ import annotations

from typing import NamedTuple

from qattn.masks._registry import register


@register("chunked_causal")
class Chunked(NamedTuple):
    """A query at position q sees keys k <= q with k // chunk == q // chunk."""

    chunk: int

    @property
    def span(self) -> int:
        return self.chunk

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return query - query % self.chunk, query + 1
