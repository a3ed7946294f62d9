"""The same API on a GPU: CuPy arrays in, CuPy arrays out, and clear words where something is elsewhere or missing."""

import sys
import types

import numpy as np
import pytest

import qattn
from qattn import DeviceError, devices
from qattn.models import Decoder, Model
from tests import tiny_model
from tests.reference import nmse
from tests.strategies import normal, random_weights
from tests.test_layer import KV_HEADS, layer, parameters, state

# ------------------------------------------------------------------------------------------------- which device


def pretend(monkeypatch, count=1, capability="90", error=None):
    """A host with so many GPUs."""

    class CUDARuntimeError(RuntimeError):
        pass

    def count_of():
        if error:
            raise CUDARuntimeError(error)
        return count

    runtime = types.SimpleNamespace(getDeviceCount=count_of, CUDARuntimeError=CUDARuntimeError)
    device = lambda index: types.SimpleNamespace(compute_capability=capability)  # noqa: E731
    cupy = types.ModuleType("cupy")
    cupy.cuda, cupy.ndarray = types.SimpleNamespace(runtime=runtime, Device=device), type("ndarray", (), {})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: True)


def test_names_of_devices(monkeypatch):
    pretend(monkeypatch, count=2)
    assert [devices.resolve(name) for name in ("cpu", "cuda", "cuda:1", "auto")] == [
        "cpu",
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    for wrong in ("gpu", "cuda:", "cuda:x", "", None):
        with pytest.raises(DeviceError, match="expected 'cpu', 'cuda', 'cuda:0'"):
            devices.resolve(wrong)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"count": 1}, "there are 1 GPUs, numbered from 0"),
        ({"count": 2, "capability": "75"}, "its compute capability is 7.5, and the kernels need 8.0"),
        ({"error": "cudaErrorNoDevice"}, "no driver or no GPU answers .cudaErrorNoDevice."),
    ],
)
def test_what_is_missing_is_said(monkeypatch, host, message):
    pretend(monkeypatch, **host)
    with pytest.raises(DeviceError, match=f"device 'cuda:1' can't be used: {message}"):
        devices.resolve("cuda:1")
    if host.get("count") != 1:
        assert devices.resolve("auto") == "cpu"


@pytest.mark.parametrize(("module", "package"), [("numba_cuda", "numba-cuda"), ("cupy", "CuPy")])
def test_a_missing_package_is_named(monkeypatch, module, package):
    pretend(monkeypatch)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None if name == module else True)
    with pytest.raises(DeviceError, match=rf"{package} is not installed; get it with: pip install 'qattn\[cuda\]'"):
        devices.resolve("cuda")
    assert devices.resolve("auto") == "cpu"


# ------------------------------------------------------------------------------------------------------- arrays


def test_quantized_arrays_live_on_a_gpu(cupy):
    w, x = random_weights("Q4_K", 20, 512), normal((3, 512))
    there = w.to("cuda:0")
    assert there.device == "cuda:0" and "cuda:0" in repr(there) and there.to("cuda") is there and w.to("cpu") is w
    assert isinstance(there.data, cupy.ndarray) and (there.to("cpu").data == w.data).all()
    values = qattn.dequantize(there)
    assert isinstance(values, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(values), np.asarray(w))
    np.testing.assert_array_equal(cupy.asnumpy(qattn.dequantize(there[3:7])), np.asarray(w)[3:7])
    with pytest.raises(TypeError, match=r"the weights are on cuda:0, and NumPy can't read them there; use .to"):
        np.asarray(there)
    product = qattn.matmul(cupy.asarray(x), qattn.PackedMatrix(w).to("cuda:0"))
    assert isinstance(product, cupy.ndarray) and product.shape == (3, 20)
    assert nmse(cupy.asnumpy(product), qattn.matmul(x, w)) < 1e-6
    assert nmse(cupy.asnumpy(cupy.asarray(x) @ there.T), qattn.matmul(x, w)) < 1e-6


def test_rows_out_of_range_are_refused(cupy):
    w = random_weights("Q4_0", 20, 64).to("cuda:0")
    for wrong in ([20], np.array([3, -21])):
        with pytest.raises(IndexError, match="is out of bounds for axis 0 with size 20"):
            w[wrong]
    assert w[[19, -20]].shape == (2, 64)


def test_stacks_of_formats_are_packed_and_moved(cupy):
    stack = np.concatenate(
        [random_weights("Q4_0", 5, 256), random_weights("Q6_K", 20, 256), random_weights("F16", 3, 256)]
    )
    packed = qattn.PackedMatrix(stack).to("cuda:0")
    assert packed.device == "cuda:0" and packed.nbytes == qattn.PackedMatrix(stack).nbytes and "cuda:0" in repr(packed)
    np.testing.assert_array_equal(cupy.asnumpy(qattn.dequantize(packed)), np.asarray(stack))
    np.testing.assert_array_equal(np.asarray(packed.to("cpu")), np.asarray(stack))
    with pytest.raises(TypeError, match=r"use .to"):
        np.asarray(packed)
    with pytest.raises(DeviceError, match="unpack them on the CPU"):
        packed.unpack()
    with pytest.raises(DeviceError, match=r"can't stack rows that are on cpu and cuda:0"):
        np.concatenate([stack, random_weights("Q4_0", 5, 256).to("cuda:0")])


