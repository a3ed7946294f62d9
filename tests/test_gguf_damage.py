"""Bad GGUF files: each is refused with its reason, at once and without taking memory for it."""

import struct
import tracemalloc

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as GGML
from gguf.constants import GGUFValueType as Value
from hypothesis import given, settings
from hypothesis import strategies as st

from qattn import gguf_file
from qattn.capabilities import unsupported_tensors
from qattn.errors import FormatError, GGUFError
from tests.gguf_bytes import align, array, entry, file_of, small_model, tensor, text, two_tensors, u32, u64, write

BAD = {
    "empty file": (b"", "the file is empty"),
    "another kind of file": (b"\x7fELF" + bytes(60), r"not a GGUF file: it starts with b'\\x7fELF'"),
    "magic alone": (b"GGUF", "the version takes 4 bytes from byte 4, but the file ends at byte 4"),
    "magic reversed": (b"FUGG" + file_of()[4:], "not a GGUF file: it starts with b'FUGG'"),
    "version 0": (file_of(version=0), "GGUF version 0; qattn reads versions 2 and 3"),
    "version 1": (file_of(version=1), "GGUF version 1; .*convert the original model again"),
    "future version": (file_of(version=4), "GGUF version 4; .*a later qattn may"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian .*gguf-convert-endian"),
    "tensor count -1": (file_of(counts=(-1, None)), "should be 18446744073709551615 tensors, .*at most 0"),
    "key count -1": (file_of(counts=(None, -1)), "should be 18446744073709551615 metadata entries"),
    "tensor count beyond the file": (file_of(counts=(1, 0)), "should be 1 tensors, .*at most 0"),
    "key count beyond the file": (file_of(counts=(0, 2)), "should be 2 metadata entries"),
    # Keys
    "key size -1": (
        file_of([u64(-1) + b"key" + u32(Value.UINT8) + b"\1"]),
        "key of metadata entry 0 takes 18446744073709551615 bytes",
    ),
    "empty key": (file_of([entry("", Value.UINT8, b"\1")]), "metadata entry 0 has an empty key"),
    "duplicate key": (file_of([entry("k", Value.UINT8, b"\1")] * 2), "metadata has the key 'k' twice"),
    "key no text": (
        file_of([entry(b"k\xff", Value.UINT8, b"\1")]),
        r"key of metadata entry 0 is not UTF-8: b'k\\xff'",
    ),
    # Values
    "unknown value type": (file_of([entry("k", 13, bytes(8))]), "metadata 'k' is of type 13; known: 0 to 12"),
    "unknown item type": (file_of([array("k", 99, 1, bytes(8))]), "metadata 'k' is of type 99"),
    "truth value 2": (
        file_of([entry("k", Value.BOOL, b"\2")]),
        "'k' has a truth value of 2; it must be 0 or 1",
    ),
    "truth value 2 in an array": (
        file_of([array("k", Value.BOOL, 3, b"\0\1\7")]),
        "'k' has a truth value of 7",
    ),
    "string longer than the file": (
        file_of([entry("k", Value.STRING, u64(1000) + b"abc")]),
        "metadata 'k' takes 1000 bytes",
    ),
    "string of length -1": (file_of([entry("k", Value.STRING, u64(-1))]), "metadata 'k' takes 184467440737"),
    "array of length 2^63": (
        file_of([array("k", Value.UINT8, 2**63)]),
        "should be 9223372036854775808 values in metadata 'k'",
    ),
    "string array of length 2^63": (
        file_of([array("k", Value.STRING, 2**63)]),
        "should be 9223372036854775808 strings in metadata 'k'",
    ),
    "array whose bytes wrap": (file_of([array("k", Value.FLOAT64, 2**61 + 1)]), "2305843009213693953 values"),
    "string in an array longer than the file": (
        file_of([array("k", Value.STRING, 2, text("a") + u64(1000) + b"b")]),
        "string 1 of metadata 'k' goes on beyond the file's end",
    ),
    "string in an array of length -1": (
        file_of([array("k", Value.STRING, 2, text("a") + u64(-1) + b"b")]),
        "string 1 of metadata 'k' goes on beyond the file's end",
    ),
    "string in an array whose length wraps back": (
        file_of([array("k", Value.STRING, 2, u64(2**64 - 8) + text("b"))]),
        "string 0 of metadata 'k' goes on beyond the file's end",
    ),
    "last string in an array longer than the file": (
        file_of([array("k", Value.STRING, 1, u64(1000) + b"b")]),
        "string 0 of metadata 'k' goes on beyond the file's end",
    ),
    "nested arrays": (
        file_of([array("k", Value.ARRAY, 1, u32(Value.UINT8) + u64(1) + b"\1")]),
        "metadata 'k' is an array of arrays",
    ),
    # Alignment
    "alignment 0": (file_of([align(0)]), "general.alignment is 0; it must be a power of two"),
    "alignment 48": (file_of([align(48)]), "general.alignment is 48; it must be a power of two"),
    "alignment of the wrong type": (
        file_of([align(32, Value.INT32)]),
        "general.alignment is of type INT32; it must be UINT32",
    ),
    "alignment not kept to": (
        two_tensors(0, 40, 128),
        "tensor 'b' has offset 40, no multiple of the alignment 32",
    ),
    "own alignment not kept to": (
        file_of([align(64)], [tensor("a", (8,)), tensor("b", (8,), offset=32)], bytes(128)),
        "tensor 'b' has offset 32, no multiple of the alignment 64",
    ),
    # Names
    "tensor name too long": (
        file_of(tensors=[tensor("n" * 64)], data=bytes(16)),
        "has a name of 64 bytes; at most 63",
    ),
    "tensor name of length -1": (
        file_of(tensors=[u64(-1) + bytes(24)]),
        "the name of tensor 0 takes 18446744073709551615 bytes",
    ),
    "tensor name no text": (
        file_of(tensors=[tensor(b"\xc3(")], data=bytes(16)),
        "name of tensor 0 is not UTF-8",
    ),
    "duplicate tensor": (
        file_of(tensors=[tensor("a"), tensor("a", offset=32)], data=bytes(64)),
        "two tensors named 'a'",
    ),
    # Shapes
    "no dimension": (
        file_of(tensors=[tensor(lengths=()) + bytes(8)]),
        "'w' has 0 dimensions; 1 to 4 are allowed",
    ),
    "5 dimensions": (file_of(tensors=[tensor(lengths=(1,) * 5)], data=bytes(64)), "'w' has 5 dimensions"),
    "2^31 dimensions": (file_of(tensors=[tensor(dimensions=2**31)]), "'w' has 2147483648 dimensions"),
    "negative dimension": (
        file_of(tensors=[tensor(lengths=(4, -1))], data=bytes(64)),
        r"must stay below 2\^60",
    ),
    "two negative dimensions": (file_of(tensors=[tensor(lengths=(-4, -1))], data=bytes(64)), r"below 2\^60"),
    "element count that wraps": (
        file_of(tensors=[tensor(lengths=(4194305, 4194305, 211106198978564))], data=bytes(64)),
        r"has dimensions \[4194305, 4194305, 211106198978564\]; their product must stay below 2\^60",
    ),
    "byte count that wraps": (
        file_of(tensors=[tensor(lengths=(4, 2**30 - 1, 2**30 + 1))], data=bytes(64)),
        r"their product must stay below 2\^60",
    ),
    "zero beside lengths that wrap": (
        file_of(tensors=[tensor(lengths=(0, 2**40, 2**40))]),
        r"their product must stay below 2\^60",
    ),
    "rows that don't fit the blocks": (
        file_of(tensors=[tensor(lengths=(48, 2), type_id=GGML.Q4_0)], data=bytes(54)),
        "'w' has rows of 48 weights, but Q4_0 has blocks of 32",
    ),
    # Places
    "offset past the end": (
        file_of(tensors=[tensor(offset=64)], data=bytes(16)),
        "'w' takes bytes 128 to 144, but the file ends at byte 80; was it downloaded completely?",
    ),
    "offset 2^40": (file_of(tensors=[tensor(offset=2**40)], data=bytes(16)), "takes bytes 1099511627840 to"),
    "offset + size that wraps": (
        file_of(tensors=[tensor(offset=2**64 - 32)], data=bytes(64)),
        "takes bytes 18446744073709551648 to",
    ),
    "offset of an unknown type past the end": (
        file_of(tensors=[tensor(type_id=99, offset=2**40)], data=bytes(16)),
        "takes bytes 1099511627840 to",
    ),
    "size past the end": (file_of(tensors=[tensor(lengths=(5,))], data=bytes(16)), "takes bytes 64 to 84"),
    "size of an unsupported type past the end": (
        file_of(tensors=[tensor(lengths=(32,), type_id=GGML.Q8_1)], data=bytes(35)),
        "takes bytes 64 to 100, but the file ends at byte 99",
    ),
    "same place": (two_tensors(0, 0, 64), "tensors 'a' and 'b' overlap at byte 96"),
    "overlapping": (
        file_of(tensors=[tensor("b", offset=32), tensor("a", (9,))], data=bytes(64)),
        "tensors 'a' and 'b' overlap at byte 128",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_file_is_refused_with_its_reason(tmp_path, content, message):
    path = write(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message) as caught:
            gguf_file.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert peak < 1_000_000


def test_file_cut_off_anywhere_is_refused(tmp_path):
    entries = [entry("k", Value.STRING, text("v")), array("a", Value.STRING, 2, text("x") + text("yy"))]
    content = file_of([*entries, array("n", Value.INT16, 2, bytes(4))], [tensor(lengths=(8,))], bytes(32))
    assert len(gguf_file.open(write(tmp_path, content))) == 1
    for size in range(len(content)):
        with pytest.raises(GGUFError):
            gguf_file.open(write(tmp_path, content[:size], f"{size}.gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("small") / "small.gguf")


EXTREMES = [0, 1, 4, 5, 13, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where, as a share of the header's or the file's length
        st.sampled_from(["byte", "u32", "u64"]),
        st.one_of(st.integers(0, 255), st.sampled_from(EXTREMES)),
    ),
    max_size=4,
)


@settings(max_examples=500)
@given(changes=CHANGES, within=st.sampled_from([24, 800, 10_000]), cut=st.none() | st.floats(0, 1))
def test_damaged_file_is_refused_or_valid(small, changes, within, cut):
    content = bytearray(small.read_bytes())
    for where, width, value in changes:
        place = int(where * min(within, len(content)))
        data = {"byte": bytes([value % 256]), "u32": u32(value), "u64": u64(value)}[width]
        content[place : place + len(data)] = data[: len(content) - place]
    path = small.with_name("damaged.gguf")
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    tracemalloc.start()
    try:
        use_everything(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def use_everything(path):
    """Open a file and look at all of it, unless it is refused as it should be."""
    try:
        model = gguf_file.open(path)
    except GGUFError:
        return
    repr(model)
    for value in model.metadata.values():
        repr(value)
        if not np.isscalar(value):
            list(value)
    refused = unsupported_tensors(model)
    for name, info in model.tensors.items():
        if name in refused:
            with pytest.raises(FormatError):
                model[name]
        else:
            assert np.asarray(model[name]).shape == info.shape
