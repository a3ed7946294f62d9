"""PackedMatrix: quantized rows taken apart into levels, scales and offsets, and laid out for the kernels.

A format is forgotten here: what is left of it is a `Layout`, and rows of equal layouts are packed
together, wherever they stood.  Nothing is rounded: `unpack` gives back what was in the file.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from qattn import devices, formats
from qattn.array import QuantArray
from qattn.cpu import pack as cpu
from qattn.cpu.matmul import wants_signed
from qattn.cpu.scratch import zeros
from qattn.cpu.simd import LANES
from qattn.errors import DeviceError
from qattn.formats import Planes
from qattn.layout import CELL, Layout, Packed

Array = np.ndarray[Any, Any]
_PART = 1 << 18  # bytes of rows that are packed at once: they take far longer than waking a thread


class Part(NamedTuple):
    """Rows of a matrix that have one format."""

    format: formats.Format
    layout: Layout
    packed: Packed


class PackedMatrix:
    """Weights (rows, columns) in the layout that the kernels of this machine read.

    Parameters
    ----------
    weights : QuantArray or array of floats (rows, columns)
        Quantized rows, of several formats if they are stacked.  Floats are kept as float32 or float16.

    Raises
    ------
    ValueError
        If the weights don't have two axes.
    DeviceError
        If they are on a GPU: packing is work for the CPU, and `to` moves the result.
    """

    def __init__(self, weights: QuantArray | Array) -> None:
        if not isinstance(weights, QuantArray):
            weights = _float_rows(np.asarray(weights))
        if weights.ndim != 2:
            raise ValueError(f"weights have shape {weights.shape}; a packed matrix needs (rows, columns)")
        if weights.device != "cpu":
            raise DeviceError(f"the weights are on {weights.device}, and are packed on the CPU: .to('cpu')")
        self.shape: tuple[int, int] = (weights.shape[0], weights.shape[1])
        chosen: dict[str, list[tuple[int, QuantArray]]] = {}
        first = 0
        for part in weights.parts:
            chosen.setdefault(part.format, []).append((first, part))
            first += len(part)
        self.device = "cpu"
        """Where the packed weights are: "cpu", "cuda:0", …"""
        self.parts = tuple(_pack_part(name, rows, self.shape[1]) for name, rows in chosen.items())

    def to(self, device: str) -> PackedMatrix:
        """The same weights on another device; itself if they are there.

        Raises
        ------
        DeviceError
            If the device can't be used.
        """
        device = devices.resolve(device)
        if device == self.device:
            return self
        moved = copy.copy(self)
        with devices.current(device):
            moved.device, moved.parts = device, tuple(_moved(part, device) for part in self.parts)
        return moved

    @property
    def format(self) -> str:
        """The name of the format that the weights came in, or "mixed"."""
        return self.parts[0].format.name if len(self.parts) == 1 else "mixed"

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(array.nbytes for part in self.parts for array in part.packed if not isinstance(array, int))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layout of each part."""
        return tuple(part.layout for part in self.parts)

    def divisible(self, heads: int) -> bool:
        """Whether the rows of each of so many heads are tiles of their own."""
        return len(self.parts) == 1 and self.shape[0] % (heads * LANES) == 0

    def __repr__(self) -> str:
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"PackedMatrix(shape={self.shape}, format={self.format!r}, {self.nbytes / 1e6:.1f} MB{where})"

    def __len__(self) -> int:
        return self.shape[0]

    def unpack(self) -> tuple[Planes, ...]:
        """Levels, scales and offsets of each part, in the order of its rows; not for parts that are floats."""
        if self.device != "cpu":
            raise DeviceError(f"the weights are on {self.device}; unpack them on the CPU: .to('cpu').unpack()")
        return tuple(_unpack_part(part) for part in self.parts if not part.format.is_float)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """The weights, dequantized to float32."""
        if copy is False:
            raise ValueError("dequantizing makes a copy; use copy=None")
        if self.device != "cpu":
            raise TypeError(f"the weights are on {self.device}, and NumPy can't read them there; use .to('cpu')")
        values = np.empty(self.shape, np.float32)
        for part in self.parts:
            values[part.packed.targets] = part_values(part)
        return values if dtype is None else values.astype(dtype, copy=False)


def _float_rows(weights: Array) -> QuantArray:
    if weights.dtype != np.float16:
        weights = weights.astype(np.float32)
    weights = np.ascontiguousarray(weights)
    if weights.ndim != 2:
        raise ValueError(f"weights have shape {weights.shape}; a packed matrix needs (rows, columns)")
    return QuantArray(weights.view(np.uint8), "F16" if weights.dtype == np.float16 else "F32")


