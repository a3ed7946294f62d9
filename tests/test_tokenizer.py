"""The tokenizer, the chat template and the sampler: all that a model needs beside its decoder."""

import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qattn
from qattn import GGUFError
from qattn.models import ChatTemplate, Sampler, TemplateError, Tokenizer
from qattn.models.byte_bpe import PRE_TOKENIZERS
from qattn.models.sampling import min_p, softmax, top_k, top_p
from qattn.models.sentencepiece import merge
from tests import tiny_model

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer(tiny_model.metadata())


def sentencepiece(**changes):
    """Metadata of a small SentencePiece vocabulary: <unk>, <s>, </s>, 256 bytes, a few pieces."""
    pieces = [
        "▁",
        "a",
        "b",
        "c",
        "h",
        "e",
        "l",
        "o",
        "ab",
        "bc",
        "abc",
        "aa",
        "▁a",
        "he",
        "ll",
        "llo",
        "hello",
        "▁hello",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    given = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array([0] * 259 + [-i for i in range(len(pieces))] + [0], np.float32),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in given.items() if value is not None}


@pytest.fixture(scope="module")
def spm():
    return Tokenizer(sentencepiece())


# Byte-level BPE


@given(text=TEXTS, special=st.booleans())
def test_decoding_undoes_encoding(tiny, text, special):
    assert tiny.decode(tiny.encode(text, special=special), special=True) == text


@given(tokens=st.lists(st.integers(0, len(tiny_model.TOKENS) - 1), max_size=30), special=st.booleans())
def test_streaming_never_breaks_a_character_and_adds_up_to_the_text(tiny, tokens, special):
    stream = tiny.stream(special=special)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tiny.decode(tokens, special=special)


def test_a_character_of_several_tokens_comes_out_whole(tiny):
    stream = tiny.stream()
    tokens = tiny.encode("👍")
    assert len(tokens) == 4
    assert [stream.push(token) for token in tokens] == ["", "", "", "👍"]
    stream.push(tokens[0])
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_merges_are_made_in_their_order(tiny):
    assert [tiny_model.TOKENS[token] for token in tiny.encode("hello wé")] == ["hello", "Ġw", "Ã©"]


def test_control_tokens_are_found_only_when_asked(tiny):
    text = "a<|im_end|>b<tool>c"
    assert tiny.encode(text, special=True) == [
        *tiny.encode("a"),
        tiny_model.END,
        *tiny.encode("b"),
        tiny_model.TOOL,
        *tiny.encode("c"),
    ]
    plain = tiny.encode(text)
    assert tiny_model.END not in plain and tiny_model.TOOL in plain  # a user-defined token is ordinary text
    assert tiny.decode(tiny.encode(text, special=True)) == "ab<tool>c"


def test_bos_and_eos_are_added_as_the_file_says_or_as_asked():
    adding = Tokenizer(tiny_model.metadata(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True))
    assert adding.encode("h") == [tiny_model.START, ord("h"), tiny_model.END]
    assert adding.encode("h", bos=False, eos=False) == [ord("h")]
    without = Tokenizer(tiny_model.metadata(tokenizer__ggml__bos_token_id=None))
    with pytest.raises(ValueError, match="bos is True, but the vocabulary has no BOS token"):
        without.encode("h", bos=True)


def test_ends_are_the_eos_token_and_those_known_by_their_names():
    assert Tokenizer(tiny_model.metadata(tokenizer__ggml__eos_token_id=5)).ends == {5, tiny_model.END}
    assert Tokenizer(tiny_model.metadata(tokenizer__ggml__eot_token_id=7)).ends == {7, tiny_model.END}


def test_an_end_may_be_called_user_defined_but_not_markup():
    types = np.array([*tiny_model.TYPES, 4, 4], np.int32)
    tokens = [*tiny_model.TOKENS, "<|end|>", "</s>"]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert Tokenizer(tiny_model.metadata(**changes)).ends == {tiny_model.END, len(tokens) - 2}


def test_a_surrogate_is_refused(tiny):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tiny.encode("a\ud800")


def test_an_unknown_token_is_refused(tiny):
    with pytest.raises(ValueError, match="token is 265; the vocabulary has tokens 0 to 264"):
        tiny.decode([265])


def test_recorded_tokens_of_other_implementations(smollm2, golden):
    with qattn.open(smollm2) as model:
        metadata = dict(model.metadata)
    for case in json.loads((golden / "tokens.json").read_text()):
        tokenizer = Tokenizer(metadata | {"tokenizer.ggml.pre": case["pre"], "tokenizer.ggml.add_bos_token": False})
        for text, tokens in case["texts"].items():
            assert tokenizer.encode(text, special=True) == tokens, (case["pre"], text)


