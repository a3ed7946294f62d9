"""Read the header of a GGUF file, strictly: every number in it is checked before it is used.

A header is a chain of counts and lengths, and a damaged one asks for 2^63 strings or for a tensor beyond
the end of the file.  Here no count is believed beyond what the bytes left in the file can hold, products are
Python integers, which don't wrap, and nothing is allocated that the file doesn't contain.

`gguf` supplies the numbers and names of types.  Its `GGUFReader` isn't used: after this check it would walk
the same bytes again and make several arrays for each token of the vocabulary, in seconds where this takes
milliseconds.  Arrays of numbers are views of the file, and strings are decoded when somebody asks for them.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import struct
from array import array
from typing import Any, NamedTuple, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys

from qattn import formats
from qattn.errors import FormatError, GGUFError
from qattn.gguf_strings import StringArray, decode

VERSIONS = (2, 3)  # alike but for version 3's big-endian variant
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME = 63  # bytes in a tensor's name: GGML_MAX_NAME less the final zero
MAX_WEIGHTS = 2**60 - 1  # their bytes, at most 8 each, must fit the signed 64-bit integers of ggml and NumPy

# The fewest bytes that an entry can take, so that a count can be held against the bytes left.
_LEAST_STRING = 8  # its length
_LEAST_ENTRY = 8 + 1 + 4 + 1  # length and one byte of a key, type, value
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # length of a name, number of dimensions, one of them, type, offset

_TYPE_NAMES = {int(number): number.name for number in GGMLQuantizationType}
_BLOCKS = {int(number): size for number, size in GGML_QUANT_SIZES.items()}
_BLOCKS[GGMLQuantizationType.Q8_1] = (32, 36)  # two f16 and 32 levels; gguf 0.19 says 40 bytes

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_DTYPES: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


class TensorInfo(NamedTuple):
    """What a header says about one tensor."""

    name: str
    type_id: int
    """ggml's number of the format."""
    shape: tuple[int, ...]
    """Slowest axis first, as in NumPy."""
    start: int
    """Its first byte, counted from the start of the file."""
    nbytes: int | None
    """None when the type, and with it the size of a block, is unknown."""

    @property
    def type_name(self) -> str:
        """The format's name, or "type 99" for a number that nobody here knows."""
        return _type_name(self.type_id)


class Header(NamedTuple):
    """The checked content of a header."""

    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def _type_name(type_id: int) -> str:
    try:
        return formats.by_type(type_id).name
    except FormatError:
        return _TYPE_NAMES.get(type_id, f"type {type_id}")


def _block(type_id: int) -> tuple[int, int] | None:
    """Return the weights and the bytes of a block of a ggml type, None for one that nobody here knows."""
    try:
        fmt = formats.by_type(type_id)
    except FormatError:
        return _BLOCKS.get(type_id)  # a tensor that can't be used still has a place in the file
    return fmt.block, fmt.bytes


def read_header(data: memoryview, path: str) -> Header:
    """Check and read the header of a GGUF file.

    Parameters
    ----------
    data : memoryview
        The whole file.
    path : str
        Its name, for messages.

    Raises
    ------
    GGUFError
        The file is no GGUF file, of a version or byte order that isn't read, cut off, or contradicts itself.
    """
    return _Reader(data, path).header()


