"""What can go wrong, by name.  A wrong shape is a plain ``ValueError``, a missing file an ``OSError``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class QattnError(Exception):
    """The base of every error that qattn defines."""


class FormatError(QattnError, ValueError):
    """A tensor format is unknown, or does not allow what was asked of it."""


class GGUFError(QattnError, ValueError):
    """The content of a GGUF file is damaged, or breaks the rules of the file format."""


class DeviceError(QattnError, ValueError):
    """An array lives on a device where it cannot be used, or two arrays live on different ones."""


class CacheError(QattnError, ValueError):
    """A KV cache was read past its end, or is too small for what should be written."""


class MissingExtraError(QattnError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"{package} is not installed; get it with: pip install 'qattn[{extra}]'")
        self.extra = extra
        self.package = package

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return MissingExtraError, (self.extra, self.package)


@contextlib.contextmanager
def of_file(path: Any, layer: int) -> Iterator[None]:
    """Errors about values that come from a file, and not from the caller, say so: they become GGUFErrors."""
    try:
        yield
    except QattnError:
        raise
    except (ValueError, KeyError, IndexError, ArithmeticError) as error:
        raise GGUFError(f"{path}, layer {layer}: {error.args[0]}") from None
