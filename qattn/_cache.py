"""Where compiled kernels are kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

import numba
from numba.misc.appdirs import AppDirs

_PACKAGE = Path(__file__).parent
COMPILED_IN = (
    "_meaning.py", "batch.py", "cache_types.py", "layout.py", "logits.py", "preparation.py",
    "formats/*.py", "masks/*.py", "rope/*.py",
)  # fmt: skip


def directory(folder: str, *made_by: object) -> str | None:
    """Where machine code of the package's `folder` is kept, or None.

    It depends on what the code is `made_by`, and on the sources of the folder and of all that becomes part of kernels.
    It is in the first of three places that this user alone can write: ``NUMBA_CACHE_DIR``, then the user's cache
    directory, then a private folder among the temporary files.
    """
    digest = hashlib.sha256(repr(made_by).encode())
    for pattern in (f"{folder}/*.py", *COMPILED_IN):
        for source in sorted(_PACKAGE.glob(pattern)):
            digest.update(source.read_bytes())
    name = f"{folder}-{digest.hexdigest()[:16]}"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    roots = [
        numba.config.CACHE_DIR,
        AppDirs(appname="qattn", appauthor=False).user_cache_dir,
        os.path.join(tempfile.gettempdir(), f"qattn-{user}"),
    ]
    for root in filter(None, roots):
        path = os.path.join(root, name)
        if _private(root) and _private(path):
            return path
    return None


@functools.cache
def temporary() -> str:
    """A directory for this process alone, for where no other can be had."""
    return tempfile.mkdtemp(prefix="qattn-")


def write(path: Path, text: str) -> None:
    """Write a file in one step, so that other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _private(path: str) -> bool:
    """Make a directory, and tell whether we can write it and nobody else owns it (its files are unpickled)."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return not hasattr(os, "getuid") or os.stat(path).st_uid == os.getuid()
    except OSError:
        return False
