"""What callers can get wrong, and what must then be left as it was."""

import copy
import functools
from typing import NamedTuple

import numpy as np
import pytest

import qattn
from qattn import CacheError, KVCache, KVCacheParams, PagedKVCache, masks
from qattn._meaning import mask_key
from qattn.architectures import Gate, Norm
from qattn.introspect import ablated
from qattn.models import Decoder, Model
from tests import reference, tiny_model
from tests.reference import nmse
from tests.strategies import normal
from tests.test_kv_machine import HIDDEN, PARAMS, ROPE, layer


def test_out_must_be_writable():
    w, fixed = qattn.quantize(normal((4, 32)), "Q4_0"), np.zeros((4, 32), np.float32)
    fixed.setflags(write=False)
    for call in (
        lambda: qattn.dequantize(w, out=fixed),
        lambda: qattn.matmul(normal((4, 32)), qattn.quantize(normal((32, 32)), "Q4_0"), out=fixed),
        lambda: qattn.rope(normal((4, 1, 32)), 0, qattn.RotaryEmbedding(8), out=fixed.reshape(4, 1, 32)),
    ):
        with pytest.raises(ValueError, match="out is read-only"):
            call()
    assert not fixed.any()


def test_out_may_overlap_x():
    rows, rope = normal((41, 2, 8)), qattn.RotaryEmbedding(8)
    want = qattn.rope(rows[1:], 3, rope)
    assert np.array_equal(qattn.rope(rows[1:], 3, rope, out=rows[:40]), want)


@pytest.mark.parametrize("formats", [("Q4_0", "Q8_0"), ("F32", "Q4_K")])
@pytest.mark.parametrize("precision", ["int8", "exact"])
def test_out_may_be_x(formats, precision):
    w = np.concatenate([qattn.quantize(normal((128, 256), i), name) for i, name in enumerate(formats)])
    x = normal((6, 256), 2)
    want = qattn.matmul(x, w, precision=precision)
    assert np.array_equal(qattn.matmul(x, w, out=x, precision=precision), want)


def test_weights_without_columns_give_zeros():
    w = qattn.QuantArray(np.zeros((5, 0), np.uint8), "Q4_0")
    assert np.array_equal(np.zeros((3, 0), np.float32) @ w.T, np.zeros((3, 5)))


def test_only_real_numbers_are_multiplied():
    w, x = qattn.quantize(normal((4, 32)), "Q4_0"), normal((2, 32))
    for wrong in (x.astype(complex), x.astype(str), x.astype(object)):
        for call in (lambda wrong=wrong: wrong @ w.T, lambda wrong=wrong: np.concatenate([w, wrong])):
            with pytest.raises(TypeError, match=r"dtype|an array of"):
                call()
        with pytest.raises(ValueError, match=r"expected floats|x has dtype"):
            qattn.matmul(wrong, w)
        with pytest.raises(ValueError, match="expected floats"):
            layer()(np.zeros((1, HIDDEN), wrong.dtype))


def test_weights_have_no_truth_value():
    with pytest.raises(ValueError, match="truth value of weights is ambiguous"):
        bool(qattn.quantize(normal((4, 32)), "Q4_0"))


def test_a_wrong_head_scale_leaves_the_former_one():
    attn = layer()
    attn.head_scale = np.arange(4)
    for wrong in (np.ones(3), np.full(4, np.nan), np.ones(4, complex)):
        with pytest.raises(ValueError, match=r"head_scale|expected floats"):
            attn.head_scale = wrong
        assert np.array_equal(attn.head_scale, np.arange(4))


def test_a_copy_of_a_cache_has_its_own_memory():
    cache, kv = KVCache(KVCacheParams(4, 16)), normal((3, 4, 16))
    cache.append(kv, kv)
    other = copy.copy(cache)
    other.append(normal((500, 4, 16)), normal((500, 4, 16)))
    assert len(cache) == 3 and len(other) == 503
    assert np.isfinite(qattn.attention(kv, cache)).all()


@pytest.mark.parametrize("position", [-1, 2**24, 2**63 - 1])
def test_positions_have_bounds(position):
    with pytest.raises(
        ValueError, match=rf"positions\[1\] is {position}; a position is at least 0, and at most 16777215"
    ):
        qattn.rope(normal((2, 1, 8)), [0, position], qattn.RotaryEmbedding(8))
    cache = KVCache(KVCacheParams(1, 8))
    with pytest.raises(ValueError, match=rf"positions\[1\] is {position}; a position is at least 0"):
        cache.append(normal((2, 1, 8)), normal((2, 1, 8)), positions=[0, position])
    assert len(cache) == 0
    cache.append(normal((2, 1, 8)), normal((2, 1, 8)))
    if position > 0:
        with pytest.raises(CacheError, match=f"by is {position}; positions of sequence 0 would reach from"):
            cache.shift(0, 0, None, position, None)


