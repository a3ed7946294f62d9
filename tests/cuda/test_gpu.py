"""On a GPU alone: sizes that would take the emulator hours, and that it agrees with the GPU.  ``pytest -m gpu``."""

import sys

import numpy as np
import pytest

import qattn
from tests import emulated_cupy
from tests.reference import nmse
from tests.strategies import normal, random_weights
from tests.test_layer import layer

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("CuPy finds no GPU")
    return cupy


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ2_XXS"])
def test_large_matrices(gpu, name):
    w = random_weights(name, 4096 + 7, 4096)
    packed = qattn.PackedMatrix(w)
    there = packed.to("cuda:0")
    np.testing.assert_array_equal(gpu.asnumpy(qattn.dequantize(w.to("cuda:0"))), np.asarray(w))
    np.testing.assert_array_equal(gpu.asnumpy(qattn.dequantize(there)), np.asarray(w))
    for tokens in (1, 8, 16, 700):
        x = normal((tokens, 4096), tokens)
        assert nmse(gpu.asnumpy(qattn.matmul(gpu.asarray(x), there)), qattn.matmul(x, packed, precision="int8")) < 1e-9


@pytest.mark.parametrize("cache", ["float16", "bfloat16", "float32"])
def test_long_contexts(gpu, cache):
    there, here = (layer(cache=cache, devices=[device]) for device in ("cuda:0", "cpu"))
    for tokens in (3000, 1, 1, 500, 1):
        x = normal((tokens, there.hidden_size), tokens)
        assert nmse(gpu.asnumpy(there(gpu.asarray(x))), here(x)) < 1e-4


def test_the_emulator_agrees(gpu, monkeypatch):
    w, x = random_weights("Q4_K", 40, 512), normal((20, 512))

    def results(cupy):
        packed, there = qattn.PackedMatrix(w).to("cuda:0"), layer(devices=["cuda:0"])
        hidden = normal((9, there.hidden_size))
        return [
            cupy.asnumpy(qattn.dequantize(w.to("cuda:0"))),
            cupy.asnumpy(qattn.matmul(cupy.asarray(x), packed)),
            cupy.asnumpy(there(cupy.asarray(hidden))),
        ]

    real = results(gpu)
    monkeypatch.setitem(sys.modules, "cupy", emulated_cupy)
    emulated = results(emulated_cupy)
    np.testing.assert_array_equal(real[0], emulated[0])
    for mine, its in zip(real, emulated, strict=True):
        assert nmse(mine, its) < 1e-6
