"""Read PTX text into one flat list of instructions of each entry.

Labels become positions in the list, registers become numbers, and addresses of variables become integers.  This reads
what NVVM makes of a kernel: one entry that calls nothing, whose names are unique, and which has no local memory.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Type(NamedTuple):
    """A fundamental type.  kind is "int", "float", "bf16" or "pred"; lanes is 2 for packed pairs."""

    name: str
    kind: str
    bits: int
    dtype: np.dtype
    lanes: int = 1


TYPES = {
    type_.name: type_
    for type_ in (
        Type("pred", "pred", 1, np.dtype(bool)),
        *(Type(f"{sign}{n}", "int", n, np.dtype(f"u{n // 8}")) for sign in "bu" for n in (8, 16, 32, 64)),
        *(Type(f"s{n}", "int", n, np.dtype(f"i{n // 8}")) for n in (8, 16, 32, 64)),
        *(Type(f"f{n}", "float", n, np.dtype(f"f{n // 8}")) for n in (16, 32, 64)),
        Type("f16x2", "float", 32, np.dtype(np.float16), 2),
        Type("bf16", "bf16", 16, np.dtype(np.float32)),
        Type("bf16x2", "bf16", 32, np.dtype(np.float32), 2),
    )
}
IGNORED = re.compile(r"//.*|^\s*\.(?:version|target|address_size)\b.*", re.MULTILINE)
ENTRY = re.compile(r"\.visible\s+\.entry\s+([$\w]+)\s*\(([^)]*)\)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
LABEL = re.compile(r"([$\w]+): ?")
DECLARATION = re.compile(
    r"(?:\.(?:visible|common) )*\.(reg|global|const|shared|local) (?:\.align (\d+) )?\.(\w+) ([^=]+)(?:= \{(.*)\})?"
)
NAME = re.compile(r"([$%\w]+)(?:<(\d+)>)?(?:\[(\d*)\])?")  # %r<4> declares %r0 to %r3
STATEMENT = re.compile(r"(?:@(!?[$%\w]+) )?([a-z]\w*)((?:\.\w+)*) ?(.*)")
OPERAND = re.compile(r"\{.*?\}|\[.*?\]|[^\s,]+")
ADDRESS = re.compile(r"\[ ?([^\s+-]+) ?\+? ?(-?\w*) ?\]")
NUMBER = re.compile(r"0[fFdD]([0-9a-fA-F]+)|(-?\d\w*)")
SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]|%dynamic_smem_size")

SLOT, FIRST_SLOT = 40, 1  # arrays lie 2**40 bytes apart, each in the middle of its slot
DEFINE_NOTHING = {"ret", "trap", "st", "red", "bra", "bar", "cp"}

Reg = namedtuple("Reg", "number width name negated", defaults=[False])  # width 1: a predicate, negated by "!" before it
Imm = namedtuple("Imm", "value")  # an integer, the bits of a float, the address of a variable, the position of a label
Special = namedtuple("Special", "name")  # %tid.x
Param = namedtuple("Param", "name")  # [parameter]
Mem = namedtuple("Mem", "base offset")  # [base + offset]; base is a Reg or an Imm


class PTXError(Exception):
    """PTX that cannot be understood, or a thread that did something undefined."""


@dataclass
class Instruction:
    """One instruction.

    operands : {a, b} is a list, and so are the two results a|b; None stands for _
    live : bits of the registers whose values are needed before it
    kind, run, members : filled in by decoding; members reads the member mask of what a warp does together
    """

    line: int
    text: str
    op: str
    mods: list[str] = field(default_factory=list)
    operands: list[Any] = field(default_factory=list)
    guard: Reg | None = None
    live: int = 0
    kind: str = "plain"
    run: Any = None
    members: Any = None

    @property
    def types(self) -> list[Type]:
        """The types among the modifiers."""
        return [TYPES[mod] for mod in self.mods if mod in TYPES]

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def slot_base(slot: int) -> int:
    """The address at which a slot's memory begins."""
    return (slot << SLOT) + (1 << SLOT - 1)


@contextmanager
def located(line: int, text: str) -> Iterator[None]:
    """Errors name the line and its text."""
    try:
        yield
    except (PTXError, KeyError, ValueError) as error:
        raise PTXError(f"line {line}: {text}: {error}") from None


def statements(text: str, line: int) -> Iterator[tuple[int, str]]:
    """The statements between semicolons, each with the line on which it ends."""
    for part in text.split(";"):
        line += part.count("\n")
        if part.strip():
            yield line, " ".join(part.split())