def test_attention_wants_finite_numbers():
    for name in "qkv":
        given = {"q": normal((5, 2, 8)), "k": normal((5, 2, 8), 1), "v": normal((5, 2, 8), 2)}
        given[name][3, 1, 2] = np.nan
        with pytest.raises(ValueError, match=rf"{name}\[3, 1, 2\] is nan; attention needs finite numbers"):
            qattn.attention(**given)
    cache = KVCache(KVCacheParams(1, 8, dtype="q8_0"))
    with pytest.raises(ValueError, match=r"values\[0, 0, 0\] is inf"):
        cache.append(np.ones((1, 1, 8)), np.full((1, 1, 8), np.inf))
    with pytest.raises(ValueError, match="keys have dtype complex128; expected floats"):
        cache.append(np.ones((1, 1, 8), complex), np.ones((1, 1, 8)))
    q = normal((5, 2, 8))
    for wrong, message in (
        ({"scale": np.nan}, "scale is nan; expected a finite number"),
        ({"scale": np.float16(np.inf)}, "scale is .*inf.*; expected a finite number"),
        ({"bias": np.full((5, 5), np.inf, np.float16)}, r"bias\[0, 0, 0\] is inf; scores need"),
        ({"scale": 1e39}, "scale is 1e[+]39; expected a finite number, as float32 has them"),
        ({"softcap": 1e-46}, "softcap is 1e-46; expected a finite number"),
        ({"bias": np.full((5, 5), np.nan)}, r"bias\[0, 0, 0\] is nan; scores need finite numbers, or -inf"),
        ({"bias": np.full((5, 5), 1e39)}, r"bias\[0, 0, 0\] is 1e[+]39; scores need finite numbers"),
        ({"mask": np.full((5, 5), np.inf)}, r"mask\[0, 0, 0\] is inf; scores need"),
        ({"alibi": [1, np.nan]}, r"alibi\[1\] is nan"),
        ({"sinks": [np.inf, 1]}, r"sinks\[0\] is inf"),
        ({"distances": np.full((2, 3), np.nan)}, r"distances\[0, 0\] is nan"),
        ({"softcap": -1}, "softcap is -1; expected a finite number, 0 or more"),
        ({"mask": np.ones((5, 5), int)}, "mask has dtype int64; expected booleans"),
        ({"mask": 5}, "mask is 5; expected a name"),
        ({"mask": masks.Causal}, "expected a name"),
        ({"mask": [[True] * 5] * 3}, "mask is a list; expected a name .*, a mask or an array"),
        ({"mask": masks.Causal(), "window": 5}, "window is 5; the mask Causal.* has its own already"),
        ({"row_offsets": [0, 2, 5], "key_offsets": [0, 1, 5]}, "q has 2 tokens of sequence 0, k has 1; the last"),
        ({"row_offsets": [0, 2.5, 5]}, "row_offsets have dtype float64; expected integers"),
    ):
        with pytest.raises(ValueError, match=message):
            qattn.attention(q, q, q, **wrong)
    with pytest.raises(ValueError, match=r"q has shape \(5, 0, 8\); heads, and their elements, are at least one"):
        qattn.attention(q[:, :0], q[:, :0], q[:, :0])
    with pytest.raises(ValueError, match="heads is 0; expected at least 1"):
        qattn.alibi_slopes(0)
    for rows, two_sided in ((3, True), (1, False), (300, False)):
        with pytest.raises(ValueError, match=f"buckets has {rows} rows; expected"):
            qattn.relative_biases(np.zeros((rows, 4)), two_sided)
    with pytest.raises(ValueError, match="positions are -1; a position is at least 0"):
        qattn.rope(q, -1, qattn.RotaryEmbedding(8))


@pytest.mark.parametrize("tokens", [1, 5])
def test_scores_that_are_too_large_are_not_taken_for_none(tokens):
    """The last key's score is infinite: no number is right, and 0 would be wrong."""
    k, bias = normal((700, 2, 8)), np.zeros((tokens, 700), np.float32)
    bias[0, -tokens] = 3.4e38
    got = qattn.attention(normal((tokens, 2, 8)), k, k, bias=bias)
    assert np.isnan(got[0]).all() and np.isfinite(got[1:]).all()


