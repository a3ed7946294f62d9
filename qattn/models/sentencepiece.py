"""SentencePiece-style BPE, as Llama 2, Mistral and Gemma have it: characters are merged, spaces included.

There are no merge rules: of all neighbours that together make a token, those of the best score are merged first, the
leftmost of equals.  A character that is no token becomes the tokens of its UTF-8 bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

SPACE = "▁"  # how vocabularies write a space


class SentencePieceBPE:
    """Text to tokens by scores.

    Parameters
    ----------
    scores : mapping of str to float
        The tokens that text can become; higher is merged earlier.
    ids : mapping of str to int
        Their numbers, and those of the byte tokens ``<0x00>`` to ``<0xFF>``.
    unknown : int or None
        What a character becomes that has no token and no byte tokens; None leaves it out.
    """

    def __init__(self, scores: Mapping[str, float], ids: Mapping[str, int], unknown: int | None) -> None:
        self._scores = scores
        self._ids = ids
        self._bytes = [ids.get(f"<0x{byte:02X}>", unknown) for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens."""
        tokens = []
        for piece in merge(text.replace(" ", SPACE), self._scores):
            if piece in self._scores:
                tokens.append(self._ids[piece])
            else:
                tokens.extend(token for byte in piece.encode() if (token := self._bytes[byte]) is not None)
        return tokens


def merge(text: str, scores: Mapping[str, float]) -> list[str]:
    """Merge neighbours, best score first, until no two make a token.  Cost: n log n for n characters."""
    pieces = list(text)
    right_of = [*range(1, len(pieces)), -1]
    left_of = list(range(-1, len(pieces) - 1))
    candidates: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            joined = pieces[left] + pieces[right]
            score = scores.get(joined)
            if score is not None:
                heapq.heappush(candidates, (-score, left, right, joined))

    for right in range(1, len(pieces)):
        offer(right - 1, right)
    while candidates:
        _, left, right, joined = heapq.heappop(candidates)
        if right_of[left] != right or pieces[left] + pieces[right] != joined:
            continue  # one of the two has been merged with another since
        pieces[left], pieces[right] = joined, ""
        following = right_of[left] = right_of[right]
        right_of[right] = -1
        if following >= 0:
            left_of[following] = left
        offer(left_of[left], left)
        offer(left, following)
    return [piece for piece in pieces if piece]


def token_bytes(token: str) -> bytes:
    """Return the bytes that an ordinary token stands for."""
    return token.replace(SPACE, " ").encode(errors="replace")