def test_what_is_elsewhere_is_said(cupy):
    w, x = random_weights("Q4_0", 20, 64), normal((3, 64))
    with pytest.raises(DeviceError, match="x is on cuda:0, the weights are on cpu; both must be on the same"):
        qattn.matmul(cupy.asarray(x), w)
    with pytest.raises(DeviceError, match=r"x is on cpu, the weights are on cuda:0"):
        qattn.matmul(x, qattn.PackedMatrix(w).to("cuda:0"))
    with pytest.raises(ValueError, match=r"out is float32 \(3, 20\); expected a C-contiguous float32 array"):
        qattn.matmul(cupy.asarray(x), qattn.PackedMatrix(w).to("cuda:0"), out=np.empty((3, 20), np.float32))
    q, k = normal((3, 2, 16)), normal((5, 1, 16))
    with pytest.raises(DeviceError, match="k is on cpu, q is on cuda:0"):
        qattn.attention(cupy.asarray(q), k, k)


def test_arrays_that_start_anywhere_are_copied_or_refused(cupy):
    w, x = random_weights("Q4_0", 20, 64), normal((3 * 64 + 1,))
    packed, shifted = qattn.PackedMatrix(w).to("cuda:0"), cupy.asarray(x)[1:].reshape(3, 64)
    assert nmse(qattn.matmul(shifted, packed), qattn.matmul(x[1:].reshape(3, 64), w)) < 1e-6
    with pytest.raises(ValueError, match="out starts in the middle of 16 bytes"):
        qattn.matmul(shifted, packed, out=cupy.empty(61, np.float32)[1:].reshape(3, 20))


def test_arrays_of_other_libraries_are_viewed(cupy, monkeypatch):
    class Tensor:
        """An array on a GPU of a library that isn't CuPy."""

        def __init__(self, values):
            self.values = cupy.asarray(values)
            self.__cuda_array_interface__ = self.values.__cuda_array_interface__

    asarray = cupy.asarray
    monkeypatch.setattr(cupy, "asarray", lambda x, *rest: x.values if isinstance(x, Tensor) else asarray(x, *rest))
    w, x = random_weights("Q4_0", 20, 64), normal((3, 64))
    packed = qattn.PackedMatrix(w).to("cuda:0")
    out = qattn.matmul(Tensor(x), packed)
    assert isinstance(out, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(qattn.matmul(asarray(x), packed)))


def test_functions_give_what_they_give_on_a_cpu(cupy):
    q, k, v = normal((3, 4, 16)), normal((9, 2, 16), 1), normal((9, 2, 24), 2)
    out, lse = qattn.attention(*map(cupy.asarray, (q, k, v)), return_lse=True)
    want, want_lse = qattn.attention(q, k, v, return_lse=True)
    assert isinstance(out, cupy.ndarray) and nmse(out, want) < 1e-10 and nmse(lse, want_lse) < 1e-10
    rotary = qattn.RotaryEmbedding(12, pairing="neox")
    assert nmse(qattn.rope(cupy.asarray(q), 7, rotary), qattn.rope(q, 7, rotary)) < 1e-12


# ------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("cache", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_what_it_gives_on_a_cpu(cupy, cache, bias):
    there, here = (layer(bias=bias, cache=cache, devices=[device]) for device in ("cuda:0", "cpu"))
    assert there.device == "cuda:0" and there.devices == ["cuda:0"] and "cuda:0" in repr(there)
    assert isinstance(there._weights.projection._packed.parts[0].packed.codes, cupy.ndarray)
    bound = 1e-6 if cache == "float32" else 1e-4
    for tokens in (5, 1, 1, 20, 1):
        x = normal((tokens, there.hidden_size), tokens)
        got = there(cupy.asarray(x))
        assert isinstance(got, cupy.ndarray) and nmse(got, here(x)) < bound
    assert len(there.kv_cache) == len(here.kv_cache) == 28
    assert isinstance(there.kv_cache.view().keys, cupy.ndarray)
    for mine, its in zip(there.kv_cache.read(0, 3, 20), here.kv_cache.read(0, 3, 20), strict=True):
        assert type(mine) is np.ndarray and nmse(mine, its) < bound


def test_caches_on_a_gpu_are_ragged_and_forget(cupy):
    there, here = (layer(devices=[device]) for device in ("cuda:0", "cpu"))
    caches = [qattn.KVCache(a.kv_params, 3, device=a.device) for a in (there, here)]
    x = normal((9, there.hidden_size))
    for offsets in ([0, 5, 5, 9], [0, 1, 2, 3]):
        part = x[: offsets[-1]]
        got = there(cupy.asarray(part), kv_cache=caches[0], row_offsets=cupy.asarray(np.array(offsets)))
        assert nmse(got, here(part, kv_cache=caches[1], row_offsets=offsets)) < 1e-6
        for cache in caches:
            cache.truncate(2, 0)
            cache.reset(2)
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == cupy.asnumpy(caches[0].counts).tolist()
    with pytest.raises(DeviceError, match="x is on cpu, the layer on cuda:0"):
        there(x)
    with pytest.raises(DeviceError, match="kv_cache is on cpu, the layer on cuda:0"):
        there(cupy.asarray(x), kv_cache=qattn.KVCache(there.kv_params))


