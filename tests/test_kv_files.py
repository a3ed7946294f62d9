"""Saved caches: what comes back, and what is refused."""

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qattn import CacheError, KVCache, KVCacheParams, PagedKVCache
from tests.strategies import normal
from tests.test_kv_sequences import TYPES, equal, filled, paged

SMALL = KVCacheParams(2, 4, 3, dtype="float32")


def saved(path, *lengths, **options):
    cache, _ = filled(KVCache, SMALL, *lengths)
    cache.save(path, **options)
    return path.read_bytes()


def forged(data, change, cut=0):
    """The file with another description, maybe less at its end, and the right digest."""
    length = int(np.frombuffer(data[12:16], "<u4")[0])
    text = json.dumps(change(json.loads(data[16 : 16 + length]))).encode()
    body = data[:12] + np.array(len(text), "<u4").tobytes() + text + data[16 + length : -16 - cut]
    return body + hashlib.blake2b(body, digest_size=16).digest()


@settings(max_examples=40)
@given(
    kinds=st.tuples(st.sampled_from([KVCache, paged]), st.sampled_from([KVCache, paged])),
    dtype=st.sampled_from([*TYPES, "q8_0/q4_0"]),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path_factory, kinds, dtype, lengths):
    params, path = KVCacheParams(2, 40, 24, dtype=dtype), tmp_path_factory.mktemp("saved") / "cache.kv"
    cache, pairs = filled(kinds[0], params, *lengths)
    cache.shift(0, 0, None, 7, None)
    cache.save(path)
    other, _ = filled(kinds[1], params, *[5] * len(lengths))
    other.load(path)
    assert other.lengths.tolist() == lengths and all(equal(other.read(s), pair) for s, pair in enumerate(pairs))
    assert np.array_equal(other.positions(), np.arange(lengths[0]) + 7)
    other.save(path, overwrite=True)
    assert path.read_bytes() == path.with_name("cache.kv").read_bytes()
    one, _ = filled(kinds[1], params, 3, 4)
    cache.save(path, len(lengths) - 1, overwrite=True)
    one.load(path, 1)
    assert equal(one.read(1), pairs[-1]) and one.lengths[0] == 3
    kv = normal((1, 2, 64))
    one.append(kv[..., :40], kv[..., 40:], 1)  # what lies behind is clean
    assert one.lengths[1] == lengths[-1] + 1


def test_a_file_says_nothing_of_sequences_that_are_not_in_it(tmp_path):
    cache, _ = filled(paged, SMALL, 100, 0)
    cache.fork(0, 1)
    cache.truncate(37, 1)
    cache.save(tmp_path / "shared", 1)
    alone, _ = filled(paged, SMALL, 37)
    alone.save(tmp_path / "alone")
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_window_is_saved_and_needs_one(tmp_path):
    cache = PagedKVCache(SMALL, pages=8, window=100)
    for seed in range(4):
        kv = normal((150, 2, 7), seed)
        cache.append(kv[..., :4], kv[..., 4:])
    assert cache.starts.tolist() == [256]
    cache.save(tmp_path / "window")
    for other in (PagedKVCache(SMALL, pages=8, window=100), PagedKVCache(SMALL, pages=8, page_size=256, window=60)):
        other.load(tmp_path / "window")
        assert equal(other.read(0, 256), cache.read(0, 256)) and other.positions().tolist() == list(range(600))
        other.append(kv[..., :4], kv[..., 4:])
    for other, needed in ((KVCache(SMALL), 0), (paged(SMALL), 0), (PagedKVCache(SMALL, pages=8, window=400), 201)):
        message = f"what was saved begins at token 256, since a window .* this cache needs those from {needed} on"
        with pytest.raises(CacheError, match=message):
            other.load(tmp_path / "window")
        assert len(other) == 0


def test_no_room_leaves_the_cache_as_it_was(tmp_path):
    saved(tmp_path / "file", 300)
    cache = PagedKVCache(SMALL, 2, pages=3)
    kv = normal((140, 2, 7), 9)
    cache.append(kv[..., :4], kv[..., 4:], 0)
    before = cache.read(0)
    with pytest.raises(CacheError, match="3 more pages of 128 tokens are needed, and 1 of 3 are free"):
        cache.load(tmp_path / "file", 1)
    assert equal(cache.read(0), before)
    cache.load(tmp_path / "file", 0)  # its own two pages count
    assert cache.lengths.tolist() == [300, 0]
    short = KVCache(KVCacheParams(2, 4, 3, dtype="float32", max_length=200))
    with pytest.raises(CacheError, match="sequence 0 would have 300 tokens, but the cache holds at most 200"):
        short.load(tmp_path / "file")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data = saved(path, 20)
    with pytest.raises(FileExistsError, match="file exists; say overwrite=True to replace it"):
        saved(path, 30)
    assert path.read_bytes() == data

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        saved(path, 30, overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == data and os.listdir(tmp_path) == ["file"]
    assert saved(path, 30, overwrite=True) != data and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes are POSIX's")
def test_a_file_stays_what_it_was(tmp_path):
    path, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    saved(path, 20)
    path.chmod(0o600)
    link.symlink_to(path)
    saved(link, 30, overwrite=True)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    KVCache(SMALL).load(os.fsencode(link))
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="pipe is no regular file, and is not replaced"):
        saved(pipe, 30, overwrite=True)
    with pytest.raises(CacheError, match="pipe is no regular file"):
        KVCache(SMALL).load(pipe)
    cache, _ = filled(KVCache, SMALL, 7)
    cache.save(os.fsencode(tmp_path / ("n" * 250)))
    assert (tmp_path / ("n" * 250)).exists()


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path, fsync = tmp_path / "file", os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (path.write_text("mine"), fsync(file)))
    with pytest.raises(FileExistsError):
        saved(path, 20)
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", fail)
    saved(tmp_path / "file", 20)
    assert os.listdir(tmp_path) == ["file"]