@pytest.mark.parametrize("dtype", ["float16", "q8_0", "q4_1"])
def test_a_large_value_harms_nobody_else(dtype):
    cache, (k, v) = KVCache(KVCacheParams(2, 32, dtype=dtype)), normal((2, 9, 2, 32))
    q, want = normal((9, 2, 32), 1), None
    cache.append(k[:8], v[:8])
    want = qattn.attention(q[:8], cache)
    cache.append(k[8:], np.full((1, 2, 32), 1e30, np.float32))
    got = qattn.attention(q, cache)
    assert np.isfinite(got).all() and nmse(got[:8], want) < 1e-9


def test_masks_are_asked_about_keys_that_there_are_and_may_raise():
    """A table that a function reads has a column for each key.  What it raises reaches the caller."""
    table = np.ones(5, np.int64)

    def sees(query, key):
        if key >= 5:
            raise KeyError("key 5 or later")
        return table[key] > 0

    mask, q, k = masks.from_function(sees), normal((5, 2, 8)), normal((2000, 2, 8))
    assert nmse(qattn.attention(q, q, q, mask=mask), qattn.attention(q, q, q, mask="null")) < 1e-12
    with pytest.raises(KeyError, match="key 5 or later"):
        qattn.attention(q[:1], k, k, mask=mask)  # in parts


def test_a_mask_that_reads_beyond_its_table_is_an_error():
    table, q = np.arange(4), normal((5, 1, 16))
    mask = masks.from_function(lambda i, j: table[i if i == 4 else i * 10**9] == table[j])
    for keys in (5, 2):  # the query sees one element beyond, or far
        with pytest.raises(IndexError):
            qattn.attention(q[:1], q[:keys], q[:keys], mask=mask)


def test_a_mask_is_what_its_function_refers_to_when_it_is_made():
    table, q = np.zeros(9, np.int64), normal((9, 1, 16))

    def sees(query, key):
        return key <= query and table[query] == table[key]

    first, places = masks.from_function(sees), np.arange(9)
    table[5:] = 1
    second = masks.from_function(sees)
    assert mask_key(type(first)) != mask_key(type(second))
    assert np.array_equal(masks.visible(first, places, places), np.tri(9, dtype=bool))
    seen = masks.visible(second, places, places)
    assert np.array_equal(seen, np.tri(9, dtype=bool) & (table[:, None] == table))
    table[:] = 0
    want, _ = reference.attention(q, q, q, 0.25, seen)
    assert nmse(qattn.attention(q, q, q, mask=second), want) < 1e-10


class Far(NamedTuple):
    """Bounds beyond all keys."""

    first: int
    end: int

    def bounds(self, query, keys):
        return self.first, self.end


@pytest.mark.parametrize(("first", "end", "seen"), [(-(10**12), 2**40, 20), (2**32, 2**32 + 5, 0), (2**62, 2**62, 0)])
def test_bounds_may_be_far_out(first, end, seen):
    q, k = normal((3, 1, 16)), normal((20, 1, 16), 1)
    got = qattn.attention(q, k, k, mask=Far(first, end))
    assert nmse(got, qattn.attention(q, k, k, mask="null")) < 1e-12 if seen else not got.any()


def test_masks_are_made_of_functions():
    for wrong in (functools.partial(pow, 2), np.greater, 3, max):
        with pytest.raises(TypeError, match="is no function that can be compiled"):
            masks.from_function(wrong)


