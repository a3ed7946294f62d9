"""Products and attention in tile registers: on a CPU that has them, elsewhere by the loops that stand for them."""

from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llvmlite import ir

import qattn
from qattn.cpu import amx_matmul, attend_tiles
from qattn.cpu.amx import tiles
from qattn.cpu.simd import Value, micro_kernel
from qattn.cpu.target import TARGET, _has_amx
from tests import reference
from tests.reference import nmse
from tests.strategies import BLOCK_FORMATS, normal, random_weights, weights

BF16_NMSE = 1e-5  # both factors rounded to 8 bits, by up to 2**-9 of them
FORMATS = BLOCK_FORMATS if TARGET.amx else ("Q4_0", "Q6_K", "IQ2_XXS")  # the loops compile slowly


@pytest.fixture(autouse=True)
def with_tiles(monkeypatch):
    for module in (amx_matmul, attend_tiles):
        monkeypatch.setattr(module, "TARGET", TARGET._replace(amx=True))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_multiplies(name):
    w, x = random_weights(name, 37, 512), normal((41, 512))
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    assert 0 < nmse(qattn.matmul(x, w), want) < BF16_NMSE  # products in int8 are farther off


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(w=weights(("Q4_0", "Q6_K", "IQ2_XXS")), tokens=st.integers(40, 80), seed=st.integers(0, 99))
def test_products_agree_with_float64_at_any_shape(w, tokens, seed):
    x = normal((tokens, w.shape[1]), seed)
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(np.asarray(w, np.float64)).T
    assert (np.abs(qattn.matmul(x, w) - want) <= 2.0**-7 * scale + 1e-30).all()


def test_weights_of_several_formats_and_floats_go_where_they_belong():
    rows = {"Q4_0": 5, "F32": 3, "Q6_K": 70, "BF16": 40}
    w = np.concatenate([random_weights(name, count, 256) for name, count in rows.items()])
    x = normal((50, 256))
    assert nmse(qattn.matmul(x, w), x.astype(np.float64) @ np.asarray(w, np.float64).T) < BF16_NMSE


@pytest.mark.parametrize("columns", [64, 70])
def test_bfloat16_weights_are_not_rounded(columns):
    w, x = random_weights("BF16", 37, columns), normal((45, columns))
    x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # nor are such activations
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    assert nmse(qattn.matmul(x, w), want) < 1e-11


def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads():
    w, x = random_weights("Q4_0", 300, 512), normal((77, 512))
    whole, before = qattn.matmul(x, w), qattn.get_num_threads()
    assert np.array_equal(qattn.matmul(x[:40], w), whole[:40])
    try:
        qattn.set_num_threads(1)
        assert np.array_equal(qattn.matmul(x[20:], w), whole[20:])
    finally:
        qattn.set_num_threads(before)


@pytest.mark.parametrize(("columns", "cache"), [(64, 1 << 20), (96, 3 * 1024), (160, 9 * 1024)])
def test_chunks_and_pieces_of_weights_are_put_together(columns, cache, monkeypatch):
    """As for thousands of columns, and more weights than a cache holds."""
    w, x = random_weights("Q4_0", 16 * 9 + 5, columns), normal((70, columns))
    want = qattn.matmul(x, w)
    monkeypatch.setattr(amx_matmul, "_CHUNK", 2)
    monkeypatch.setattr(amx_matmul, "_CACHE", cache)
    (part,), rounded, out = qattn.PackedMatrix(w).parts, amx_matmul.room(*x.shape), np.zeros_like(want)
    amx_matmul.round_rows(x, rounded)
    run = amx_matmul.product.__wrapped__(part.layout)
    run._kept = False
    run(part.packed, rounded, out)
    assert np.array_equal(out, want)


def test_a_row_with_nan_or_infinity_gives_nan_and_spoils_no_other():
    w, x = random_weights("Q4_0", 20, 128), normal((40, 128))
    want = qattn.matmul(x, w)
    x[0, 5], x[2, 100] = np.nan, np.inf
    got = qattn.matmul(x, w)
    assert np.isnan(got[[0, 2]]).all()
    keep = np.delete(np.arange(40), [0, 2])
    assert np.array_equal(got[keep], want[keep])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 70),
    before=st.integers(0, 300),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    dims=st.tuples(*[st.sampled_from([1, 20, 32, 65, 80, 128])] * 2),
)
def test_attention_agrees_with_float64(tokens, before, kv_heads, group, dims):
    (dim, value_dim), keys = dims, before + tokens
    k, v = normal((keys, kv_heads, dim), 1), normal((keys, kv_heads, value_dim), 2)
    q = normal((tokens, kv_heads * group, dim), 3)
    cache = qattn.KVCache(qattn.KVCacheParams(kv_heads, dim, value_dim=value_dim))
    cache.append(k, v)
    got, lse = qattn.attention(q, cache, scale=dim**-0.5, precision="int8", return_lse=True)
    seen = reference.causal(tokens, keys)
    want, want_lse = reference.attention(q, k, v, dim**-0.5, seen)
    sizes, _ = reference.attention(q, k, np.abs(v), dim**-0.5, seen)  # a sum of such values may be anything, down to 0
    assert (np.abs(got - want) <= 0.04 * sizes).all()
    assert np.abs(lse - want_lse).max() < 0.05


def test_what_lies_beyond_the_keys_is_not_seen():
    """A cache may hold anything where no key is, or where another sequence's is."""
    k, v, q = normal((20, 1, 40), 1), normal((20, 1, 40), 2), normal((9, 2, 40), 3)
    caches = [qattn.KVCache(qattn.KVCacheParams(1, 40)) for _ in range(2)]
    for cache in caches:
        cache.append(k, v)
    caches[1].append(np.full((90, 1, 40), 1e30, np.float32), np.full((90, 1, 40), 1e30, np.float32))
    caches[1].truncate(20)
    one, other = (qattn.attention(q, cache, precision="int8") for cache in caches)
    assert np.isfinite(one).all() and np.array_equal(one, other)


def test_registers_are_used_where_the_cpu_has_them_and_the_system_permits_it():
    assert not _has_amx({"amx-tile", "avx512bf16"})
    if _has_amx({"amx-tile", "amx-bf16", "avx512bf16"}):
        assert "amx_bf16" in Path("/proc/cpuinfo").read_text()


@micro_kernel
def _shape(e, before, after):
    """Shape the registers as another library would, and tell what they are after they were used here."""
    nothing, (first, second) = ir.VoidType(), (Value(e, there.ir) for there in (before, after))
    e.intrinsic("llvm.x86.ldtilecfg", nothing, first)
    with tiles(e, e.constant(3, e.I64)) as registers:
        registers[0].clear()
    e.intrinsic("llvm.x86.sttilecfg", nothing, second)
    e.intrinsic("llvm.x86.tilerelease", nothing)


@pytest.mark.skipif(not TARGET.amx, reason="there are no tile registers")
def test_the_registers_are_left_as_they_were_found():
    before, after = np.zeros((2, 64), np.uint8)
    before[0], before[16:32:2], before[48:56] = 1, 32, 7
    numba.njit(lambda a, b: _shape((a, b)))(before, after)
    assert np.array_equal(before, after)
