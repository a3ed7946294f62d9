"""Attention over a cache on a GPU, against float64 on the numbers that the cache holds."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qattn.cuda import attend_exact, attend_variant
from qattn.cuda import attention as cuda_attention
from qattn.cuda.attention import Partial, Plan, Storage, path
from qattn.cuda.rope import rotate_and_store
from qattn.logits import Logits
from qattn.masks.causal import Causal
from qattn.masks.null import Null
from qattn.rope import RotaryEmbedding
from tests.cuda.cases import MASKS, NMSE, OPTIONS, Before, Case, Strided, Window, decode, storage_of
from tests.cuda.test_rope import Step
from tests.reference import nmse

one_cupy = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    ("kind", "mask"), [*((kind, mask) for kind in ("f16", "f32") for mask in MASKS), ("bf16", Causal())], ids=str
)
def test_a_token_attends(cupy, kind, mask):
    size = 128 if kind == "bf16" else 64
    decode(kind, 4, size, size, (200, 63, 64, 0)).check(cupy, mask)


@pytest.mark.parametrize("before", [0, 62, 63, 64, 127, 640, 1999])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_a_token_attends_in_parts(cupy, kind, before):
    """Keys are cut into parts by the capacity; most of them may have nothing to do."""
    case = decode(kind, 4, 64, 64, (before, 100), capacity=2048)
    assert Plan.of(2, 2, 8, 2, 2048).parts == 32
    for mask in (Causal(), Window(37)):
        case.check(cupy, mask)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_a_prompt_attends(cupy, kind, mask):
    """With the keys of its tiles whole, and cut into parts by the capacity, most of which have nothing to do."""
    case = Case(kind, 8, 2, 64, 64, (70,), (33,), capacity=128)
    for each in (case, case._replace(capacity=640)):
        each.check(cupy, mask)
    assert Plan.of(70, 1, 8, 2, 640).prefill == 10


@pytest.mark.parametrize(("kind", "head_dim", "value_dim"), [("f16", 576, 512), ("f32", 64, 64)])
def test_heads_of_a_wide_group_attend_as_a_prompt_does(cupy, kind, head_dim, value_dim):
    """As in multi-head latent attention: few tokens, for which others take the kernel for few rows."""
    case = Case(kind, 40, 1, head_dim, value_dim, (1, 1, 3), (200, 0, 70), capacity=640, options=("sinks",))
    assert Plan.of(5, 3, 40, 1, 640)[:4] == (0, 0, 1, 10) and Plan.of(5, 3, 40, 1, 640, exact=True).few == 5
    case.check(cupy, Causal())


def test_room_for_parts_is_there_where_there_are_parts():
    assert Plan.of(4096, 1, 32, 8, 1 << 17)[2:] == (1, 1, (0, 0))  # a prompt fills the GPU
    assert Plan.of(16, 1, 32, 8, 1 << 17)[2:] == (1, 33, (0, 16 * 32 * 33))
    assert Plan.of(8, 8, 32, 8, 1 << 17)[2:] == (16, 0, (8 * 32 * 16, 0))
    assert Plan.of(8193, 2, 32, 8, 1 << 17) == (1, 2, 64, 1, (2 * 32 * 64, 0))  # a prompt beside a token


@pytest.mark.parametrize("new", [(50, 1, 0, 9), (1, 130, 1), (0, 6), (2, 0, 0), (1,) * 40 + (5,) * 30, (3, 1, 4, 1, 5)])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_ragged_batches(cupy, kind, new):
    """Some sequences get one token, some a prompt and some nothing."""
    before = tuple((i * 41 + 7) % 90 for i in range(len(new)))
    Case(kind, 6, 2, 64, 64, new, before, capacity=192).check(cupy, Causal())


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_exact_is_exact_for_every_cache(cupy, kind):
    Case(kind, 6, 2, 64, 64, (9, 1), (33, 100), exact=True).check(cupy, Causal())


@settings(one_cupy, max_examples=25)
@given(
    group=st.sampled_from([1, 3, 4, 8]), kv_heads=st.integers(1, 2), head_dim=st.integers(1, 150),
    value_dim=st.integers(1, 150), new=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    before=st.integers(0, 150), kind=st.sampled_from(["f32", "f16"]),
)  # fmt: skip
def test_heads_of_any_size_attend_in_float32(cupy, group, kv_heads, head_dim, value_dim, new, before, kind):
    before = tuple((before + i * 17) % 151 for i in range(len(new)))
    Case(kind, group * kv_heads, kv_heads, head_dim, value_dim, tuple(new), before, exact=True).check(cupy, Window(37))


@settings(one_cupy, max_examples=25)
@given(
    group=st.sampled_from([1, 3, 4, 8, 17]), kv_heads=st.integers(1, 2), window=st.integers(1, 300),
    new=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), before=st.integers(0, 300),
    spare=st.sampled_from([0, 64, 640]),
)  # fmt: skip
def test_every_batch_attends(cupy, group, kv_heads, window, new, before, spare):
    before = tuple((before + i * 17) % 301 for i in range(len(new)))
    case = Case("f16", group * kv_heads, kv_heads, 64, 64, tuple(new), before)
    case._replace(capacity=case.room + spare).check(cupy, Window(window))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(576, 512), (800, 700)])
def test_very_long_heads_attend_in_float32(cupy, head_dim, value_dim):
    """Multi-head latent attention, and heads of which shared memory has no room for the rows of four warps."""
    assert (attend_exact.Sizes(head_dim, value_dim).warps == 4) == (head_dim == 576)
    Case("f16", 2, 1, head_dim, value_dim, (7,), (20,), exact=True).check(cupy, Causal())


@pytest.mark.parametrize("new", [(1, 1), (20,)])
def test_long_values_attend_in_parts_and_pages(cupy, new):
    """Blocks share the elements of values, of codes as well, which begin within an octet of a block."""
    Case("q5_1", 2, 1, 64, 272, new, (100,) * len(new), 192, page=64, options=("sinks",)).check(cupy, Window(70))


@pytest.mark.parametrize(("new", "capacity"), [((1, 1), 640), ((60,), 0)])
def test_what_lies_behind_a_sequence_does_not_matter(cupy, new, capacity):
    case = Case("f16", 8, 2, 64, 64, new, (70,) * len(new), capacity)
    q, cache = case.arrays(cupy)
    first = case.run(cupy, Causal(), q, cache)
    for slot, length in zip(cache.pages.get()[:, 0], case.lengths, strict=True):
        cache.keys[slot, :, length:], cache.values[slot, :, length:] = 60000, -60000
    for a, b in zip(first, case.run(cupy, Causal(), q, cache), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("new", [(1, 1), (9,), (1, 20)])
def test_a_key_that_is_nan_gives_nan(cupy, kind, new):
    """Whatever part of the keys it is in."""
    case = Case(kind, 8, 2, 64, 64, new, (300,) * len(new), capacity=640)
    q, cache = case.arrays(cupy)
    cache.keys[cache.pages[0, 0], :, 70, :] = np.nan
    out, _ = case.run(cupy, Causal(), q, cache)
    assert np.isnan(out[: new[0]]).all() and np.isfinite(out[new[0] :]).all()


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_bits_do_not_depend_on_other_sequences(cupy, kind):
    case = decode(kind, 4, 64, 64, (200, 63, 64), capacity=640)
    q, cache = case.arrays(cupy)
    out, lse = case.run(cupy, Causal(), q, cache)
    shorter = case._replace(before=(200, 5, 0))
    other, other_lse = shorter.run(cupy, Causal(), q, cache)
    assert np.array_equal(out[0], other[0]) and np.array_equal(lse[0], other_lse[0])


def test_scores_are_scaled(cupy):
    case = decode("f32", 2, 24, 24, (50,))
    q, cache = case.arrays(cupy)
    for scale in (0.5, -0.25):
        logits = case.logits(scale)
        assert nmse(case.run(cupy, Null(), q, cache, logits)[0], case.expected(Null(), q, cache, logits)[0]) < 1e-11


def test_masks_have_at_most_four_fields():
    class Many(NamedTuple):
        a: int
        b: int
        c: int
        d: int
        e: int

        def bounds(self, query, keys):
            return 0, keys

    with pytest.raises(TypeError, match="Many has 5 fields; a mask has at most 4 on a GPU"):
        attend_variant.bounds_of(Many)


def test_the_path_is_chosen_by_type_and_size():
    both = Storage("f16", "f16")
    for storage, head_dim, value_dim in [
        (both, 128, 128), (Storage("bf16", "q4_0"), 256, 16), (both, 65, 67), (both, 576, 512), (both, 640, 2000),
    ]:  # fmt: skip
        assert path(storage, head_dim, value_dim) == "tensor"
    for storage, head_dim, value_dim in [
        (both._replace(exact=True), 128, 128), (Storage("f16", "f32"), 128, 128), (both, 800, 700)
    ]:  # fmt: skip
        assert path(storage, head_dim, value_dim) == "exact"


@given(
    new=st.lists(st.integers(0, 70), min_size=1, max_size=20).filter(any), group=st.integers(1, 40),
    kv_heads=st.integers(1, 8), capacity=st.integers(1, 4096).map(lambda i: 64 * i),
)  # fmt: skip
def test_a_plan_has_a_block_for_every_tile(new, group, kv_heads, capacity):
    plan = Plan.of(sum(new), len(new), group * kv_heads, kv_heads, capacity)
    assert plan.tiles >= sum(-(-n * group // 16) for n in new if n <= plan.few)
    assert plan.prefill or max(new) <= plan.few
    assert 1 <= plan.parts <= cuda_attention.MAX_PARTS


STEPS = [
    Step(8, 2, 64, 64, (1, 1, 1), (70, 0, 300), RotaryEmbedding(64)),
    Step(3, 1, 72, 90, (1, 1), (64, 63), RotaryEmbedding(32, pairing="neox"), extra=5),
    Step(20, 1, 128, 128, (1,), (190,), RotaryEmbedding(128)),
    Step(4, 2, 128, 128, (1, 1), (70, 300), RotaryEmbedding(64)),
]


@pytest.mark.parametrize(
    ("kind", "step", "mask", "options", "page"),
    [
        ("f16", STEPS[0], Causal(), (), 0), ("f16", STEPS[3], Strided(3), OPTIONS, 192),
        ("f16", STEPS[0], Before(400), ("sinks",), 64), ("bf16", STEPS[1], Strided(3), ("one bias",), 64),
        ("bf16", STEPS[2], Causal(), (), 0), ("bf16/f16", STEPS[1], Window(37), (), 0),
    ],
    ids=lambda value: f"{value.heads}x{value.head_dim}" if isinstance(value, Step) else str(value),
)  # fmt: skip
def test_a_fused_step_has_the_bits_of_two(cupy, kind, step, mask, options, page):
    """A key may be hidden from its own token: it is written all the same."""
    case = Case(
        kind, step.heads, step.kv_heads, step.head_dim, step.value_dim, step.new, step.before, 576, options=options,
        page=page,
    )  # fmt: skip
    logits, results = Logits(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in case.logits(0.2))), []
    arguments = step.arguments(cupy)
    for fused in (False, True):
        _, cache = case.arrays(cupy)
        q = cupy.zeros((step.tokens, step.heads, step.head_dim), "f4")
        out, lse = cupy.zeros((step.tokens, step.heads, step.value_dim), "f4"), cupy.zeros(q.shape[:2], "f4")
        lengths, offsets = cupy.asarray(np.array(step.before)), arguments[3].row_offsets
        rest = mask, logits, out, lse, Partial.room(step.tokens, step.tokens, step.heads, cache)
        if fused:
            cuda_attention.rotate_and_attend(case.storage, *arguments, cache, lengths, *rest)
        else:
            rotate_and_store(storage_of(kind), *arguments, cache, lengths, q)
            cuda_attention.attend(case.storage, q, cache, offsets, lengths, *rest)
        results.append([a.get() for a in (out, lse, cache.keys, cache.values, lengths)])
    for two, one in zip(*results, strict=True):
        assert np.array_equal(two, one)


def test_a_captured_step_follows_its_sequences(cupy):
    """The same launches, replayed, attend to as many keys as there are by then."""
    case = decode("f16", 4, 64, 64, (30, 9), capacity=256)
    q, cache = case.arrays(cupy)
    out, lse = cupy.zeros((2, 8, 64), "f4"), cupy.zeros((2, 8), "f4")
    rest = Causal(), case.logits(), out, lse, Partial.room(2, 2, 8, cache)
    offsets, lengths = cupy.asarray(np.arange(3)), cupy.asarray(case.lengths)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the stream doesn't wait for what was done before
    with stream:
        stream.begin_capture()
        cuda_attention.attend(case.storage, q, cache, offsets, lengths, *rest)
        graph = stream.end_capture()
        for longer in (0, 150):
            lengths[:] = cupy.asarray(case.lengths + longer)
            graph.launch(stream)
            stream.synchronize()
            grown = case._replace(before=tuple(b + longer for b in case.before))
            assert nmse(out.get(), grown.expected(Causal(), q, cache)[0]) < NMSE["f16"]
