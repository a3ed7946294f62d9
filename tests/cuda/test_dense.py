"""Products by cuBLAS, and how the faster of two ways is found."""

import sys
import types

import numpy as np
import pytest

import qattn
from qattn.backends import cuda
from qattn.cuda import dense, tuning
from tests.reference import nmse
from tests.strategies import normal, random_weights

BF16_NMSE = 5e-5  # both factors rounded to 8 bits of precision, and sums that cancel


@pytest.fixture
def cublas(cupy, monkeypatch):
    """CuPy with a cuBLAS, and nothing measured yet."""
    if cupy.__name__ != "cupy":
        libs = types.ModuleType("cupy_backends.cuda.libs")
        libs.cublas = cupy.cublas
        for name in ("cupy_backends", "cupy_backends.cuda"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, libs.__name__, libs)
        monkeypatch.setitem(sys.modules, f"{libs.__name__}.cublas", cupy.cublas)
    monkeypatch.setattr(dense, "available", lambda: True)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_ROUNDS", 1)
    return cupy


@pytest.mark.parametrize("formats", [["Q4_0"], ["Q4_K", "Q6_K", "Q4_K"]])
def test_a_product_by_cublas(cublas, formats):
    w = qattn.QuantArray.stack([random_weights(name, 21, 256, seed=i) for i, name in enumerate(formats)])
    matrix, x = qattn.PackedMatrix(w).to("cuda:0"), normal((5, 256))
    x[2] *= 1e30  # too large for float16
    out = cublas.full((5, len(w)), 7, np.float32)
    cuda._multiply_dense(cublas.asarray(x), matrix, out)
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    assert all(nmse(*rows) < BF16_NMSE for rows in zip(out.get(), want, strict=True))


def ways(monkeypatch, seconds):
    """The names of those that are called, each of which takes so long on a clock of the test."""
    called, clock = [], [0.0]

    def make(name):
        def way():
            called.append(name)
            clock[0] += seconds[name]

        return way

    monkeypatch.setattr("tests.emulated_cupy.time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    return called, {name: make(name) for name in seconds}


def test_the_fastest_is_found_once(cublas, monkeypatch):
    if cublas.__name__ == "cupy":
        pytest.skip("a GPU's events have a clock of their own")
    called, three = ways(monkeypatch, {"slow": 3.0, "fast": 1.0, "lame": 2.0})
    tuning.run_fastest("key", three)
    assert called[-1] == "fast" and set(called) == set(three)
    called.clear()
    tuning.run_fastest("key", three)
    assert called == ["fast"]
    tuning.run_fastest("other", three)
    assert called.count("slow") == 2


def test_what_finds_no_memory_is_left(cublas, monkeypatch):
    called, two = ways(monkeypatch, {"small": 3.0, "large": 1.0})

    def too_large():
        raise cublas.cuda.memory.OutOfMemoryError

    tuning.run_fastest("key", {"small": two["small"], "large": too_large})
    assert called[-1] == "small" and list(tuning._known.values()) == ["small"]
    tuning._known.clear()
    tuning.run_fastest("key", two)
    assert list(tuning._known.values()) == ["large"]
    tuning.run_fastest("key", {"small": two["small"], "large": too_large})
    assert called[-1] == "small" and list(tuning._known.values()) == ["small"]


def test_nothing_is_measured_while_kernels_are_recorded(cublas, monkeypatch):
    called, two = ways(monkeypatch, {"slow": 3.0, "fast": 1.0})
    with cuda.Program().recording():
        tuning.run_fastest("key", two)
    stream = cublas.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        tuning.run_fastest("key", two)
        stream.end_capture()
    assert called == ["slow", "slow"] and not tuning._known


def test_many_tokens_take_the_faster_way(cublas, monkeypatch):
    monkeypatch.setattr(dense, "FEWEST", 20)
    w = random_weights("Q4_0", 21, 64)
    there, x = w.to("cuda:0"), normal((20, 64))
    int8 = qattn.matmul(cublas.asarray(x), there, precision="int8").get()
    assert not tuning._known
    few = qattn.matmul(cublas.asarray(x[:19]), there).get()
    assert np.array_equal(few, int8[:19]) and not tuning._known
    for way in ("dense", "packed"):
        monkeypatch.setattr(tuning, "min", lambda times, key, way=way: way, raising=False)
        tuning._known.clear()
        got = qattn.matmul(cublas.asarray(x), there).get()
        assert list(tuning._known.values()) == [way]
        assert np.array_equal(got, int8) == (way == "packed") and nmse(got, int8) < 1e-3


def test_floats_and_what_is_large_stay_packed(cublas, monkeypatch):
    layouts = {
        name: [qattn.PackedMatrix(random_weights(name, 4, 32)).parts[0].layout] for name in ("Q4_0", "F16", "F32")
    }
    assert dense.fits(256, (4096, 4096), layouts["Q4_0"]) and not dense.fits(255, (4096, 4096), layouts["Q4_0"])
    assert not any(dense.fits(256, (4096, 4096), layouts[name]) for name in ("F16", "F32"))
    assert not dense.fits(256, (1 << 20, 4096), layouts["Q4_0"])


def test_without_cublas_nothing_is_tried(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy_backends", None)
    dense.available.cache_clear()
    assert not dense.available()
    dense.available.cache_clear()
