"""String arrays of a GGUF header: a vocabulary of 10^5 strings, which most who open a file never read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload


def decode(data: memoryview) -> str:
    """Decode UTF-8; a byte that isn't shows as ``\\xff``, so that one bad token makes no file unreadable."""
    return str(data, "utf-8", "backslashreplace")


class StringArray(Sequence[str]):
    """The strings of an array in a file, decoded on access.  A slice is a list; a pickle keeps a list."""

    def __init__(self, data: memoryview, starts: array[int]) -> None:
        self._data = data
        self._starts = starts  # where the length of each lies; the text follows it

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._string(start) for start in self._starts[index]]
        return self._string(self._starts[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._string, self._starts)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, (StringArray, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(mine == yours for mine, yours in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"[{shown}]" if len(self) <= 3 else f"[{shown}, ...] ({len(self)} strings)"

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def _string(self, start: int) -> str:
        text = start + 8
        return decode(self._data[text : text + int.from_bytes(self._data[start:text], "little")])
