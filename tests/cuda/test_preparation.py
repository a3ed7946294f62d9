"""What kernels do to heads on their way to being rotated and stored, against float64 and against pass after pass."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn._backend import as_host
from qattn.architectures import Gate, Norm, Temperature
from qattn.cuda import attention as cuda_attention
from qattn.cuda.attention import Partial
from qattn.cuda.heads import Steps
from qattn.cuda.kernel import Kernel
from qattn.cuda.rope import rotate_and_store
from qattn.logits import Logits
from qattn.masks import Causal
from qattn.preparation import Preparation
from tests import reference
from tests.block_reference import block
from tests.cuda.cases import contents, empty_cache, storage_of
from tests.cuda.test_attention import STEPS
from tests.cuda.test_rope import one_cupy, steps
from tests.reference import nmse
from tests.strategies import normal
from tests.test_features import HIDDEN, loaded, plain

NORMS = (None, ("rms", 1e-5), ("layer", 1e-3))


def sizes_of(step):
    """(heads, size) of q, k and v."""
    return (step.heads, step.head_dim), (step.kv_heads, step.head_dim), (step.kv_heads, step.value_dim)


@st.composite
def preparations(draw, step):
    """A `Preparation` of NumPy arrays for the rows of a `Step`, and temperatures by position, or None."""
    columns = sum(heads * size for heads, size in sizes_of(step))

    def maybe(seed, scale=1.0, start=0.0):
        return normal(columns, seed) * np.float32(scale) + np.float32(start) if draw(st.booleans()) else None

    limit = draw(st.sampled_from([None, 0.8, 3e38]))
    norms = tuple(draw(st.sampled_from(NORMS)) for _ in range(3))
    return Preparation(
        maybe(1, 0.2, 1), maybe(2), limit and np.full(columns, limit, np.float32), maybe(3, 0.3, 1), maybe(4), norms,
        draw(st.booleans()),
    ), maybe(5)  # fmt: skip


def expected(step, preparation, heat):
    """q, keys and values of the new tokens, float64."""
    p, first, out = preparation, 0, []
    for part, (heads, size) in enumerate(sizes_of(step)):
        here = slice(first, first + heads * size)
        x, first = step.qkv[:, here].astype(np.float64), here.stop
        x = x if p.factor is None else x * p.factor[here]
        x = x if p.bias is None else x + p.bias[here]
        x = x if p.limit is None else np.clip(x, -p.limit[here], p.limit[here])
        x = x.reshape(step.tokens, heads, size)
        turn = (lambda x: x) if part == 2 else (lambda x: reference.rotate(x, step.places, step.rope))
        x = turn(x) if p.after_rope else x
        if p.norms[part] is not None:
            kind, epsilon = p.norms[part]
            x = x - x.mean(axis=2, keepdims=True) * (kind == "layer")
            x = x / np.sqrt((x**2).mean(axis=2, keepdims=True) + epsilon)
            x = x if p.weight is None else x * p.weight[here].reshape(heads, size)
            x = x if p.shift is None else x + p.shift[here].reshape(heads, size)
        x = x if heat is None or part else x * heat[step.places][:, None, None]
        out.append(x if p.after_rope else turn(x))
    return out


def steps_there(cupy, preparation, heat):
    there = [array if array is None else cupy.asarray(array) for array in (*preparation[:5], heat)]
    return Steps.of(preparation._replace(**dict(zip(preparation._fields, there[:5], strict=False))), there[5])


@settings(one_cupy, max_examples=40)
@given(data=st.data(), step=steps(), kind=st.sampled_from(["f32", "bf16", "q8_0"]))
def test_heads_are_prepared_as_in_float64(cupy, data, step, kind):
    preparation, heat = data.draw(preparations(step))
    cache = empty_cache(cupy, kind, len(step.new), step.kv_heads, 128, step.head_dim, step.value_dim)
    lengths, q = cupy.asarray(np.array(step.before)), cupy.zeros((step.tokens, step.heads, step.head_dim), "f4")
    heat = None if heat is None else np.resize(heat, 200)
    there = steps_there(cupy, preparation, heat)
    rotate_and_store(storage_of(kind), *step.arguments(cupy), cache, lengths, q, there)
    want_q, *want = expected(step, preparation, heat)
    small = 1e-4 if ("layer", 1e-3) in preparation.norms else 2e-5
    assert (np.abs(q.get() - want_q) <= small * (1 + np.abs(want_q))).all()
    stored = [contents(kind, cache, s) for s in range(len(step.new))]
    for i, wanted in enumerate(want):
        got = np.array([stored[s][i][place] for s, place in zip(step.slots, step.places, strict=True)])
        step_size = {"f32": 0, "bf16": 2.0**-8, "q8_0": 2.0**-7}[kind]
        largest = np.abs(wanted).max(axis=2, keepdims=True)  # of a head, as one scale may serve it
        assert (np.abs(got - wanted) <= (small + step_size) * (1e-2 + largest)).all()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.heads}x{step.head_dim}")
@pytest.mark.parametrize("after_rope", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_fused_step_prepares_with_the_bits_of_two(cupy, kind, step, after_rope):
    columns = sum(heads * size for heads, size in sizes_of(step))
    arrays = [normal(columns, seed) + np.float32(1) for seed in range(5)]
    arrays[2] = np.full(columns, 1.5, np.float32)
    given = Preparation(*arrays, (("rms", 1e-5), ("layer", 1e-5), ("rms", 1e-6)), after_rope)
    there, arguments, results = steps_there(cupy, given, normal(400, 9)), step.arguments(cupy), []
    for fused in (False, True):
        cache = empty_cache(cupy, kind, len(step.new), step.kv_heads, 576, step.head_dim, step.value_dim)
        q = cupy.zeros((step.tokens, step.heads, step.head_dim), "f4")
        out, lse = cupy.zeros((step.tokens, step.heads, step.value_dim), "f4"), cupy.zeros(q.shape[:2], "f4")
        lengths, offsets = cupy.asarray(np.array(step.before)), arguments[3].row_offsets
        rest = Causal(), Logits(0.2), out, lse, Partial.room(step.tokens, step.tokens, step.heads, cache)
        if fused:
            cuda_attention.rotate_and_attend(storage_of(kind), *arguments, cache, lengths, *rest, there)
        else:
            rotate_and_store(storage_of(kind), *arguments, cache, lengths, q, there)
            cuda_attention.attend(storage_of(kind), q, cache, offsets, lengths, *rest)
        results.append([a.get() for a in (out, lse, cache.keys, cache.values, lengths)])
    for two, one in zip(*results, strict=True):
        assert np.array_equal(two, one)


@pytest.mark.parametrize(
    ("features", "passes"),
    [
        ({}, 0), ({"norm_after_rope": True, "temperature": Temperature(4, 0.2)}, 0), ({"whole row": True}, 3),
        ({"gate": Gate("sigmoid")}, 1), ({"gate": Gate("sigmoid"), "bias of the gate": True}, 4),
    ],
    ids=str,
)  # fmt: skip
def test_a_layers_heads_need_no_pass_of_their_own(cupy, features, passes):
    """But where a norm spans all heads, or a gate has to be finished; a gate has a kernel."""
    norm, x, features = Norm("rms", 1e-5), normal((5, HIDDEN)), dict(features)
    whole_row, gate_bias = features.pop("whole row", False), features.pop("bias of the gate", False)
    config, tensors = plain(clamp_qkv=1.0, q_norm=norm, k_norm=norm, **features)
    tensors |= {"attn_q_norm.weight": normal(32 if whole_row else 8, 7), "attn_k_norm.weight": normal(8, 8)}
    tensors |= {f"attn_{name}.bias": normal(rows, rows) for name, rows in (("q", 32), ("k", 16), ("v", 16))}
    if "gate" in features:
        tensors["attn_gate.weight"] = normal((4, HIDDEN), 9)
    if gate_bias:
        tensors["attn_gate.bias"] = normal(4, 10)
    attn = loaded(config, tensors, devices=["cuda:0"])
    with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as launches:
        got = attn(cupy.asarray(x)).get()
    assert nmse(got, block(config, tensors, x)[1]) < 1e-10
    names = [call.args[0].name for call in launches.call_args_list]
    assert len([name for name in names if name.startswith("heads_")]) == passes, names


@pytest.mark.parametrize(
    ("kind", "features"),
    [
        ("float16", {}), ("bfloat16", {"temperature": Temperature(4, 0.2)}), ("q8_0", {"norm_after_rope": True}),
        ("q8_0 turned", {}), ("float16 paged", {}), ("float16 in a cascade", {}),
    ],
    ids=str,
)  # fmt: skip
def test_layers_with_any_cache_prepare_heads_as_a_cpu_does(cupy, kind, features):
    """A prompt and two tokens one by one, the second captured, over every kind of cache."""
    norm, (dtype, *how) = Norm("rms", 1e-5), kind.split(" ", 1)
    config, tensors = plain(clamp_qkv=2.0, q_norm=norm, k_norm=norm, **features)
    tensors |= {"attn_q_norm.weight": 1 + normal(8, 7) / 4, "attn_k_norm.weight": 1 + normal((2, 8), 8) / 4}
    tensors |= {f"attn_{name}.bias": normal(rows, rows) for name, rows in (("q", 32), ("k", 16), ("v", 16))}
    params = qattn.KVCacheParams(2, 8, dtype=dtype, hadamard=how == ["turned"])
    x, outs = normal((9, HIDDEN)), []
    for device in ("cpu", "cuda:0"):
        attn, put = loaded(config, tensors, devices=[device]), np.asarray if device == "cpu" else cupy.asarray
        attn.precision = "int8"  # of attention, and so one token is rotated, stored and attends in one launch
        cache = qattn.KVCache(params, device=device)
        if how and how[0] != "turned":
            cache = qattn.PagedKVCache(params, pages=4, device=device, cascade=how[0] == "in a cascade")
        steps = [attn(put(x[:7]), kv_cache=cache)]
        with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as launches:
            steps.append(attn(put(x[7:8]), kv_cache=cache))
        names = [call.args[0].name for call in launches.call_args_list]
        last, captured = attn(put(x[8:]), kv_cache=cache, capture={"q", "k"})
        outs.append([as_host(a) for a in (*steps, last, captured["q"], captured["k"])])
    assert any(name.startswith("attend_fused") for name in names) == (how != ["in a cascade"] and dtype != "q8_0")
    for there, here in zip(outs[1], outs[0], strict=True):
        assert nmse(there, here) < 1e-4  # a CPU rounds to 8 bits what a GPU rounds to 16