def test_parameters_of_a_cache_are_checked(tmp_path):
    for wrong, error in (
        ((None, 4), TypeError), ((True, 4), TypeError), ((0, 4), ValueError), ((1, 4, None, "q8_0/"), ValueError),
        ((1, 4, None, ("q8_0", "q4_0")), ValueError), ((1, 4, None, "q8_0", None, "yes"), ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            KVCacheParams(*wrong)
    cache, same = KVCache(KVCacheParams(np.int64(1), np.int64(4))), KVCache(KVCacheParams(1, 4, 4))
    cache.append(normal((3, 1, 4)), normal((3, 1, 4)))
    cache.save(tmp_path / "file")
    same.load(tmp_path / "file")
    assert np.array_equal(same.read()[0], cache.read()[0])
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory, so file can't be written there"):
        cache.save(tmp_path / "nowhere" / "file")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    with pytest.raises(TypeError):
        cache.truncate(2.5)


def test_embeddings_are_checked():
    for wrong in ("yarn", qattn.YaRN):
        with pytest.raises(ValueError, match=r"scaling is .*; expected one of"):
            qattn.RotaryEmbedding(8, scaling=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q_norm": "rms"}, "q_norm is 'rms'; expected a Norm"),
        ({"k_norm": Norm("batch", 1e-5)}, r"k_norm\.kind is 'batch'; expected one of 'rms', 'layer'"),
        ({"k_norm": Norm("rms", -1.0)}, r"k_norm\.epsilon is -1\.0; expected 0 or more"),
        ({"gate": 5}, "gate is 5; expected a Gate"),
        ({"gate": Gate("relu")}, r"gate\.function is 'relu'"),
        ({"softcap": -1.0}, r"softcap is -1\.0; expected 0 \(none\) or more"),
        ({"mask_variant": masks.Causal(), "local_window_size": 5}, "window is 5; the mask"),
        ({"mask_variant": None}, "mask is None; expected a name"),
    ],
)
def test_features_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        layer(**wrong)


def test_a_device_may_be_said_alone():
    assert layer(devices="cpu").device == "cpu"


# What fails leaves all as it was


def test_a_failing_step_leaves_no_tokens():
    def fails(query, key):
        if query > 5:
            raise ValueError
        return True

    attn, x = layer(), normal((8, HIDDEN))
    attn(x[:3])
    keys, values = attn.kv_cache.read()
    for _ in range(2):
        with pytest.raises(ValueError):
            attn(x[3:], mask=masks.from_function(fails))
        assert len(attn.kv_cache) == 3
    assert all(np.array_equal(a, b) for a, b in zip(attn.kv_cache.read(), (keys, values), strict=True))


def test_edits_let_no_page_of_a_window_go():
    """What an edit needs, or a truncation after it, is what was there before."""
    cache, flat = PagedKVCache(PARAMS, pages=8, window=150), KVCache(PARAMS)
    for each in (cache, flat):
        each.append(normal((600, 2, 8)), normal((600, 2, 8), 1))
        each.shift(0, 590, None, 5, ROPE)
        each.remove(0, 480, 580)
        each.truncate(490)
    assert all(np.array_equal(a, b) for a, b in zip(cache.read(0), flat.read(0), strict=True))
    for each in (cache, flat):
        for _ in range(2):  # the second lets pages go
            each.append(normal((60, 2, 8)), normal((60, 2, 8), 1))
    start, before = int(cache.starts[0]), cache.read(0, int(cache.starts[0]))
    assert start > 0
    with pytest.raises(CacheError, match="the window has left those"):
        cache.remove(0, 500, 600)
    assert len(cache) == 610 and cache.starts[0] == start
    assert all(np.array_equal(a, b) for a, b in zip(cache.read(0, start), before, strict=True))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def test_a_decoder_can_not_be_truncated_to_more_than_it_has(tiny):
    decoder = Decoder.from_gguf(tiny)
    decoder.forward([1, 2, 3])
    with pytest.raises(CacheError, match="length is 10; there are 3 tokens"):
        decoder.truncate(10)
    assert len(decoder) == 3


def test_two_generations_of_one_model_are_noticed(tiny):
    model = Model.from_gguf(tiny)
    first, second = model.generate([1, 2, 3]), model.generate([4, 5])
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="the model has read something else meanwhile"):
        list(first)


def test_a_prompt_is_text_or_token_ids(tiny):
    model = Model.from_gguf(tiny)
    for wrong in ([1.7, 2.2], b"abc", [[1, 2]]):
        with pytest.raises(ValueError, match="prompt has dtype"):
            model.generate(wrong)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate([])


def test_heads_are_numbers_and_count_once(tiny):
    decoder = Decoder.from_gguf(tiny)
    with ablated(decoder, 0, [1, 1], factor=0.5):
        assert decoder.layers[0].attention.head_scale.tolist() == [1, 0.5, 1, 1]
    with pytest.raises(ValueError, match="head is True"), ablated(decoder, 0, [True]):
        pass


def test_what_is_no_cache_no_name_no_layer_and_no_mask(tmp_path):
    attn, x = layer(), normal((2, HIDDEN))
    with pytest.raises(TypeError, match="kv_cache is 5; expected a KVCache or a PagedKVCache"):
        attn(x, kv_cache=5)
    with pytest.raises(TypeError, match="capture is 5; expected names, of input, q, k"):
        attn(x, capture=5)
    for wrong in ("0", 0.5, None, 99):
        with pytest.raises(ValueError, match=f"layer is {wrong!r}; the model has layers 0 to 1"):
            qattn.GGUFQAttentionWithRope.from_gguf(tiny_model.write(tmp_path / "tiny.gguf"), wrong)
    with pytest.raises(TypeError, match=r"bounds\(0, 1\) is \(0.0, 1\); expected two integers"):
        masks.from_function(lambda query, key: True, lambda query, keys: (query / 2, keys))
    with pytest.raises(TypeError, match=r"sees\(0, 0\) is 'yes'; expected a truth value"):
        masks.from_function(lambda query, key: "yes")
