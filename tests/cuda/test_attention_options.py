"""What attention kernels are specialized on: logits, masks that hide single keys, and pages, against float64."""

import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qattn import masks
from qattn._meaning import mask_key
from qattn.cuda import attend_decode, attend_exact, attend_prefill
from qattn.cuda import attention as cuda_attention
from qattn.cuda.attend_variant import Given, Variant
from qattn.cuda.attention import Plan
from qattn.masks.causal import Causal
from qattn.masks.null import Null
from tests.cuda.cases import NMSE, OPTIONS, Before, Case, Strided, storage_of
from tests.reference import nmse

EVERY = (*OPTIONS, "one bias")


# Each compiles kernels of its own, so each has an option to itself; others share kernels with the tests of budgets.
# Sizes end with pieces of all widths, have values that blocks share, and are of llama.cpp's own tests.
SIZES = [
    ("f16", 16, 16), ("f16", 40, 40), ("bf16", 65, 67), ("f8", 72, 280), ("bf16", 96, 64), ("bf16", 48, 240),
    ("f16", 192, 128), ("f16", 256, 256), ("f16", 576, 512),
]  # fmt: skip
OPTION_OF = {size: EVERY[i % len(EVERY)] for i, size in enumerate(SIZES)}


@pytest.mark.parametrize(
    ("kind", "head_dim", "value_dim", "option"),
    [*((*size, option) for size, option in OPTION_OF.items()), *(("f32", 64, 64, option) for option in EVERY)],
)
def test_heads_of_every_size_with_an_option(cupy, kind, head_dim, value_dim, option):
    """For a token, a token whose keys are cut into parts, and a prompt."""
    mask = Null() if head_dim % 64 == 8 else Causal()
    group = (1, 3, 4, 17)[(head_dim + value_dim) // 16 % 4]
    case = Case(kind, group, 1, head_dim, value_dim, (1, 1, 1), (112, 40, 7), options=(option,), cap=10.0)
    case.check(cupy, mask)
    case._replace(capacity=1024, new=(1, 1), before=(300, 63)).check(cupy, mask)
    case._replace(new=(40 // group + 3,), before=(75,)).check(cupy, mask)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(72, 96), (512, 512), (576, 576)])
def test_float32_takes_heads_of_any_size(cupy, head_dim, value_dim):
    case = Case("f32", 3, 1, head_dim, value_dim, (1, 1, 1), (112, 40, 7))
    case.check(cupy, Causal())
    case._replace(new=(16,), before=(75,)).check(cupy, Causal())


some = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", ["f16", "f32"])
@some
@given(
    group=st.integers(1, 5), new=st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(any),
    before=st.integers(0, 200), page=st.sampled_from([64, 128, 192]), stride=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_all_options_together(cupy, kind, group, new, before, page, stride, seed):
    before = tuple((before + i * 17) % 201 for i in range(len(new)))
    case = Case(kind, 2 * group, 2, 128, 128, tuple(new), before, 384, options=OPTIONS, page=page)
    case.check(cupy, Strided(stride), seed)
    case._replace(new=(1,) * len(new)).check(cupy, Strided(stride), seed)


@pytest.mark.parametrize("cap", [0.05, 10.0, 50.0])
def test_a_soft_cap_is_exact(cupy, cap):
    """However small or large scores are beside it."""
    Case("f32", 2, 1, 64, 64, (9,), (90,), options=("cap",), cap=cap).check(cupy, Causal())


@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("new", [(1, 1), (40,)])
def test_a_row_without_keys_has_its_sink(cupy, kind, new):
    case = Case(kind, 4, 2, 64, 64, new, (30,) * len(new), capacity=2048, options=("sinks",))
    q, cache = case.arrays(cupy)
    out, lse = case.run(cupy, Before(400), q, cache)
    assert not out.any()
    assert np.abs(lse - case.logits().sinks).max() < 1e-6


@pytest.mark.parametrize(("kind", "mask"), [("f16", Before(5)), ("f32", Before(5)), ("f32", Causal())])
def test_a_sink_may_be_absent(cupy, kind, mask):
    """A sink of -inf is none."""
    case = Case(kind, 4, 2, 64, 64, (1, 9), (30, 3))
    q, cache = case.arrays(cupy)
    none = case.logits()._replace(sinks=np.full(4, -np.inf, np.float32))
    for with_sink, without in zip(case.run(cupy, mask, q, cache, none), case.run(cupy, mask, q, cache), strict=True):
        assert np.array_equal(with_sink, without)


@pytest.mark.parametrize("page", [64, 192, 576])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_pages_give_the_same_bits(cupy, monkeypatch, kind, page):
    case = Case(kind, 4, 2, 64, 64, (1, 1), (400, 10), capacity=576)
    for each in (case, case._replace(new=(70, 3))):
        check_pages(cupy, each, page)
    monkeypatch.setattr(cuda_attention, "_BLOCKS", 8)
    assert Plan.of(2, 2, 4, 2, 576).parts == 2  # so that a block passes from page to page
    check_pages(cupy, case, page)


def check_pages(cupy, case, page):
    results = []
    for each in (case, case._replace(page=page)):
        q, cache = each.arrays(cupy)
        results.append(each.run(cupy, Causal(), q, cache))
    for one, paged in zip(*results, strict=True):
        assert np.array_equal(one, paged)


# --------------------------------------------------------------------------------------------- how kernels are made


@pytest.mark.parametrize(
    "made", [attend_decode.decode_kernel, attend_prefill.prefill_kernel, attend_exact.exact_kernel]
)
def test_an_option_that_is_off_is_not_read(cupy, made):
    plain, sinks, cap = Variant(Causal), Variant(Causal, sinks=True), Variant(Causal, cap=True)
    for variant, sizes, most in ((plain, (64, 64), 0), (sinks, (576, 512), 1), (cap, (16, 16), 2)):
        exact = made is attend_exact.exact_kernel
        ptx = made(storage_of("f32"), variant).ptx if exact else made(storage_of("f16"), variant, *sizes).ptx
        count = len(re.findall(r"\.param \.\w+ \w+_param_\d+", ptx))
        read = {int(n) for n in re.findall(r"ld\.param\S* [^\n]*_param_(\d+)\]", ptx)}
        assert len([n for n in read if n >= count - len(Given._fields)]) == most


def test_masks_of_functions_are_compiled(cupy):
    strided = masks.from_function(lambda query, key: key <= query and (query - key) % 3 == 0)
    near = masks.from_function(lambda query, key: key % 2 == 0, lambda query, keys: (query - 9, query + 1))
    Case("f16", 4, 2, 64, 64, (1, 40), (90, 7)).check(cupy, near)
    Case("f32", 4, 2, 40, 24, (1, 9), (90, 7)).check(cupy, strided)


def test_kernels_are_named_by_what_a_mask_does(monkeypatch):
    """PTX is kept on disk by these names, so they must tell masks apart that look alike."""

    def window(size):
        return type(masks.from_function(lambda query, key: query - key < size))

    assert mask_key(Causal) == "Causal"
    assert mask_key(window(3))[-12:] == mask_key(window(3))[-12:] != mask_key(window(4))[-12:]

    class Halved(NamedTuple):
        def bounds(self, query, keys):
            return 0, _limit(query)

    before = mask_key(Halved)
    mask_key.cache_clear()
    assert mask_key(Halved) == before
    monkeypatch.setitem(globals(), "_limit", lambda query: query // 4 + 1)
    mask_key.cache_clear()
    assert mask_key(Halved) != before


def _limit(query):
    return query // 2 + 1


def test_hidden_keys_weigh_nothing(cupy):
    """A bias of -inf hides a key as a mask does."""
    case = Case("f16", 4, 2, 64, 64, (20, 1), (50, 80))
    q, cache = case.arrays(cupy)
    bias = np.full((21, 1, 81), -np.inf, np.float32)
    for row in range(21):
        query = 50 + row if row < 20 else 80
        bias[row, 0, query % 3 : query + 1 : 3] = 0
    masked = case.run(cupy, Strided(3), q, cache)
    biased = case.run(cupy, Null(), q, cache, case.logits()._replace(bias=bias))
    assert nmse(masked[0], biased[0]) < NMSE["f16"] / 100 and np.abs(masked[1] - biased[1]).max() < 1e-5
