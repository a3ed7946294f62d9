"""Where compiled kernels are kept on disk."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import numba
from numba.misc.appdirs import AppDirs


def directory(name: str) -> str | None:
    """A directory of that name in the first of three places that this user alone can write, or None.

    ``NUMBA_CACHE_DIR``, then the user's cache directory, then a private folder among the temporary files.
    """
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
