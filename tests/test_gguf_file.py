"""Opening GGUF files: what a good one gives, and what that costs."""

import os
import pickle
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as GGML
from gguf.constants import GGUFValueType as Value

from qattn import gguf_file
from qattn.array import QuantArray
from qattn.capabilities import unsupported_tensors
from qattn.errors import FormatError, GGUFError
from tests.gguf_bytes import align, array, entry, file_of, small_model, tensor, text, two_tensors, write


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("small") / "small.gguf")


def test_tensors_equal_those_that_gguf_reads(small):
    model = gguf_file.open(small)
    reader = gguf.GGUFReader(small)
    assert list(model) == [tensor.name for tensor in reader.tensors]
    for expected in reader.tensors:
        assert model[expected.name].shape == tuple(reversed(expected.shape.tolist()))
        assert model[expected.name].format == expected.tensor_type.name
        values = gguf.quants.dequantize(expected.data, expected.tensor_type)
        np.testing.assert_array_equal(np.asarray(model[expected.name]), values)


def test_metadata_equals_what_gguf_reads(small):
    metadata = gguf_file.open(small).metadata
    reader = gguf.GGUFReader(small)
    assert list(metadata) == [name for name in reader.fields if not name.startswith("GGUF.")]
    for name, value in metadata.items():
        assert (list(value) if not np.isscalar(value) else value) == reader.fields[name].contents()
    assert type(metadata["bool"]) is bool
    assert type(metadata["uint64"]) is int
    assert metadata["ints"].dtype == np.int32


def test_mapping_answers_like_a_dict(small):
    model = gguf_file.open(str(small))
    assert len(model) == 4
    assert "q4_0" in model and "q5_0" not in model and 3 not in model
    assert model.get("q5_0") is None
    assert [w.format for w in model.values()] == ["F32", "F16", "Q4_0", "Q8_0"]
    assert model == model and model != gguf_file.open(small)
    with pytest.raises(KeyError, match="has no tensor 'q5_0'"):
        model["q5_0"]
    assert repr(model) == f"GGUFFile({str(small)!r}, architecture='llama', 4 tensors, 0.0 MB)"


def test_tensor_is_a_view_of_the_mapping(small):
    model = gguf_file.open(small)
    assert np.shares_memory(model["q4_0"].data, model["q4_0"].data)
    assert not model["q4_0"].data.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(model["f32"])[0] = 1


