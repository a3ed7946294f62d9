"""Every feature of a layer, alone and together, against float64: descriptions and weights at random."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import masks
from qattn.architectures import AttentionConfig, Gate, Latent, Norm, Temperature
from qattn.errors import CacheError
from qattn.state import of_layer
from tests.block_reference import block
from tests.reference import nmse
from tests.strategies import normal, windows

HIDDEN = 32


class Tensors(dict):
    """Weights by the names that they have in a file."""

    def mapped(self, name):
        return self[name]


@st.composite
def norms(draw, heads, size):
    """A norm, and shapes that its weight may have."""
    norm = Norm(draw(st.sampled_from(["rms", "layer"])), 1e-5, draw(st.booleans()))
    shape = draw(st.sampled_from([(size,), (heads, size), (heads, 1), (heads * size,)]))
    return norm, shape if norm.weighted else None


@st.composite
def layers(draw):
    """(config, tensors): any combination of features."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    heads, head_dim = kv_heads * group, draw(st.integers(2, 12))
    same = draw(st.booleans())
    value_dim = head_dim if same else draw(st.integers(1, 12))
    sizes = {"q": (heads, head_dim), "k": (kv_heads, head_dim), "v": (kv_heads, value_dim)}
    tensors, features = Tensors(), {}
    if same and draw(st.booleans()):
        features["gate"] = Gate(draw(st.sampled_from(["sigmoid", "softplus"])), interleaved=True)
    if same and draw(st.booleans()):
        features["value_from_key"] = True
    for seed, (name, (count, size)) in enumerate(sizes.items()):
        rows = count * size * (2 if name == "q" and "gate" in features else 1)
        if name != "v" or "value_from_key" not in features:
            tensors[f"attn_{name}.weight"] = normal((rows, HIDDEN), seed) / 4
            if draw(st.booleans()):
                tensors[f"attn_{name}.bias"] = normal(rows, seed + 10)
        if f"attn_{name}.weight" in tensors and draw(st.booleans()):
            tensors[f"attn_{name}.scale"] = np.array([draw(st.floats(0.25, 2))], np.float32)
        if draw(st.booleans()) and (name != "v" or same):
            norm, shape = draw(norms(count, size))
            features[f"{name}_norm"] = norm if name != "v" else Norm(norm.kind, 1e-5, weighted=False)
            if shape and name != "v":
                tensors[f"attn_{name}_norm.weight"] = 1 + normal(shape, seed + 20) / 4
                if norm.kind == "layer" and draw(st.booleans()):
                    tensors[f"attn_{name}_norm.bias"] = normal(shape, seed + 30)
    tensors["attn_output.weight"] = normal((HIDDEN, heads * value_dim), 5) / 4
    if "gate" not in features and draw(st.booleans()):
        gate = Gate(draw(st.sampled_from(["sigmoid", "softplus"])))
        features["gate"] = gate
        tensors["attn_gate.weight"] = normal((draw(st.sampled_from([heads, heads * value_dim])), HIDDEN), 6) / 4
    if draw(st.booleans()):
        features["output_norm"] = Norm("rms", 1e-5)
        tensors["attn_sub_norm.weight"] = 1 + normal(heads * value_dim, 7) / 4
    if draw(st.booleans()):
        features["sinks"] = True
        tensors["attn_sinks.weight"] = normal(heads, 8)
    if draw(st.booleans()):
        features["distances"], buckets = draw(st.sampled_from([("one-sided", 8), ("two-sided", 16)]))
        features["distance_table"] = "attn_rel_b.weight"
        tensors["attn_rel_b.weight"] = normal((buckets, heads), 9)
    name = draw(st.sampled_from(masks.names()))
    rope_dims = draw(st.integers(0, head_dim // 2)) * 2
    pairing = draw(st.sampled_from(["interleaved", "neox"]))
    config = AttentionConfig(
        hidden_size=HIDDEN,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        rope=qattn.RotaryEmbedding(rope_dims, pairing=pairing) if rope_dims else None,
        scale=head_dim**-0.5,
        mask=masks.get(name, draw(windows(name))),
        clamp_qkv=draw(st.sampled_from([None, 0.5])),
        norm_after_rope=draw(st.booleans()),
        temperature=draw(st.sampled_from([None, Temperature(4, 0.2, 1)])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        alibi=draw(st.sampled_from([0.0, 8.0])),
        value_scale=draw(st.sampled_from([1.0, 0.5])),
        output_scale=draw(st.sampled_from([1.0, 3.0])),
        **features,
    )
    return config, tensors


def loaded(config, tensors, **changes):
    """A layer of float weights with this description."""
    state = of_layer(tensors, config)
    biased = [name for name in "qkv" if f"{name}_proj.bias" in state]
    for weight in [f"{name}_proj.weight" for name in "qkv" if biased]:
        if weight in state:
            state.setdefault(weight.replace("weight", "bias"), np.zeros(len(state[weight]), np.float32))
    attn = qattn.AttentionWithRope.from_config(
        config, cache_dtype="float32", precision="exact", has_bias=bool(biased), **changes
    )
    attn.load_state_dict({name: value for name, value in state.items() if len(np.shape(value)) != 0})
    return attn


@settings(max_examples=80)
@given(described=layers(), tokens=st.integers(1, 30), cut=st.integers(0, 30))
def test_any_features_agree_with_float64(described, tokens, cut):
    config, tensors = described
    attn, x = loaded(config, tensors), normal((tokens, HIDDEN), 50)
    want = config.output_scale * block(config, tensors, x)[1]
    assert nmse(attn(x), want) < 1e-9
    if config.mask.bounds(0, 99)[1] == 1:  # later tokens don't count, so a prompt may come in pieces
        attn.reset()
        assert nmse(np.concatenate([attn(x[:cut]), attn(x[cut:])]), want) < 1e-9


def plain(**features):
    """A small layer: 4 heads of 8, and 2 KV heads."""
    features = {"rope": qattn.RotaryEmbedding(8), "scale": 8**-0.5} | features
    tensors = Tensors(
        {
            f"attn_{name}.weight": normal((rows, columns), seed) / 4
            for seed, (name, rows, columns) in enumerate(
                [("q", 32, HIDDEN), ("k", 16, HIDDEN), ("v", 16, HIDDEN), ("output", HIDDEN, 32)]
            )
        }
    )
    return AttentionConfig(HIDDEN, 4, 2, 8, 8, **features), tensors


@settings(max_examples=40)
@given(described=layers(), tokens=st.integers(1, 20), cut=st.integers(0, 20))
def test_any_features_over_the_cache_of_another_layer(described, tokens, cut):
    owner, tensors = described
    reader = dataclasses.replace(owner, shares_cache_of=0, prefix="blk.1.")
    own = {f"blk.1.{name}": np.roll(values, 1, axis=-1) for name, values in tensors.items()}
    both = Tensors(tensors | own)
    first, second = loaded(owner, tensors), loaded(reader, both)
    x, y = normal((tokens, HIDDEN), 50), normal((tokens, HIDDEN), 51)
    first(x)
    want = reader.output_scale * block(reader, both, y, other=(owner, x))[1]
    assert nmse(second(y, kv_cache=first.kv_cache), want) < 1e-9
    if owner.mask.bounds(0, 99)[1] == 1:  # later tokens don't count, so both may come in pieces
        first.reset()
        for rows in np.split(range(tokens), [cut]):
            first(x[rows])
            assert not len(rows) or nmse(second(y[rows], kv_cache=first.kv_cache), want[rows]) < 1e-9


@settings(max_examples=40)
@given(described=layers(), tokens=st.integers(1, 20), others=st.integers(1, 20), cut=st.integers(0, 20))
def test_any_features_over_another_sequence(described, tokens, others, cut):
    config, tensors = described
    config = dataclasses.replace(config, cross=True)
    attn, x, states = loaded(config, tensors), normal((tokens, HIDDEN), 50), normal((others, HIDDEN), 51)
    attn.remember(states[:cut])
    attn.remember(states[cut:])
    positions = np.arange(tokens)  # other states tell nothing of where x is
    want = config.output_scale * block(config, tensors, x, other=states)[1]
    got, captured = attn(x, positions=positions, capture={"weights", "lse"})
    assert nmse(got, want) < 1e-9
    seen = np.isfinite(captured["lse"])
    assert config.sinks or np.allclose(captured["weights"].sum(axis=2).T, seen, atol=1e-5)
    pieces = [attn(x[rows], positions=positions[rows]) for rows in np.split(positions, [cut]) if len(rows)]
    assert nmse(np.concatenate(pieces), want) < 1e-9


@pytest.mark.parametrize(
    "feature",
    [
        {"rope": qattn.RotaryEmbedding(8)},
        {"alibi": 8.0},
        {"mask": masks.Causal()},
        {"mask": masks.Chunked(3)},
        {"temperature": Temperature(4, 0.5)},
    ],
)
def test_cross_attention_asks_for_the_positions_that_it_needs(feature):
    attn = loaded(*plain(**{"cross": True, "mask": masks.Null(), "rope": None} | feature))
    attn.remember(normal((5, HIDDEN)))
    with pytest.raises(ValueError, match="positions of x's tokens are needed"):
        attn(normal((3, HIDDEN)))


def test_a_layer_may_read_the_cache_of_another():
    owner, its = plain()
    reader, mine = plain(shares_cache_of=0, prefix="blk.1.")
    both = Tensors(its | {f"blk.1.{name}": values for name, values in mine.items()})
    first, second = loaded(owner, its), loaded(reader, both)
    x, y = normal((9, HIDDEN), 1), normal((9, HIDDEN), 2)
    first(x)
    got = second(y, kv_cache=first.kv_cache)
    assert nmse(got, block(reader, both, y, other=(owner, x))[1]) < 1e-10
    assert len(first.kv_cache) == 9
    with pytest.raises(qattn.CacheError, match="the layer it shares must have added x's"):
        second(y)


def test_cross_attention_sees_all_of_another_sequence():
    config, tensors = plain(cross=True, mask=masks.Null(), rope=None)
    attn, x, states = loaded(config, tensors), normal((9, HIDDEN), 1), normal((5, HIDDEN), 2)
    attn.remember(states[:2])
    attn.remember(states[2:])
    want = block(config, tensors, x, other=states)[1]
    assert nmse(attn(x), want) < 1e-10
    assert nmse(np.concatenate([attn(x[:4]), attn(x[4:])]), want) < 1e-10
    both = qattn.KVCache(attn.kv_params, 2)
    attn.remember(np.concatenate([states, states[:3]]), kv_cache=both, row_offsets=[0, 5, 8])
    got = attn(np.concatenate([x, x]), kv_cache=both, row_offsets=[0, 9, 18])
    assert nmse(got[:9], want) < 1e-10
    assert nmse(got[9:], block(config, tensors, x, other=states[:3])[1]) < 1e-10
    with pytest.raises(ValueError, match="the layer attends to its own input"):
        loaded(*plain()).remember(states)


def test_a_memory_may_have_positions_of_its_own():
    norm = Norm("rms", 1e-5, weighted=False)
    config, tensors = plain(cross=True, mask=masks.Null(), k_norm=norm, v_norm=norm, norm_after_rope=True)
    attn, x, states = loaded(config, tensors), normal((9, HIDDEN), 1), normal((5, HIDDEN), 2)
    attn.remember(states)
    want = attn(x, positions=np.arange(9))
    attn.reset()
    attn.remember(states, positions=np.arange(5) + 70)
    assert attn.kv_cache.positions().tolist() == [70, 71, 72, 73, 74]
    assert nmse(attn(x, positions=np.arange(9) + 70), want) < 1e-9  # both have moved
    assert nmse(attn(x, positions=np.arange(9)), want) > 1e-6


def test_of_several_positions_temperatures_go_by_the_first():
    rope = qattn.RotaryEmbedding(8, sections=(2, 1, 1))
    config, tensors = plain(temperature=Temperature(4, 0.5), rope=rope)
    attn, x = loaded(config, tensors), normal((9, HIDDEN), 1)
    positions = np.stack([np.arange(9) // 2, np.arange(9), np.arange(9)[::-1] // 3])
    assert nmse(attn(x, positions=positions), block(config, tensors, x, positions=positions)[1]) < 1e-9


@pytest.mark.parametrize("rope", [None, qattn.RotaryEmbedding(8)])
def test_a_far_position_of_a_layer_with_a_temperature_takes_no_table(rope):
    config, tensors = plain(temperature=Temperature(4, 0.5), rope=rope)
    attn, x, far = loaded(config, tensors), normal((3, HIDDEN), 1), np.arange(3) + 2**24 - 4
    assert nmse(attn(x, positions=far), block(config, tensors, x, positions=far)[1]) < 1e-9
    attn(x)
    assert len(attn._loaded().temperatures.table(1)) < 1000


def test_mistakes_are_named():
    config, tensors = plain(sinks=True)
    for sinks, message in (
        (normal(3), r"sinks.weight has shape \(3,\); expected \(4,\)"),
        (normal((4, 2)), r"sinks.weight has shape \(4, 2\); expected \(4,\)"),
        (np.array([0, 1, np.nan, 2], np.float32), r"sinks.weight\[2\] is nan; attention needs finite numbers"),
    ):
        tensors["attn_sinks.weight"] = sinks
        with pytest.raises(ValueError, match=message):
            loaded(config, tensors)
    config, tensors = plain(q_norm=Norm("rms", 1e-5))
    tensors["attn_q_norm.weight"] = normal(5)
    with pytest.raises(ValueError, match=r"q_norm.weight has shape \(5,\); expected \(8,\), \(32,\), \(4, 8\) or"):
        loaded(config, tensors)
    with pytest.raises(ValueError, match="clamp_qkv is -1; expected a positive number"):
        plain(clamp_qkv=-1)
    for temperature, message in (
        (Temperature(0, 0.1), r"temperature.length is 0; expected a finite number"),
        (Temperature(4, np.nan), "temperature.scale is nan; expected a finite number"),
        (Temperature(4, 0.1, -5), "temperature.offset is -5; expected a finite number, 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(temperature=temperature)
    with pytest.raises(ValueError, match="distances is 'both'; expected one of '', 'one-sided', 'two-sided'"):
        plain(distances="both")
    for feature in ({"cross": True}, {"q_norm": Norm("rms", 1e-5)}, {"clamp_qkv": 3.0}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(feature))} in multi-head latent attention is not"):
            plain(latent=Latent(8, 4, 8, 8, 1e-5), **feature)
    with pytest.raises(ValueError, match=r"gate\.function is 'relu'; expected one of 'sigmoid', 'softplus'"):
        plain(gate=Gate("relu"))
    attn = loaded(*plain(cross=True, mask=masks.Null()))
    attn.remember(normal((3, HIDDEN)))
    with pytest.raises(ValueError, match="positions of x's tokens are needed: the cache tells those of another"):
        attn(normal((2, HIDDEN)))


def test_a_call_may_bring_its_own_mask():
    config, tensors = plain()
    x = normal((9, HIDDEN), 1)
    for mask in (masks.SlidingWindow(3), "null", qattn.MHAMaskVariant.NULL_MASK):
        other = dataclasses.replace(config, mask=masks.get(mask))
        assert nmse(loaded(config, tensors)(x, mask=mask), block(other, tensors, x)[1]) < 1e-10
    with pytest.raises(ValueError, match="there is no mask named 'diagonal'"):
        loaded(config, tensors)(x, mask="diagonal")


EVERY_THIRD = masks.from_function(lambda query, key: key <= query and (query - key) % 3 == 0)


@settings(max_examples=40)
@given(
    before=st.integers(1, 30), parents=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    feature=st.sampled_from([
        {}, {"alibi": 8.0}, {"distances": "one-sided", "distance_table": "attn_rel_b.weight"},
        {"mask": masks.SlidingWindow(4)}, {"mask": masks.Chunked(5), "alibi": 8.0}, {"mask": EVERY_THIRD},
    ]),
)  # fmt: skip
def test_branches_of_a_tree_are_sequences(before, parents, feature):
    """Drafted tokens whose mask is a tree, and whose positions are depths, come out as each branch alone would."""
    config, tensors = plain(**feature)
    tensors["attn_rel_b.weight"] = normal((8, 4), 9)
    parents = [-1] + [min(parent, i) for i, parent in enumerate(parents)]
    ancestors = np.eye(len(parents), dtype=bool)
    for i, parent in enumerate(parents[1:], 1):
        ancestors[i] |= ancestors[parent]
    x, drafts = normal((before, HIDDEN)), normal((len(parents), HIDDEN), 1)
    attn = loaded(config, tensors)
    attn(x)
    mask = np.concatenate([np.ones((len(parents), before), bool), ancestors], axis=1)
    positions = before - 1 + ancestors.sum(axis=1)
    got = attn(drafts, mask=mask, positions=positions)
    for i, branch in enumerate(ancestors):
        alone = loaded(config, tensors)
        alone(x)
        assert nmse(got[i], alone(drafts[branch])[-1]) < 1e-10
    kept = np.flatnonzero(ancestors[-1])  # the last branch is taken: what follows is as if there had been no others
    for i in reversed(range(len(parents))):
        if i not in kept:
            attn.kv_cache.remove(0, before + i, before + i + 1)
    assert nmse(attn(normal((2, HIDDEN), 3)), alone(normal((2, HIDDEN), 3))) < 1e-10


@settings(max_examples=20)
@given(name=st.sampled_from([name for name in masks.names() if masks.has_window(name)]), data=st.data())
def test_masks_go_by_positions(name, data):
    """Tokens that are missing leave a gap: what the others see is what they saw with those hidden."""
    config, tensors = plain(mask=masks.get(name, data.draw(st.integers(2, 9))))
    gap = slice(*sorted(data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20)))))
    x, kept = normal((20, HIDDEN)), np.delete(np.arange(20), gap)
    whole = loaded(config, tensors)(x, mask=np.broadcast_to(np.isin(np.arange(20), kept), (20, 20)))
    got, lse = loaded(config, tensors)(x[kept], positions=kept, return_lse=True)
    assert nmse(got, whole[kept]) < 1e-10
    seen = masks.visible(config.mask, kept, kept)
    assert np.array_equal(np.isfinite(lse).all(axis=1), seen.any(axis=1))


def test_a_tree_behind_what_a_window_keeps():
    """Siblings in a tree don't push out what their window begins with; but windows of earlier tokens are gone."""
    config, tensors = plain(mask=masks.SlidingWindow(128))
    attn, whole, tree = loaded(config, tensors), loaded(config, tensors), np.eye(20, dtype=bool)
    tree[10:, 10:] = np.tri(10)
    depths, mask = np.concatenate([np.zeros(10, int), np.arange(10)]), np.ones((20, 532), bool)
    mask[:, 512:] = tree
    cache = qattn.PagedKVCache(attn.kv_params, pages=8, window=128)
    for i in range(4):
        x = normal((128, HIDDEN), i)
        attn(x, kv_cache=cache)
        whole(x)
    drafts = normal((20, HIDDEN), 9)
    with pytest.raises(CacheError, match="new tokens of sequence 0 see token 383, and the cache's window leaves those"):
        attn(drafts, kv_cache=cache, mask=mask, positions=510 + depths)
    assert len(cache) == 512
    got = attn(drafts, kv_cache=cache, mask=mask, positions=512 + depths)
    assert nmse(got[10:], whole(drafts[10:])) < 1e-10


def test_distances_go_by_positions():
    """Also where tokens have been removed, or come with positions of their own."""
    for feature in ({"alibi": 8.0}, {"distances": "two-sided", "distance_table": "attn_rel_b.weight"}):
        config, tensors = plain(rope=None, mask=masks.Null(), **feature)
        tensors["attn_rel_b.weight"] = normal((16, 4), 9)
        x, positions = normal((20, HIDDEN)), np.array([*range(5), *range(12, 20)])
        whole = loaded(config, tensors)(x, mask=np.broadcast_to(np.isin(np.arange(20), positions), (20, 20)))
        assert nmse(loaded(config, tensors)(x[positions], positions=positions), whole[positions]) < 1e-10
        attn = loaded(config, tensors)
        attn(x[:19])
        attn.kv_cache.remove(0, 5, 12)
        assert nmse(attn(x[19:]), whole[19:]) < 1e-10