def test_every_pre_tokenizer_loses_nothing():
    for name in PRE_TOKENIZERS:
        tokenizer = Tokenizer(tiny_model.metadata(tokenizer__ggml__pre=name))
        text = " I'm 12345 \r\n\n  tabs\t\t… 日本 👍🏽 x_y(z)!  "
        assert tokenizer.decode(tokenizer.encode(text)) == text


# SentencePiece


@given(text=st.text("abc helo<>tool▁日\n ", max_size=40))
def test_sentencepiece_decoding_undoes_encoding(spm, text):
    if text and not text.startswith("<tool>") and "<tool>" not in text:
        assert spm.decode(spm.encode(text)) == text.replace("▁", " ")


def naive_merge(text, scores):
    """The rule read literally: merge the best pair, the leftmost of equals, until there is none."""
    pieces = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@given(
    text=st.text("abc", max_size=25),
    scores=st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(-4, 4).map(float), max_size=25),
)
def test_merging_with_a_heap_gives_what_the_rule_says(text, scores):
    assert merge(text, scores) == naive_merge(text, scores)


def test_sentencepiece_adds_a_space_and_bos_unless_the_file_says_no(spm):
    tokens = sentencepiece()["tokenizer.ggml.tokens"]
    assert [tokens[t] for t in spm.encode("hello")] == ["<s>", "▁hello"]
    plain = Tokenizer(
        sentencepiece(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    )
    assert [tokens[t] for t in plain.encode("hello a")] == ["hello", "▁a"]
    assert [tokens[t] for t in spm.encode("hello<tool>hello", bos=False)] == ["▁hello", "<tool>", "▁hello"]


def test_what_has_no_piece_becomes_bytes(spm):
    tokens = sentencepiece()["tokenizer.ggml.tokens"]
    assert [tokens[t] for t in spm.encode("é", bos=False)] == ["▁", "<0xC3>", "<0xA9>"]


def test_a_text_can_not_become_a_control_token(spm):
    assert not {1, 2} & set(spm.encode("<s></s>", bos=False))
    assert spm.encode("<s>", special=True, bos=False) == [1]


def test_phi_swallows_white_space_behind_its_special_tokens():
    vocabulary, added = sentencepiece(), ["<|user|>", "<|end|>", "<|endoftext|>"]
    tokens = [*vocabulary["tokenizer.ggml.tokens"], *added]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.append(vocabulary["tokenizer.ggml.token_type"], [4, 3, 3]).astype(np.int32),
        "tokenizer.ggml.scores": np.append(vocabulary["tokenizer.ggml.scores"], [0, 0, 0]).astype(np.float32),
    }
    text = "<|user|> \n hello<|end|>\n<|user|>a<|endoftext|> a"
    phi, other = (
        [tokens[t] for t in Tokenizer(sentencepiece(general__name=name, **changes)).encode(text, special=True)]
        for name in ("Phi-3 mini", "Psi 3")
    )
    assert phi == ["<s>", "<|user|>", "▁hello", "<|end|>", "<|user|>", "▁a", "<|endoftext|>", "▁", "▁a"]
    assert other[:6] == ["<s>", "<|user|>", "▁", "▁", "<0x0A>", "▁hello"]


# Damaged metadata


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokenizer__ggml__model": "bert"},
            NotImplementedError,
            "'bert', which is not supported; there are: 'gpt2', 'llama'",
        ),
        (
            {"tokenizer__ggml__pre": "tekken"},
            NotImplementedError,
            "'tekken', which is not supported; there are: .*smollm",
        ),
        ({"tokenizer__ggml__tokens": None}, GGUFError, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer__ggml__tokens": 7}, GGUFError, "tokenizer.ggml.tokens is 7; expected an array of strings"),
        ({"tokenizer__ggml__merges": None}, GGUFError, "tokenizer.ggml.merges is missing"),
        ({"tokenizer__ggml__merges": ["h"]}, GGUFError, "must be pairs of tokens"),
        ({"tokenizer__ggml__merges": ["h zz"]}, GGUFError, "must be pairs of tokens"),
        (
            {"tokenizer__ggml__token_type": np.ones(3, np.int32)},
            GGUFError,
            r"of shape \(3,\); expected a number for each of 265",
        ),
        ({"tokenizer__ggml__bos_token_id": 265}, GGUFError, "bos_token_id is 265; expected a token, 0 to 264"),
        ({"tokenizer__ggml__add_bos_token": 1}, GGUFError, "add_bos_token is 1; expected true or false"),
    ],
)
def test_damaged_metadata_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        Tokenizer(tiny_model.metadata(**changes))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores is missing"),
        (np.ones(3, np.float32), r"of shape \(3,\)"),
        (np.full(278, np.nan, np.float32), "NaN for token 0"),
    ],
)
def test_sentencepiece_needs_scores(scores, message):
    with pytest.raises(GGUFError, match=message):
        Tokenizer(sentencepiece(**{"tokenizer.ggml.scores": scores}))