def test_version_2_is_read(tmp_path):
    content = file_of([entry("k", Value.INT8, b"\xff")], [tensor()], struct.pack("<4f", 1, 2, 3, 4), version=2)
    model = gguf_file.open(write(tmp_path, content))
    assert model.metadata == {"k": -1}
    assert np.asarray(model["w"]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("lengths", [(0,), (0, 4), (4, 0), (4, 2, 0), (0, 2**59)])
def test_zero_is_a_valid_dimension(tmp_path, lengths):
    w = gguf_file.open(write(tmp_path, file_of(tensors=[tensor(lengths=lengths)])))["w"]
    assert w.shape == lengths[::-1]
    assert np.asarray(w).shape == lengths[::-1]


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_alignment_of_the_file_is_kept_to(tmp_path, alignment):
    values = np.arange(8, dtype="<f4")
    content = file_of([align(alignment)], [tensor("ab", (8,))], values.tobytes(), alignment=alignment)
    model = gguf_file.open(write(tmp_path, content))
    assert model.tensors["ab"].start % alignment == 0
    np.testing.assert_array_equal(np.asarray(model["ab"]), values)


def test_gaps_and_any_order_of_tensors_are_valid(tmp_path):
    model = gguf_file.open(write(tmp_path, two_tensors(96, 32, 128)))
    assert model.tensors["a"].start == model.tensors["b"].start + 64


def test_bytes_that_are_no_text_show_as_escapes(tmp_path):
    strings = array("many", Value.STRING, 2, text(b"ok") + text(b"\xc3("))
    model = gguf_file.open(write(tmp_path, file_of([entry("one", Value.STRING, text(b"a\xffb")), strings])))
    assert model.metadata["one"] == "a\\xffb"
    assert list(model.metadata["many"]) == ["ok", "\\xc3("]


def test_string_array_is_a_sequence(tmp_path):
    words = [f"word {i}" for i in range(100)]
    strings = gguf_file.open(
        write(tmp_path, file_of([array("k", Value.STRING, 100, b"".join(map(text, words)))]))
    ).metadata["k"]
    assert len(strings) == 100
    assert strings == words and strings != words[:-1] and strings != "words"
    assert strings[3] == "word 3" and strings[-1] == "word 99"
    assert strings[10:30:5] == words[10:30:5]
    assert "word 7" in strings and strings.index("word 7") == 7
    assert repr(strings) == "['word 0', 'word 1', 'word 2', ...] (100 strings)"
    assert repr(strings[:2]) == "['word 0', 'word 1']"
    assert pickle.loads(pickle.dumps(strings)) == words
    with pytest.raises(IndexError):
        strings[100]


# Formats that qattn doesn't know


@pytest.mark.parametrize(
    ("type_id", "name"),
    [(99, "type 99"), (4, "type 4"), (GGML.Q8_1, "Q8_1"), (GGML.Q8_K, "Q8_K"), (GGML.I32, "I32")],
)
def test_unknown_format_is_told_when_the_tensor_is_taken(tmp_path, type_id, name):
    lengths, size = (256,), 2048
    content = file_of(tensors=[tensor("good"), tensor("odd", lengths, type_id, 32)], data=bytes(32 + size))
    model = gguf_file.open(write(tmp_path, content))
    assert np.asarray(model["good"]).tolist() == [0] * 4
    assert unsupported_tensors(model) == {"odd": name}
    with pytest.raises(FormatError, match=f"^odd is {name}; known: BF16, .*Q4_0") as caught:
        model["odd"]
    assert "Q8_K" not in str(caught.value).partition("known")[2]


def test_block_of_q8_1_has_36_bytes(tmp_path):
    def content(size):
        return file_of(tensors=[tensor(lengths=(64,), type_id=GGML.Q8_1)], data=bytes(size))

    assert gguf_file.open(write(tmp_path, content(72))).tensors["w"].nbytes == 72
    with pytest.raises(GGUFError, match="file ends"):
        gguf_file.open(write(tmp_path, content(71)))


# What opening costs


def test_ten_gigabytes_open_without_being_read(tmp_path):
    size = 10 * 2**30
    path = write(tmp_path, file_of(tensors=[tensor(lengths=(size // 4096, 1024))]))
    os.truncate(path, path.stat().st_size + size)  # a hole: the file system stores nothing for it
    tracemalloc.start()
    try:
        w = gguf_file.open(path)["w"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert w.nbytes == size
    assert peak < 100_000


def test_opening_keeps_only_the_places_of_strings(tmp_path):
    words = b"".join(text(f"a token of some length, number {i}") for i in range(20_000))
    path = write(tmp_path, file_of([array("tokens", Value.STRING, 20_000, words)]))
    tracemalloc.start()
    try:
        model = gguf_file.open(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.metadata["tokens"][19_999] == "a token of some length, number 19999"
    assert kept < 20_000 * 8 * 1.2 + 50_000  # eight bytes a string, and what `array` keeps in reserve
    assert peak < 2.2 * kept


def mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is mapped")
def test_mapping_goes_with_its_last_array(small):
    with gguf_file.open(small) as model:
        w = model["q4_0"]
    assert mapped(small)
    values = np.asarray(w)
    assert values.shape == (2, 4, 64)
    del w
    assert not mapped(small)


def test_closed_file_says_so(small):
    model = gguf_file.open(small)
    model.close()
    with pytest.raises(ValueError, match="was closed; open it again"):
        model["f32"]


# Files that aren't there


def test_missing_file_and_directory_are_the_systems_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        gguf_file.open(tmp_path / "nothing.gguf")
    with pytest.raises(OSError):
        gguf_file.open(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file_is_the_systems_error(small, tmp_path):
    path = write(tmp_path, small.read_bytes())
    path.chmod(0)
    with pytest.raises(PermissionError):
        gguf_file.open(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_rather_than_waited_for(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(GGUFError, match="not a regular file"):
        gguf_file.open(path)


# Split models


def split_part(number, count, name, value):
    entries = [
        entry("split.no", Value.UINT16, struct.pack("<H", number)),
        entry("split.count", Value.UINT16, struct.pack("<H", count)),
    ]
    return file_of(entries, [tensor(name)], struct.pack("<4f", *[value] * 4))


def test_parts_of_a_split_model_open_as_one(tmp_path):
    for number in (2, 1, 0):
        path = write(tmp_path, split_part(number, 3, f"w{number}", number), f"m-{number + 1:05}-of-00003.gguf")
    model = gguf_file.open(path)
    assert {name: np.asarray(w)[0] for name, w in model.items()} == {"w0": 0, "w1": 1, "w2": 2}


def test_missing_part_is_named(tmp_path):
    path = write(tmp_path, split_part(0, 2, "w0", 0), "m-00001-of-00002.gguf")
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002\.gguf"):
        gguf_file.open(path)


@pytest.mark.parametrize(
    ("first", "second", "name", "message"),
    [
        ((0, 2), (1, 2), "model.gguf", "name must end in -00001-of-00002.gguf"),
        ((1, 2), (1, 2), "m-00002-of-00002.gguf", "open m-00001-of-00002.gguf"),
        ((0, 2), (0, 2), "m-00001-of-00002.gguf", "header says part 1, its name part 2"),
    ],
)
def test_part_in_the_wrong_place_is_refused(tmp_path, first, second, name, message):
    write(tmp_path, split_part(*second, "w1", 1), "m-00002-of-00002.gguf")
    with pytest.raises(GGUFError, match=message):
        gguf_file.open(write(tmp_path, split_part(*first, "w0", 0), name))


def test_tensor_in_two_parts_is_refused(tmp_path):
    write(tmp_path, split_part(1, 2, "w", 1), "m-00002-of-00002.gguf")
    with pytest.raises(GGUFError, match=r"m-00002-of-00002\.gguf: tensor 'w' is in an earlier part too"):
        gguf_file.open(write(tmp_path, split_part(0, 2, "w", 0), "m-00001-of-00002.gguf"))


def test_split_count_of_the_wrong_type_is_refused(tmp_path):
    content = file_of([entry("split.count", Value.STRING, text("2"))])
    with pytest.raises(GGUFError, match=r"split\.count is '2'; it must be an integer"):
        gguf_file.open(write(tmp_path, content))


def test_array_of_a_file_outlives_it_in_a_pickle(small, tmp_path):
    copy = small_model(tmp_path / "copy.gguf")
    data = pickle.dumps(gguf_file.open(copy)["q4_0"])
    copy.unlink()
    w = pickle.loads(data)
    assert isinstance(w, QuantArray)
    np.testing.assert_array_equal(w.data, gguf_file.open(small)["q4_0"].data)
