"""Caches on a GPU do what those on a CPU do, page tables and edits included."""

import numpy as np
import pytest

from qattn import CacheError, KVCache, KVCacheParams, PagedKVCache, attention, cache_types
from qattn.cuda import attention as cuda_attention
from qattn.kv_cache import sequences
from tests.reference import nmse
from tests.strategies import normal
from tests.test_kv_files import forged
from tests.test_kv_machine import HIDDEN, PARAMS, ROPE, layer


def test_a_layer_with_a_paged_cache(cupy):
    attn, here = layer(devices=["cuda:0"]), layer()
    there, cache = PagedKVCache(PARAMS, 2, pages=6, device="cuda:0"), KVCache(PARAMS, 2)
    for counts in ([130, 3], [1, 1], [5, 0]):
        offsets = np.cumsum([0, *counts])
        x = normal((sum(counts), HIDDEN), counts[0])
        got = attn(cupy.asarray(x), kv_cache=there, row_offsets=offsets)
        assert nmse(got, here(x, kv_cache=cache, row_offsets=offsets)) < 1e-10
    for each in (there, cache):
        each.fork(0, 1)
        each.remove(1, 2, 100)
        each.shift(1, 2, None, -98, ROPE)
    assert there.free_pages == 3  # two pages, and a copy of the first for the other sequence
    x = normal((2, HIDDEN), 7)
    got = attn(cupy.asarray(x), kv_cache=there, row_offsets=[0, 1, 2])
    assert nmse(got, here(x, kv_cache=cache, row_offsets=[0, 1, 2])) < 1e-10
    assert there.lengths.tolist() == cache.lengths.tolist() == there.counts.tolist() == [137, 39]
    assert there.defragment() >= 0 and all(nmse(*pair) < 1e-10 for pair in zip(there.read(), cache.read(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
@pytest.mark.parametrize("paged", [False, True])
def test_sequences_are_edited_as_on_a_cpu(cupy, dtype, paged):
    params = KVCacheParams(2, 8, dtype=dtype)
    there, here = (
        PagedKVCache(params, 3, pages=12, device=device) if paged else KVCache(params, 3, device=device)
        for device in ("cuda:0", "cpu")
    )
    for cache in (there, here):
        cache.append(normal((200, 2, 8)), normal((200, 2, 8), 1), 0)
        cache.append(normal((90, 2, 8), 2), normal((90, 2, 8), 3), 2)
        cache.copy(0, 1, 0, 150)
        cache.divide(1, 10, 140, 4, ROPE)
        cache.remove(0, 20, 60)
        cache.shift(0, 20, None, -40, ROPE)
    for s in range(3):
        assert np.array_equal(there.positions(s), here.positions(s))
        assert all(nmse(*pair) < 1e-4 for pair in zip(there.read(s), here.read(s), strict=True))
    for cache in (there, here):
        cache.keep(1)
    assert there.lengths.tolist() == there.counts.tolist() == here.lengths.tolist() == [0, 150, 0]


def test_saved_there_and_loaded_there(cupy, tmp_path):
    there = PagedKVCache(KVCacheParams(2, 8, dtype="bfloat16"), 2, pages=6, device="cuda:0")
    there.append(normal((200, 2, 8)), normal((200, 2, 8), 1), 1)
    there.save(tmp_path / "file", 1)
    other = KVCache(there.params, device="cuda:0")
    other.load(tmp_path / "file")
    assert all(np.array_equal(a, b) for a, b in zip(other.read(), there.read(1), strict=True))
    assert other.counts.tolist() == [200]


@pytest.mark.parametrize("dtype", [*(type_.name for type_ in cache_types.TYPES), "q8_0/q4_0"])
def test_saved_on_one_device_and_loaded_on_another(cupy, dtype, tmp_path, monkeypatch):
    """To round what was rounded gives the same bits, so that a file that has travelled is what it was."""
    monkeypatch.setattr(sequences, "_PIECE", 64)
    params, path = KVCacheParams(2, 40, 24, dtype=dtype), tmp_path / "file"
    here, there = KVCache(params, 2), PagedKVCache(params, 2, pages=6, device="cuda:0")
    here.append(normal((150, 2, 40)), normal((150, 2, 24), 1), 1)
    here.save(path, 1)
    there.load(path, 0)
    there.save(tmp_path / "back", 0)
    here.load(tmp_path / "back", 0)
    assert there.counts.tolist() == [150, 0]
    for cache in (there, here):
        assert all(np.array_equal(a, b) for a, b in zip(cache.read(0), here.read(1), strict=True))


def test_a_window_and_positions_travel(cupy, tmp_path):
    params, x = KVCacheParams(2, 8, hadamard=True), normal((600, 2, 16))
    there = PagedKVCache(params, pages=8, window=100, device="cuda:0")
    for i in range(0, 600, 150):
        there.append(x[i : i + 150, :, :8], x[i : i + 150, :, 8:])
    there.shift(0, int(there.starts[0]), None, 7, None)
    there.save(tmp_path / "file")
    here = PagedKVCache(params, pages=8, window=100)
    here.load(tmp_path / "file")
    start = int(here.starts[0])
    assert start > 0 and np.array_equal(here.positions(), there.positions())
    assert all(nmse(*pair) < 1e-7 for pair in zip(here.read(0, start), there.read(0, start), strict=True))


def test_a_start_within_a_tile_is_refused(cupy, tmp_path):
    there = KVCache(KVCacheParams(2, 8), device="cuda:0")
    there.append(normal((60, 2, 8)), normal((60, 2, 8), 1))
    there.save(tmp_path / "file")

    def later(description):
        return description | {"sequences": [{"start": 5, "length": 60}]}

    (tmp_path / "file").write_bytes(forged((tmp_path / "file").read_bytes(), later, cut=5 * 2 * 2 * 16 * 2))
    with pytest.raises(CacheError, match="begins at token 5"):
        PagedKVCache(there.params, pages=2, window=20).load(tmp_path / "file")


@pytest.mark.parametrize(
    ("dtype", "hadamard"), [("q8_0/q4_0", False), ("q5_1", True), ("float16/iq4_nl", False), ("float8", True)]
)
def test_codes(cupy, dtype, hadamard):
    """Rounding to codes magnifies the last bit in which devices may differ."""
    params, outs, kept = KVCacheParams(PARAMS.n_kv_heads, PARAMS.head_dim, dtype=dtype, hadamard=hadamard), [], []
    for device in ("cpu", "cuda:0"):
        attn, made = layer(devices=[device], kv_params=params), []
        cache = PagedKVCache(params, 2, pages=6, device=device)
        for counts in ([130, 3], [1, 1], [5, 0]):
            x = normal((sum(counts), HIDDEN), counts[0])
            given = x if device == "cpu" else cupy.asarray(x)
            made.append(attn(given, kv_cache=cache, row_offsets=np.cumsum([0, *counts])))
            cache.fork(0, 1)
            cache.remove(1, 2, 100)
            cache.shift(1, 2, None, -98, ROPE)
        outs.append(np.concatenate([np.asarray(each if device == "cpu" else each.get()) for each in made]))
        kept.append(cache.read(1))
    assert nmse(outs[1], outs[0]) < 1e-4
    assert all(nmse(*pair) < 1e-4 for pair in zip(*kept, strict=True))


def test_a_cascade(cupy):
    q, pair = normal((4, 4, 8)), (normal((260, 2, 8), 1), normal((260, 2, 8), 2))
    outs = []
    for device in ("cpu", "cuda:0"):
        cache = PagedKVCache(PARAMS, 3, pages=8, cascade=True, device=device)
        cache.append(*pair)
        cache.fork(0, 1)
        cache.fork(0, 2)
        cache.append(*(each[:3] for each in pair), 1)
        outs.append(attention(cupy.asarray(q) if device != "cpu" else q, cache, row_offsets=[0, 1, 3, 4]))
    assert nmse(outs[1], outs[0]) < 1e-10


def test_a_layer_may_cascade(cupy, monkeypatch):
    attn, x, outs, calls = layer(devices=["cuda:0"]), cupy.asarray(normal((260, HIDDEN))), [], []
    inner = cuda_attention.attend
    monkeypatch.setattr(cuda_attention, "attend", lambda *arguments: calls.append(1) or inner(*arguments))
    for cascading in (False, True):
        cache = PagedKVCache(PARAMS, 2, pages=6, cascade=cascading, device="cuda:0")
        attn(x, kv_cache=cache, row_offsets=[0, 260, 260])
        cache.fork(0, 1)
        calls.clear()
        outs.append(attn(x[:3], kv_cache=cache, row_offsets=[0, 1, 3]))
        assert len(calls) == 1 + cascading
        assert cache.lengths.tolist() == cache.counts.tolist() == [261, 262]
    assert 0 < nmse(outs[1], outs[0]) < 1e-11