# Chat templates


def render(source, messages=({"role": "user", "content": "é<"},), **values):
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(list(messages), **values)


def test_smollm2_writes_a_conversation_as_it_was_trained(smollm2):
    template = ChatTemplate(Tokenizer.from_gguf(smollm2).chat_template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert template.render(messages) == want + "<|im_start|>assistant\n"
    assert template.render(messages, add_generation_prompt=False) == want


def test_templates_find_what_they_rely_on():
    assert (
        render("{{ bos_token }}{{ messages | tojson }}{{ eos_token }}") == '<s>[{"role": "user", "content": "é<"}]</s>'
    )
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{% if tools %}x{% else %}none{% endif %}") == "none"
    assert render("{% if tools %}{{ tools[0] }}{% endif %}", tools=["t"]) == "t"
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert (
        render("{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% break %}{% endfor %}")
        == "1True1"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for %}", "line 2 of the chat template"),
        ("{{ nothing.here }}", "failed: UndefinedError: 'nothing' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "loops more than 1000000 times",
        ),
        ("{{ 'a' * 10000000000 }}", "repeats something 10000000000 times"),
        ("{{ 10 ** 1000000 }}", "to the power of 1000000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99) %}{{ 'a' * 1000000 }}{% endfor %}", "wrote more than 64000000 characters"),
    ],
)
def test_a_template_that_fails_says_how_and_one_that_runs_away_is_stopped(source, message):
    with pytest.raises(TemplateError, match=message):
        render(source)


# Sampling

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32))


def kept(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


@given(logits=LOGITS, k=st.integers(1, 50))
def test_top_k_keeps_the_k_largest(logits, k):
    result = kept(top_k(logits, k))
    assert result == set(np.argsort(-logits, kind="stable")[:k].tolist())


@given(logits=LOGITS, p=st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_tokens_of_that_probability(logits, p):
    probabilities, result = softmax(logits), kept(top_p(logits, p))
    total = probabilities[sorted(result)].sum()
    least = min(result, key=lambda token: probabilities[token])
    assert total >= p - 1e-9 or len(result) == len(logits)
    assert total - probabilities[least] < p + 1e-9


@given(logits=LOGITS, p=st.floats(0, 1))
def test_min_p_keeps_what_is_near_the_best(logits, p):
    probabilities, result = softmax(logits), kept(min_p(logits, p))
    for token, probability in enumerate(probabilities):
        if abs(probability - p * probabilities.max()) > 1e-6 * p * probabilities.max():
            assert (token in result) == (probability > p * probabilities.max())


@given(
    logits=LOGITS,
    k=st.integers(0, 10),
    p=st.floats(0.1, 1),
    least=st.floats(0, 1),
    temperature=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_a_sampler_chooses_among_what_every_filter_keeps(logits, k, p, least, temperature, seed):
    options = {"top_k": k, "top_p": p, "min_p": least, "seed": seed}
    token = Sampler(temperature, **options)(logits)
    assert token == Sampler(temperature, **options)(logits)
    allowed = kept(top_k(logits, k)) if k else set(range(len(logits)))
    assert token in allowed & kept(min_p(logits, least))
    if temperature == 0:
        assert token == int(np.argmax(logits))


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(1.0, seed=0)
    counts = np.bincount([sampler(logits) for _ in range(20000)], minlength=3) / 20000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.015  # four standard deviations
    cold = Sampler(0.5, seed=0)
    counts = np.bincount([cold(logits) for _ in range(20000)], minlength=3) / 20000
    assert np.abs(counts - np.array([0.25, 0.09, 0.04]) / 0.38).max() < 0.015


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([1.0, np.nan], r"logits\[1\] is nan, so no token can be chosen"),
        ([np.inf, 1.0], r"logits\[0\] is inf"),
        ([-np.inf, -np.inf], r"logits\[0\] is -inf"),
        ([], "logits are empty"),
        ([[1.0]], r"logits has shape \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_choice_are_refused(logits, message, temperature):
    with pytest.raises(ValueError, match=message):
        Sampler(temperature)(np.array(logits))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", np.nan),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("seed", -1),
    ],
)
def test_a_parameter_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Sampler(**{name: value})


def test_reading_tokens_loses_no_interrupt(tiny):
    """NumPy asks an enumeration's class for attributes, in Python, and takes Ctrl-C in there for "there is none"."""
    called = []
    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_filename))
    try:
        tiny.decode(range(30), special=True)
    finally:
        sys.setprofile(None)
    assert called and not [name for name in called if name.endswith("enum.py")]