def test_nan_spoils_its_own_token(cupy):
    attn = layer(devices=["cuda:0"])
    x = normal((3, attn.hidden_size))
    x[1, 7] = np.nan
    attn(cupy.asarray(normal((4, attn.hidden_size), 1)))
    out = cupy.asnumpy(attn(cupy.asarray(x)))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).any()


def test_several_devices_are_refused(monkeypatch):
    pretend(monkeypatch, count=2)
    with pytest.raises(NotImplementedError, match="devices are cuda:0, cuda:1; a layer on several devices"):
        qattn.GGUFQAttentionWithRope(**parameters(devices=["cuda:0", "cuda:1"]))


def test_a_layer_of_floats_runs_there_too(cupy):
    there, here = (
        qattn.AttentionWithRope(**parameters(devices=[device]), precision="exact") for device in ("cuda:0", "cpu")
    )
    weights = {name: np.asarray(value) for name, value in state().items()}
    x = normal((KV_HEADS, there.hidden_size))
    for attn in (there, here):
        attn.load_state_dict(weights)
    assert nmse(there(cupy.asarray(x)), here(x)) < 1e-9


# ------------------------------------------------------------------------------------------------------- models


def test_a_file_opened_for_a_gpu_gives_arrays_and_layers_there(cupy, tmp_path):
    file = qattn.open(tiny_model.write(tmp_path / "tiny.gguf"), device="cuda:0")
    w = file["blk.0.attn_q.weight"]
    assert file.device == w.device == "cuda:0" and "cuda:0" in repr(file)
    there, here = qattn.GGUFQAttentionWithRope.from_gguf(file, 1), qattn.GGUFQAttentionWithRope.from_gguf(file.path, 1)
    x = normal((4, tiny_model.HIDDEN))
    assert there.device == "cuda:0" and nmse(there(cupy.asarray(x)), here(x)) < 1e-4


def test_frequency_factors_of_a_file_reach_the_gpu(cupy, tmp_path):
    weights = tiny_model.weights() | {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    file = qattn.open(tiny_model.write(tmp_path / "tiny.gguf", weights), device="cuda:0")
    there, here = qattn.GGUFQAttentionWithRope.from_gguf(file), qattn.GGUFQAttentionWithRope.from_gguf(file.path)
    x = normal((4, tiny_model.HIDDEN))
    assert nmse(there(cupy.asarray(x)), here(x)) < 1e-4 and there.rope.frequencies[-1] == here.rope.frequencies[-1]


def test_a_model_writes_the_same_on_a_gpu_by_replaying_a_graph(cupy, tmp_path):
    path = tiny_model.write(tmp_path / "tiny.gguf", tiny_model.weights(biases=True, tied=False))
    there, here = (Model.from_gguf(path, device=device, cache_dtype="float32") for device in ("cuda:0", "cpu"))
    for tokens in ([1, 2, 3, 4, 5], [6], [7], [8], [9, 10], [11]):
        got, want = there.forward(tokens), here.forward(tokens)
        assert isinstance(got, cupy.ndarray) and nmse(got, want) < 1e-6
    assert there.decoder._step.program is not None and len(there.decoder) == 11
    there.decoder.truncate(6)
    again = cupy.asnumpy(there.forward([7]))
    there.decoder._step = None
    there.decoder.truncate(6)
    np.testing.assert_array_equal(cupy.asnumpy(there.forward([7])), again)  # recorded or replayed, the same bits
    text = "".join(there.generate("hello w", max_tokens=4))
    assert text == "".join(here.generate("hello w", max_tokens=4))


@pytest.mark.parametrize("architecture", ["gemma3", "phi3"])
def test_a_decoder_of_another_architecture_gives_the_same_on_a_gpu(cupy, tmp_path, architecture):
    path = tiny_model.write(tmp_path / "tiny.gguf", architecture=architecture)
    there, here = (Decoder.from_gguf(path, device=device, precision="exact") for device in ("cuda:0", "cpu"))
    for tokens in (range(1, tiny_model.WINDOW + 3), [20], [21]):
        assert nmse(there.forward(list(tokens)), here.forward(list(tokens))) < 1e-9


def test_a_recorded_step_on_a_gpu_goes_on_to_the_next_page_of_a_window(cupy, tmp_path):
    path = tiny_model.write(tmp_path / "tiny.gguf", architecture="gemma3")
    options = {"precision": "exact", "max_length": 300}
    there = Decoder.from_gguf(path, device="cuda:0", window_caches=True, **options)
    here, tokens = Decoder.from_gguf(path, **options), np.arange(131) % 200
    for piece in (tokens[:125], *tokens[125:, None]):
        assert nmse(there.forward(piece), here.forward(piece)) < 1e-9
    local = there.layers[0].attention.kv_cache
    assert there._step.program is not None and local.free_pages == local.pages - 2