@settings(max_examples=200)
@given(data=st.data())
def test_damage_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    good = saved(folder / "good", 20, overwrite=True)
    at = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[at] ^= data.draw(st.integers(1, 255))
    shorter, longer = good[:at], good + bytes(data.draw(st.integers(1, 40)))
    cache, [before] = filled(KVCache, SMALL, 7)
    for each in (bytes(changed), shorter, longer):
        (folder / "bad").write_bytes(each)
        with pytest.raises(CacheError, match=r"is damaged|is no saved cache|has version"):
            cache.load(folder / "bad")
    assert equal(cache.read(), before)


def _changed(**changes):
    return lambda description: description | changes


FORGERIES = [
    (lambda d: [], "is no saved cache"),
    (lambda d: {k: v for k, v in d.items() if k != "entries"}, "is no saved cache: 'entries'"),
    (_changed(sequences=[{"start": 0, "length": 10**15}]), "its sequences are longer than the file"),
    (_changed(sequences=[{"start": 0, "length": -1}]), "-1 is no number of at least 0"),
    (_changed(sequences=[{"start": 0, "length": 3}]), "bytes are left over"),
    (_changed(sequences=[{"start": 3, "length": 20}]), "a sequence of 20 tokens begins at 3"),
    (_changed(sequences=[{"start": 32, "length": 20}]), "a sequence of 20 tokens begins at 32"),
    (_changed(sequences=[{"start": True, "length": 20}]), "True is no number of at least 0"),
    (_changed(entries=[["|O8", 2, 4]]), r"'\|O8' is no type of elements"),
    (_changed(entries=[]), "bytes are left over"),
    (_changed(step=1.5), "1.5 is no number of at least 1"),
    (_changed(params=3), "is no saved cache: no cache has params 3"),
    (lambda d: d | {"params": d["params"] | {"head_dim": 8}}, "was saved with head_dim 8"),
]


@pytest.mark.parametrize(("change", "message"), FORGERIES)
def test_a_description_that_can_not_be_is_refused(tmp_path, change, message):
    data = saved(tmp_path / "good", 20)
    (tmp_path / "bad").write_bytes(forged(data, change))
    cache, [before] = filled(KVCache, SMALL, 7)
    with pytest.raises(CacheError, match=message):
        cache.load(tmp_path / "bad")
    assert equal(cache.read(), before)


def test_what_the_file_is_not_is_said(tmp_path):
    path = tmp_path / "file"
    data = saved(path, 20, 30)
    with pytest.raises(CacheError, match="has 2 sequences; the cache has 1"):
        KVCache(SMALL).load(path)
    with pytest.raises(CacheError, match="has 2 sequences; one was asked for"):
        KVCache(SMALL).load(path, 0)
    with pytest.raises(CacheError, match="there is no sequence 5; the cache has 1"):
        KVCache(SMALL).load(path, 5)
    message = r"was saved with head_dim 4 \(the cache has 6\), dtype 'float32' \(the cache has 'float16'\)"
    with pytest.raises(CacheError, match=message):
        KVCache(KVCacheParams(2, 6, 3, dtype="float16"), 2).load(path)
    KVCache(KVCacheParams(2, 4, 3, dtype="float32", max_length=99), 2).load(path)  # how long it may get is no matter
    for other, message in (
        (b"GGUF" + data[4:], "is no saved cache: it begins with b'GGUFn-kv', not b'qattn-kv'"),
        (b"", "is no saved cache: it begins with b''"),
        (data[:8] + b"\2" + data[9:], "has version 2; this qattn reads version 1"),
        (data[:20], "is damaged: it has 20 bytes, less than a header"),
        (data[:-1], "is damaged: its checksum is wrong"),
        (forged(data, _changed(layout="Rows")), "is no saved cache: no cache has params .*, layout Rows, step 16"),
        (forged(data, _changed(layout="Stones")), "is no saved cache: no cache has params .*, layout Stones"),
    ):
        path.write_bytes(other)
        with pytest.raises(CacheError, match=message):
            KVCache(SMALL, 2).load(path)
    with pytest.raises(FileNotFoundError):
        KVCache(SMALL).load(tmp_path / "nothing")
