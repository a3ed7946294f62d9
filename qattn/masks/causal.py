"""A query sees itself and what came before."""

from __future__ import annotations

from typing import NamedTuple

from qattn.masks._registry import register


@register("causal")
class Causal(NamedTuple):
    """A query at position q sees keys k <= q."""

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return 0, query + 1