class _Reader:
    """A position in the file that moves over what it reads, and refuses to pass the end."""

    def __init__(self, data: memoryview, path: str) -> None:
        self.data, self.path = data, path
        self.position, self.end = 0, len(data)

    def fail(self, message: str) -> NoReturn:
        raise GGUFError(f"{self.path}: {message}")

    # Pieces

    def take(self, count: int, what: str) -> memoryview:
        """Return the next `count` bytes."""
        start = self.position
        if count > self.end - start:
            self.fail(f"{what} takes {count} bytes from byte {start}, but the file ends at byte {self.end}")
        self.position = start + count
        return self.data[start : self.position]

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def count(self, least: int, what: str) -> int:
        """Read a number of things that take at least `least` bytes each."""
        count = self.u64(f"the number of {what}")
        most = (self.end - self.position) // least
        if count > most:
            self.fail(f"there should be {count} {what}, but the rest of the file holds at most {most}")
        return count

    def name(self, what: str) -> str:
        """Read a string that identifies something, so it must be text."""
        data = bytes(self.take(self.u64(f"the length of {what}"), what))
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {data[:64]!r}")

    # The header, top to bottom

    def header(self) -> Header:
        version = self.version()
        tensor_count = self.count(_LEAST_TENSOR, "tensors")
        metadata: dict[str, Any] = {}
        alignment = GGUF_DEFAULT_ALIGNMENT
        for index in range(self.count(_LEAST_ENTRY, "metadata entries")):
            key = self.name(f"the key of metadata entry {index}")
            if not key:
                self.fail(f"metadata entry {index} has an empty key")
            if key in metadata:
                self.fail(f"metadata has the key {key!r} twice")
            value_type = self.value_type(key)
            metadata[key] = self.value(key, value_type)
            if key == Keys.General.ALIGNMENT:
                alignment = self.alignment(value_type, metadata[key])
        tensors: dict[str, TensorInfo] = {}
        for index in range(tensor_count):
            tensor = self.tensor(index)
            if tensor.name in tensors:
                self.fail(f"there are two tensors named {tensor.name!r}")
            tensors[tensor.name] = tensor
        return Header(version, alignment, metadata, self.placed(tensors, alignment))

    def version(self) -> int:
        if not self.end:
            self.fail("the file is empty")
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            self.fail(f"not a GGUF file: it starts with {magic!r}, not with b'GGUF'")
        self.position = 4
        version = self.u32("the version")
        if version and not version & 0xFFFF:
            self.fail("a big-endian file, where little-endian is needed; convert it with gguf-convert-endian")
        if version not in VERSIONS:
            remedy = "a later qattn may" if version > max(VERSIONS) else "convert the original model again"
            self.fail(f"GGUF version {version}; qattn reads versions 2 and 3: {remedy}")
        return version

    def alignment(self, value_type: GGUFValueType, value: Any) -> int:
        if value_type != GGUFValueType.UINT32:
            self.fail(f"{Keys.General.ALIGNMENT} is of type {value_type.name}; it must be UINT32")
        if value < 1 or value & (value - 1):
            self.fail(f"{Keys.General.ALIGNMENT} is {value}; it must be a power of two")
        return int(value)

    # Metadata values

    def value_type(self, key: str) -> GGUFValueType:
        number = self.u32(f"the type of metadata {key!r}")
        try:
            return GGUFValueType(number)
        except ValueError:
            self.fail(f"metadata {key!r} is of type {number}; known: 0 to {int(max(GGUFValueType))}")

    def value(self, key: str, value_type: GGUFValueType) -> Any:
        what = f"metadata {key!r}"
        if value_type == GGUFValueType.STRING:
            return decode(self.take(self.u64(f"the length of {what}"), what))
        if value_type != GGUFValueType.ARRAY:
            return self.numbers(what, value_type, 1)[0].item()
        item_type = self.value_type(key)
        if item_type == GGUFValueType.ARRAY:
            self.fail(f"{what} is an array of arrays, which GGUF readers don't support")
        if item_type == GGUFValueType.STRING:
            return self.strings(what, self.count(_LEAST_STRING, f"strings in {what}"))
        count = self.count(_DTYPES[item_type].itemsize, f"values in {what}")
        return self.numbers(what, item_type, count)

    def numbers(self, what: str, item_type: GGUFValueType, count: int) -> np.ndarray[Any, Any]:
        dtype = _DTYPES[item_type]
        data = np.frombuffer(self.take(count * dtype.itemsize, what), "u1")
        if dtype == np.bool_ and (data > 1).any():
            self.fail(f"{what} has a truth value of {data[data > 1][0]}; it must be 0 or 1")
        return data.view(dtype)

    def strings(self, what: str, count: int) -> StringArray:
        """Walk over strings without decoding them: the hot loop of opening a file, 0.1 µs a string."""
        data, position, end = self.data, self.position, self.end
        starts = array("Q")
        append, unpack = starts.append, _U64.unpack_from
        try:
            for _ in itertools.repeat(None, count):
                append(position)
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):  # a length led past the end
            position = end + 1
        if position > end:
            self.fail(f"string {len(starts) - 1} of {what} goes on beyond the file's end at byte {end}")
        self.position = position
        return StringArray(data, starts)

    # Tensors

    def tensor(self, index: int) -> TensorInfo:
        """Read a tensor's entry; its `start` still counts from the first tensor."""
        name = self.name(f"the name of tensor {index}")
        what = f"tensor {name!r}"
        if len(name.encode()) > MAX_NAME:
            self.fail(f"{what} has a name of {len(name.encode())} bytes; at most {MAX_NAME} are allowed")
        dimensions = self.u32(f"the number of dimensions of {what}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"{what} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        lengths = [self.u64(f"dimension {axis} of {what}") for axis in range(dimensions)]
        type_id = self.u32(f"the type of {what}")
        start = self.u64(f"the offset of {what}")

        # Lengths beside a zero count as well: NumPy can't make an array of shape (0, 2^62) either.
        if math.prod(filter(None, lengths)) > MAX_WEIGHTS:
            self.fail(f"{what} has dimensions {lengths}; their product must stay below 2^60")
        shape, block = tuple(reversed(lengths)), _block(type_id)
        if block is None:
            return TensorInfo(name, type_id, shape, start, None)
        weights, size = block
        if lengths[0] % weights:
            blocks = f"{_type_name(type_id)} has blocks of {weights}"
            self.fail(f"{what} has rows of {lengths[0]} weights, but {blocks}")
        return TensorInfo(name, type_id, shape, start, math.prod(lengths) // weights * size)

    def placed(self, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Check where the tensors lie, and count their `start` from the start of the file."""
        first = -(-self.position // alignment) * alignment
        for name, tensor in tensors.items():
            what = f"tensor {name!r}"
            if tensor.start % alignment:
                self.fail(f"{what} has offset {tensor.start}, no multiple of the alignment {alignment}")
            start = first + tensor.start
            stop = start + (tensor.nbytes or 0)
            if stop > self.end:
                lies = f"{what} takes bytes {start} to {stop}, but the file ends at byte {self.end}"
                self.fail(f"{lies}; was it downloaded completely?")
            tensors[name] = tensor._replace(start=start)
        ranges = sorted((place.start, place.nbytes, name) for name, place in tensors.items() if place.nbytes)
        for (start, size, name), (following, _, other) in itertools.pairwise(ranges):
            if start + size > following:
                self.fail(f"tensors {name!r} and {other!r} overlap at byte {following}")
        return tensors
