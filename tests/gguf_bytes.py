"""GGUF files for tests: byte by byte, so that any byte can be wrong, and a small valid one by `gguf`."""

import struct

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as GGML
from gguf.constants import GGUFValueType as Value


def u32(value):
    return struct.pack("<I", value % 2**32)


def u64(value):
    return struct.pack("<Q", value % 2**64)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return u64(len(data)) + data


def entry(key, value_type, payload):
    """One metadata entry: its value type is a number, its value is bytes."""
    return text(key) + u32(value_type) + payload


def array(key, item_type, count, payload=b""):
    return entry(key, Value.ARRAY, u32(item_type) + u64(count) + payload)


def tensor(name="w", lengths=(4,), type_id=GGML.F32, offset=0, dimensions=None):
    """One tensor entry; lengths as in the file, fastest axis first."""
    count = len(lengths) if dimensions is None else dimensions
    return text(name) + u32(count) + b"".join(map(u64, lengths)) + u32(type_id) + u64(offset)


def file_of(entries=(), tensors=(), data=b"", *, version=3, counts=(None, None), alignment=32):
    """A GGUF file of the given entries; `counts` overrides the numbers of tensors and of metadata entries."""
    tensor_count, entry_count = counts
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if tensor_count is None else tensor_count)
    head += u64(len(entries) if entry_count is None else entry_count)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def align(value, value_type=Value.UINT32):
    return entry("general.alignment", value_type, u32(value))


def two_tensors(first, second, size):
    return file_of(tensors=[tensor("a", (8,), offset=first), tensor("b", (8,), offset=second)], data=bytes(size))


def write(folder, content, name="model.gguf"):
    """Write bytes to a file, and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path


def small_model(path):
    """Write a file with a value of every type and a few tensors, by `gguf` itself."""
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(name, 7)
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "zwölf")
    writer.add_array("strings", ["eins", "", "drei €"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("bools", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("f32", rng.standard_normal((3, 8), np.float32))
    writer.add_tensor("f16", rng.standard_normal(8).astype(np.float16))
    rows = rng.standard_normal((2, 4, 64), np.float32)
    writer.add_tensor("q4_0", gguf.quantize(rows, GGML.Q4_0), raw_dtype=GGML.Q4_0)
    writer.add_tensor("q8_0", gguf.quantize(rows[0], GGML.Q8_0), raw_dtype=GGML.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