def _pack_part(name: str, rows: list[tuple[int, QuantArray]], columns: int) -> Part:
    fmt = formats.get(name)
    targets = np.concatenate([np.arange(first, first + len(array)) for first, array in rows]).astype(np.int32)
    data = rows[0][1].data if len(rows) == 1 else np.concatenate([array.data for _, array in rows])
    if fmt.is_float:
        return _pack_floats(fmt, data, targets, columns)
    layout, table = _layout(fmt)
    packed = _allocate(layout, targets, columns, table)
    flip = 128 if layout.signed and fmt.table is None else 0
    run = cpu.pack(fmt, layout, flip)
    run(data, _stored(fmt, fmt.scale_unit), _stored(fmt, fmt.offset_unit), packed, parts=1 + data.nbytes // _PART)
    return Part(fmt, layout, packed)


def layout_of(fmt: formats.Format) -> Layout:
    """How weights of a block format are packed."""
    return _layout(fmt)[0]


def _layout(fmt: formats.Format) -> tuple[Layout, Array]:
    """The kernel's layout for a format, and the table that its codes index."""
    signed, up, shared, table = False, 0, 0, np.zeros(64, np.uint8)
    progression = _progression(fmt.table, 2 if fmt.shared else 1) if fmt.table else None
    if fmt.table is None:
        zero, signed = fmt.zero, wants_signed(fmt.bits, 2**fmt.bits - 1)
    elif progression:
        zero, up, shared = progression
    else:
        zero = -min(0, *fmt.table)
        signed = wants_signed(8, zero + max(fmt.table))
        shifted = np.array(fmt.table) + (0 if signed else zero)
        table = np.resize(np.append(shifted, [0] * 16)[: 1 << fmt.bits], 64).astype(np.uint8)
    stepped = fmt.step is not None
    layout = Layout(
        bits=fmt.bits - (fmt.shared is not None),
        table=bool(table.any()),
        group=fmt.group,
        base_group=fmt.block if stepped else fmt.group,
        base="f16" if fmt.scale_type == "f16" else "bf16",
        step=stepped,
        down=1 - math.frexp(abs(fmt.scale_unit))[1],
        up=up,
        shared=shared,
        offset=fmt.offset_bits is not None,
        paired=fmt.paired,
        zero=0 if signed else zero,
        signed=signed,
    )
    return layout, table


def _progression(table: tuple[int, ...], halves: int) -> tuple[int, int, int] | None:
    """(zero, up, shared) if each half of a table goes up by the same power of two: see `Layout`."""
    levels = np.array(table).reshape(halves, -1)
    between, shared = np.diff(levels), levels[-1, 0] - levels[0, 0]
    up = int(between.flat[0]).bit_length() - 1
    if (between != 1 << up).any():
        return None
    return -int(levels[0, 0]), up, int(shared)


def _allocate(layout: Layout, targets: Array, columns: int, table: Array) -> Packed:
    tiles = -(-len(targets) // LANES)
    bases = (tiles, columns // layout.base_group, LANES)
    steps = (tiles, columns // layout.group, LANES)
    none = (tiles, 0, LANES)
    return Packed(
        codes=zeros((tiles, columns // CELL, 64 * layout.bits), np.uint8),
        scales=zeros(bases, np.uint16),
        steps=zeros(steps if layout.step else none, np.int8),
        offsets=zeros(bases if layout.offset else none, np.uint16),
        offset_steps=zeros(steps if layout.step and layout.offset and not layout.paired else none, np.int8),
        table=table,
        targets=targets,
        rows=len(targets),
    )


def _moved(part: Part, device: str) -> Part:
    """Copy a part's arrays to a device."""
    arrays: list[Any] = [array if isinstance(array, int) else devices.copied(array, device) for array in part.packed]
    if device == "cpu":
        arrays[0], codes = zeros(arrays[0].shape, arrays[0].dtype), arrays[0]
        arrays[0][...] = codes
    return part._replace(packed=Packed(*arrays))


@functools.cache
def _stored(fmt: formats.Format, unit: float) -> Array:
    """What each pattern of a base scale's or an offset's bits is stored as: exact, with the sign of its unit."""
    values = fmt.values(math.copysign(1.0, unit))
    if fmt.scale_type == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _pack_floats(fmt: formats.Format, data: Array, targets: Array, columns: int) -> Part:
    """Lay float rows out in tiles of 16 rows, an element of each row side by side."""
    dtype: Any = fmt.dtype  # not None: the weights are floats
    values = data.view(dtype)
    if fmt.name == "F64":
        values = values.astype(np.float32)
    tiles = -(-len(targets) // LANES)
    base = {"F16": "f16", "BF16": "bf16"}.get(fmt.name, "f32")
    codes = zeros((tiles, columns, LANES), np.float32 if base == "f32" else np.uint16)
    full = len(targets) // LANES
    stored = values.view(codes.dtype)
    codes[:full] = stored[: full * LANES].reshape(full, LANES, columns).transpose(0, 2, 1)
    if full < tiles:
        codes[full, :, : len(targets) - full * LANES] = stored[full * LANES :].T
    none16, none8 = np.empty((tiles, 0, LANES), np.uint16), np.empty((tiles, 0, LANES), np.int8)
    table = np.zeros(64, np.uint8)
    packed = Packed(codes, none16, none8, none16, none8, table, targets, len(targets))
    return Part(fmt, Layout(bits=16 if base != "f32" else 32, base=base), packed)


def _unpack_part(part: Part) -> Planes:
    fmt, layout, packed = part
    codes = cpu.unpack_codes(packed, layout)
    if fmt.table is not None:
        levels = np.resize(np.array(fmt.table, np.int16), 256)[codes]
    elif layout.signed:
        levels = (codes ^ 128).astype(np.int16) - fmt.zero
    else:
        levels = codes.astype(np.int16) - fmt.zero
    return Planes(levels, *cpu.unpack_groups(packed, layout))


def part_values(part: Part) -> Array:
    """The weights of a part on the CPU, dequantized to float32, in the order of its rows."""
    if part.format.is_float:
        columns = part.packed.codes.shape[1]
        rows = part.packed.codes.transpose(0, 2, 1).reshape(-1, columns)[: part.packed.rows]
        if part.layout.base == "f16":
            return rows.view(np.float16).astype(np.float32)
        return rows if part.layout.base == "f32" else (rows.astype(np.uint32) << 16).view(np.float32)
    planes = _unpack_part(part)
    values = planes.levels.astype(np.float32) * np.repeat(planes.scale, part.layout.group, axis=1)
    if planes.offset is not None:
        values += np.repeat(planes.offset, part.layout.group, axis=1)
    return values