class Program:
    """An entry, ready to be decoded.

    params : (type, name) of its parameters
    code : all instructions
    known : what names and [parameters] mean
    registers : how many there are
    arrays : (name, bytes, writable) of the module's .global and .const variables
    sizes : bytes of static shared memory of a block, and of local memory of a thread
    unit : the size in bytes of the smallest access that may go to shared memory
    """

    def __init__(self, name: str, params: str, body: list[tuple[int, str]]):
        self.name = name
        words = [part.split() for part in params.split(",") if part.strip()]
        self.params = [(TYPES[first[1:]], word) for _, first, *_, word in words]
        self.registers, self.sizes = 0, {"shared": 0, "local": 0}
        self.arrays: list[tuple[str, np.ndarray, bool]] = []
        self.known: dict[str, Any] = {"_": None} | {f"[{name}]": Param(name) for _, name in self.params}
        self.code: list[Instruction] = []
        dynamic, rest = [], []
        for line, text in body:
            while label := LABEL.match(text):
                self.known[label[1]] = Imm(len(rest))
                text = text[label.end() :]
            if text.startswith(".extern .shared"):
                dynamic.append(NAME.findall(text)[-1][0])
            elif text.startswith("."):
                with located(line, text):
                    self.declare(text)
            elif text:
                rest.append((line, text))
        self.sizes = {space: -(-size // 16) * 16 for space, size in self.sizes.items()}
        self.known.update(dict.fromkeys(dynamic, Imm(self.sizes["shared"])))  # behind all static arrays
        for line, text in rest:
            with located(line, text):
                self.code.append(self.instruction(line, text))
        self.code.append(Instruction(body[-1][0], "}", "ret"))
        find_live(self.code)
        moves = [made for made in self.code if made.op in ("ld", "st", "atom", "red") and "shared" in made.mods]
        self.unit = min([4, *(made.types[-1].bits // 8 for made in moves)])

    def declare(self, text: str) -> None:
        """Read a declaration: those in shared and local memory lie one after the other, others have a slot."""
        match = DECLARATION.fullmatch(text)
        if not match:
            if text.startswith(".pragma"):
                return
            raise PTXError("unknown directive")
        space, align, type_, names, initial = match.groups()
        bits = TYPES[type_].bits
        for name, repeat, count in NAME.findall(names):
            if space == "reg":
                for each in [f"{name}{index}" for index in range(int(repeat))] if repeat else [name]:
                    self.known[each] = Reg(self.registers, bits, each)
                    self.registers += 1
            elif space in self.sizes:
                start = -(-self.sizes[space] // int(align)) * int(align)
                self.known[name], self.sizes[space] = Imm(start), start + int(count or 1) * bits // 8
            else:
                data = np.zeros(int(count or 1), f"u{bits // 8}")
                values = [int(word) for word in (initial or "").split(",") if word]
                data[: len(values)] = values
                self.known[name] = Imm(slot_base(FIRST_SLOT + len(self.arrays)))
                self.arrays.append((name, data.view(np.uint8), space == "global"))

    def instruction(self, line: int, text: str) -> Instruction:
        """Read an instruction."""
        match = STATEMENT.fullmatch(text)
        if not match:
            raise PTXError("cannot read the instruction")
        guard, op, mods, rest = match.groups()
        operands = [self.operand(part) for part in OPERAND.findall(rest)]
        return Instruction(line, text, op, mods.split(".")[1:], operands, self.operand(guard) if guard else None)

    def operand(self, text: str) -> Any:
        """Read one operand."""
        if text in self.known:
            return self.known[text]
        if text[0] == "{" or "|" in text:
            return [self.operand(part.strip()) for part in re.split(r"[,|]", text.strip("{}"))]
        if address := ADDRESS.fullmatch(text):
            return Mem(self.operand(address[1]), int(address[2] or "0", 0))
        if text[0] == "!":
            return self.operand(text[1:])._replace(negated=True)
        if number := NUMBER.fullmatch(text):
            return Imm(int(number[1], 16) if number[1] else int(text, 0))
        if SPECIAL.fullmatch(text):
            return Special(text)
        raise PTXError(f"unknown operand {text}")


def items_of(operand: Any) -> list[Any]:
    """The operands in {a, b} or a|b, or the only one."""
    return operand if isinstance(operand, list) else [operand]


def registers_of(operands: list[Any]) -> list[Reg]:
    """The registers that operands mention."""
    flat = [item for operand in operands for item in items_of(operand)]
    bases = [item.base if isinstance(item, Mem) else item for item in flat]
    return [base for base in bases if isinstance(base, Reg)]


def find_live(code: list[Instruction]) -> None:
    """Find the registers that are live before each instruction.

    Threads share their registers' arrays with waiting groups, and must keep what those need, but nothing else.
    """
    changes = []
    for made in code:
        first = 0 if made.op in DEFINE_NOTHING else 1
        used = sum({1 << register.number for register in registers_of([*made.operands[first:], made.guard])})
        defined = sum({1 << register.number for register in registers_of(made.operands[:first])})
        changes.append((used | defined if made.guard else used, ~defined))
    changed = True
    while changed:
        changed = False
        for position in range(len(code) - 1, -1, -1):
            made, (used, kept) = code[position], changes[position]
            after = code[position + 1].live if made.guard or made.op not in ("ret", "trap", "bra") else 0
            after |= code[made.operands[0].value].live if made.op == "bra" else 0
            live = after & kept | used
            changed |= live != made.live
            made.live = live


def programs(ptx: str) -> list[Program]:
    """Every entry of a module."""
    ptx = IGNORED.sub("", ptx)
    outside = list(statements(ENTRY.sub(lambda entry: "\n" * entry.group().count("\n"), ptx), 1))
    found = []
    for entry in ENTRY.finditer(ptx):
        name, params, body = entry.groups()
        inside = statements(body, ptx.count("\n", 0, entry.start(3)) + 1)
        found.append(Program(name, params, [*outside, *inside]))
    if not found:
        raise PTXError("there is no .visible .entry")
    return found
