"""A prefix sees itself as a whole, and what follows it is causal."""

from __future__ import annotations

from typing import NamedTuple

from qattn.masks._registry import register


@register("prefix_lm")
class PrefixLM(NamedTuple):
    """A query at position q sees keys k <= q, and the first `prefix` keys whatever its own position.

    The prefix has to come in one call: tokens don't see what comes later.
    """

    prefix: int

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return 0, max(self.prefix, query + 1)
