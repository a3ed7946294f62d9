"""Read PTX text into one flat list of instructions of each entry.

Labels become positions in the list, registers become numbers, and addresses of variables become integers.  Kernels call
nothing: what they use has become part of them.
"""

from __future__ import annotations

import re
import struct
from collections import ChainMap, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BITS = {"pred": 1} | {f"{letter}{bits}": bits for letter in "bus" for bits in (8, 16, 32, 64)}
BITS |= {"f16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16": 16, "bf16x2": 32}

TOKEN = re.compile(r"[;{}\n]|[^;{}\n]+")
LABEL = re.compile(r"\s*([$\w]+)\s*:(?!:)")
HEADER = re.compile(
    r"\s*(?:\.(?:visible|weak|extern)\s+)*\.(?P<kind>entry|func)\b\s*(?:\([^)]*\))?\s*(?P<name>[$\w]+)\s*(?:\((?P<params>[^)]*)\))?"
)
VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(global|const|shared|local|param|reg)\s+(.*)", re.DOTALL
)
DECLARATION = re.compile(r"((?:\.\w+\s+|\d+\s+)*)\.(\w+)\s+([^=]*)(?:=\s*(.*))?", re.DOTALL)
NAME = re.compile(r"([$%\w]+)\s*(?:<(\d+)>)?((?:\s*\[\s*\d*\s*\])*)")
DIRECTIVE = re.compile(r"^\s*\.(?:version|target|address_size|file|loc)\b[^\n;]*;?", re.MULTILINE)
STATEMENT = re.compile(r"(?:@\s*(!?)\s*([$%\w]+)\s+)?([a-z]\w*)((?:(?:\.|::)\w+)*)\s*(.*)", re.DOTALL)
SPECIAL = re.compile(
    r"%(n?tid|n?ctaid)\.[xyz]$|%(laneid|n?warpid|lanemask_..|clock\w*|\w+_smem_size|globaltimer\w*|n?smid)$"
)

SLOT = 40  # arrays and windows lie 2**40 bytes apart, each in the middle of its slot
SHARED_WINDOW, LOCAL_WINDOW, FIRST_SLOT = 1, 2, 3
ENDS = {"ret", "exit", "trap"}
DEFINE_NOTHING = ENDS | {"st", "red", "bra", "bar", "barrier", "membar", "fence", "cp", "prefetch", "nanosleep"}

Reg = namedtuple("Reg", "number width negated", defaults=[False])  # width 1: a predicate, negated by "!" before it
Imm = namedtuple("Imm", "value")  # an integer, a float, or the address of a variable
Special = namedtuple("Special", "name")  # %tid.x
Vec = namedtuple("Vec", "items")  # {a, b}, or a|b for two results; None stands for _
Mem = namedtuple("Mem", "base offset")  # [base + offset]; base is a Reg, an Imm or the name of a parameter
Dynamic = namedtuple("Dynamic", "name")  # dynamic shared memory, whose address is known at the end of an entry
Entry = namedtuple("Entry", "name params body")
Scope = ChainMap[str, Any]


class PTXError(Exception):
    """PTX that cannot be understood, or a thread that did something undefined."""

    located = False

    def at(self, where: object) -> PTXError:
        """The error with the place in the PTX before it, unless it names one already."""
        if self.located:
            return self
        error = PTXError(f"{where}: {self}")
        error.located = True
        return error


@dataclass
class Instruction:
    """One instruction.

    target : the position that a branch leads to
    live : bits of the registers whose values are needed before it
    kind, run, members : filled in by decoding; members reads the member mask of what a warp does together
    """

    line: int
    text: str
    op: str
    mods: list[str] = field(default_factory=list)
    operands: list[Any] = field(default_factory=list)
    guard: Reg | None = None
    target: int = -1
    live: int = 0
    kind: str = "plain"
    run: Any = None
    members: Any = None

    @property
    def types(self) -> list[str]:
        """The types among the modifiers."""
        return [mod for mod in self.mods if mod in BITS]

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def slot_base(slot: int) -> int:
    """The address at which a slot's memory begins."""
    return (slot << SLOT) + (1 << SLOT - 1)


def statements(ptx: str) -> Iterator[tuple[int, str]]:
    """Split PTX into (line, text): statements without ";", labels with ":", headers of functions, braces of scopes."""
    ptx = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment.group().count("\n"), ptx, flags=re.DOTALL)
    ptx = DIRECTIVE.sub("", re.sub(r"//[^\n]*", "", ptx))
    text, line, start, depth = "", 1, 1, 0
    for token in TOKEN.findall(ptx):
        if token == "\n":
            line += 1
            text += " "
        elif token in "{}" and (depth or (token == "{" and text.strip() and not HEADER.match(text))):
            depth += 1 if token == "{" else -1
            text += token
        elif token in ";{}":
            if text.strip():
                yield start, " ".join(text.split())
            if token != ";":
                yield line, token
            text = ""
        else:
            if not text.strip():
                start = line
                while label := LABEL.match(token):
                    yield line, label.group(1) + ":"
                    token = token[label.end() :]
            text += token


def parameters(text: str | None) -> list[tuple[str, str]]:
    """(type, name) of each parameter in a header."""
    found = []
    for part in split(text or ""):
        declared = re.fullmatch(r"\.param\b(.*?)([$%\w]+)\s*(\[\d+\])?", part, re.DOTALL)
        types = [word for word in re.findall(r"\.(\w+)", declared.group(1)) if word in BITS] if declared else []
        if not types or declared.group(3):
            raise PTXError(f"parameter {part}: only scalars are supported")
        found.append((types[0], declared.group(2)))
    return found


def entries(ptx: str) -> tuple[list[Entry], list[tuple[int, str]]]:
    """The entries, and the statements outside of functions.  Functions that are no entries stay unread."""
    found: list[Entry] = []
    outside, current, body, depth = [], None, [], 0
    for line, text in statements(ptx):
        if current and not body and text != "{":
            current = None  # a declaration only
        if current is None and (header := HEADER.match(text)):
            current, body = header, []
        elif current is None:
            outside.append((line, text))
        else:
            depth += (text == "{") - (text == "}")
            body.append((line, text))
            if depth == 0:
                if current["kind"] == "entry":
                    found.append(Entry(current["name"], parameters(current["params"]), body))
                current = None
    return found, outside


def split(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def number(text: str) -> int | float | None:
    """The value of a literal, or None if the text isn't one."""
    sign, body = (-1, text[1:].strip()) if text.startswith("-") else (1, text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", body):
        return sign * struct.unpack(">f" if body[1] in "fF" else ">d", bytes.fromhex(body[2:]))[0]
    if re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|[1-9]\d*|0+)U?", body):
        return sign * int(body.rstrip("U"), 0)
    if re.fullmatch(r"0[0-7]+U?", body):
        return sign * int(body.rstrip("U"), 8)
    return sign * float(body) if re.fullmatch(r"\d*\.\d*([eE][+-]?\d+)?|\d+[eE][+-]?\d+", body) else None


def declaration(rest: str) -> Iterator[tuple[str, int, str, int, str]]:
    """(type, alignment, name, count, initializer) of each name in a declaration, after its state space."""
    match = DECLARATION.match(rest)
    if not match or match.group(2) not in BITS:
        raise PTXError(f"cannot read the declaration {rest}")
    qualifiers, type_, names, initial = match.groups()
    lanes = int((re.search(r"\.v([24])", qualifiers) or [1, 1])[1])
    align = int((re.search(r"\.align\s+(\d+)", qualifiers) or [1, max(BITS[type_] // 8, 1) * lanes])[1])
    for text in split(names):
        named = NAME.fullmatch(text)
        if not named:
            raise PTXError(f"cannot read the declaration of {text}")
        name, repeat, dims = named.groups()
        count = lanes * int(np.prod([int(dim or 0) for dim in re.findall(r"\[\s*(\d*)\s*\]", dims)], dtype=np.int64))
        for each in [name] if repeat is None else [f"{name}{index}" for index in range(int(repeat))]:
            yield type_, align, each, count, initial or ""


def initialized(type_: str, count: int, initial: str) -> np.ndarray:
    """The bytes of a .global or .const variable; what has no initializer is zero."""
    values = [number(word) for word in re.split(r"[{},\s]+", initial) if word]
    if None in values:
        raise PTXError(f"only numbers are supported in initializers, not {initial}")
    bits = BITS[type_]
    if type_.startswith("f"):
        data = np.array(values, f"f{bits // 8}")
    else:
        data = np.array([value & (1 << bits) - 1 for value in values], np.uint64).astype(f"u{bits // 8}")
    whole = np.zeros(count, data.dtype)
    whole[: len(data)] = data
    return whole.view(np.uint8)


class Layout:
    """Places for variables: each .global and .const one has a slot, .shared and .local ones lie one after the other."""

    def __init__(self) -> None:
        self.arrays: list[tuple[str, np.ndarray, bool]] = []  # name, bytes, writable
        self.ends = {"shared": 0, "local": 0}

    def place(self, space: str, rest: str) -> dict[str, Any]:
        """Lay out the names of one declaration."""
        placed: dict[str, Any] = {}
        for type_, align, name, count, initial in declaration(rest):
            if space in ("global", "const"):
                placed[name] = Imm(slot_base(FIRST_SLOT + len(self.arrays)))
                self.arrays.append((name, initialized(type_, count, initial), space == "global"))
            elif count == 0:
                placed[name] = Dynamic(name)
            else:
                start = -(-self.ends[space] // align) * align
                self.ends[space] = start + count * (BITS[type_] // 8)
                placed[name] = Imm(start)
        return placed


class Program:
    """An entry, ready to be decoded.

    params : (type, name) of its parameters
    code : all instructions
    names, widths : of the registers
    shared_bytes, local_bytes : static shared memory of a block, local memory of a thread
    """

    def __init__(self, entry: Entry, layout: Layout, variables: dict[str, Any]):
        self.name, self.params, self.layout = entry.name, entry.params, layout
        self.code: list[Instruction] = []
        self.names: list[str] = []
        self.widths: list[int] = []
        self.branches: list[tuple[Instruction, str, Scope]] = []
        layout.ends["local"] = 0
        self.read(entry.body, ChainMap({name: name for _, name in entry.params}, variables))
        self.code.append(Instruction(entry.body[-1][0], "}", "ret"))
        self.shared_bytes, self.local_bytes = (-(-layout.ends[space] // 16) * 16 for space in ("shared", "local"))
        for made, label, scope in self.branches:
            if label not in scope:
                raise PTXError(f"no label {label}").at(made)
            made.target = scope[label]
        for made in self.code:
            made.operands = [self.relocated(operand) for operand in made.operands]
        find_live(self.code)

    def read(self, body: list[tuple[int, str]], scope: Scope) -> None:
        """Append the instructions of an entry."""
        for line, text in body:
            try:
                if text in "{}":
                    scope = scope.new_child() if text == "{" else scope.parents
                elif text.endswith(":"):
                    scope.maps[0][text[:-1]] = len(self.code)
                elif variable := VARIABLE.match(text):
                    scope.maps[0].update(self.declare(*variable.groups()))
                elif not text.startswith(".pragma"):
                    self.instruction(line, text, scope)
            except PTXError as error:
                raise error.at(f"line {line}: {text}") from None

    def declare(self, space: str, rest: str) -> dict[str, Any]:
        if space == "reg":
            return {name: self.register(name, BITS[type_]) for type_, _, name, _, _ in declaration(rest)}
        return self.layout.place(space, rest)

    def register(self, name: str, width: int) -> Reg:
        self.names.append(name)
        self.widths.append(width)
        return Reg(len(self.widths) - 1, width)

    def instruction(self, line: int, text: str, scope: Scope) -> None:
        match = STATEMENT.fullmatch(text)
        if not match:
            raise PTXError("cannot read the instruction")
        negated, guard, op, mods, rest = match.groups()
        made = Instruction(line, text, op, re.findall(r"\w+", mods))
        if guard:
            made.guard = self.operand(guard, scope)._replace(negated=bool(negated))
        if op == "bra":
            self.branches.append((made, rest, scope))
        elif op == "call":
            raise PTXError("calls are not supported")
        else:
            made.operands = [self.operand(part, scope) for part in split(rest)]
        self.code.append(made)

    def operand(self, text: str, scope: Scope) -> Any:
        """Read one operand."""
        if text[0] == "{" or "|" in text:
            return Vec(tuple(self.operand(part.strip(), scope) for part in re.split(r"[,|]", text.strip("{}"))))
        if text[0] == "[":
            base, sign, offset = re.fullmatch(r"\[\s*(-?[^\s+-]+)\s*([+-]?)\s*(.*?)\s*\]", text).groups()
            inner = scope[base] if isinstance(scope.get(base), str) else self.operand(base, scope)
            return Mem(inner, int(number(offset or "0")) * (-1 if sign == "-" else 1))
        if text[0] == "!":
            return self.operand(text[1:].strip(), scope)._replace(negated=True)
        if (value := number(text)) is not None:
            return Imm(value)
        if isinstance(scope.get(text), (Reg, Imm, Dynamic)):
            return scope[text]
        if SPECIAL.match(text):
            return Special(text)
        if text != "_":
            raise PTXError(f"unknown operand {text}")
        return None

    def relocated(self, operand: Any) -> Any:
        """Dynamic shared memory lies behind all static arrays."""
        if isinstance(operand, Mem):
            return operand._replace(base=self.relocated(operand.base))
        return Imm(self.shared_bytes) if isinstance(operand, Dynamic) else operand


def registers_of(operands: list[Any]) -> int:
    """Bits of the registers that operands mention."""
    bits = 0
    for operand in operands:
        if isinstance(operand, Vec):
            bits |= registers_of(operand.items)
        register = operand.base if isinstance(operand, Mem) else operand
        bits |= 1 << register.number if isinstance(register, Reg) else 0
    return bits


def find_live(code: list[Instruction]) -> None:
    """Find the registers that are live before each instruction.

    Threads share their registers' arrays with waiting groups, and must keep what those need, but nothing else.
    """
    changes = []
    for made in code:
        first = 0 if made.op in DEFINE_NOTHING else 1
        used, defined = registers_of(made.operands[first:]), registers_of(made.operands[:first])
        if made.guard:
            used |= 1 << made.guard.number | defined
        changes.append((used, ~defined))
    changed = True
    while changed:
        changed = False
        for position in range(len(code) - 1, -1, -1):
            made, (used, kept) = code[position], changes[position]
            goes_on = made.guard or made.op not in ENDS | {"bra"}
            after = code[position + 1].live if goes_on else 0
            after |= code[made.target].live if made.op == "bra" else 0
            live = after & kept | used
            changed |= live != made.live
            made.live = live


def programs(ptx: str) -> tuple[list[Program], list[tuple[str, np.ndarray, bool]]]:
    """Every entry of a module, and the module's arrays: name, bytes, whether it may be written."""
    found, outside = entries(ptx)
    layout, variables = Layout(), {}
    for line, text in outside:
        if variable := VARIABLE.match(text):
            variables.update(layout.place(*variable.groups()))
        elif not text.startswith(".pragma"):
            raise PTXError("unknown directive").at(f"line {line}: {text}")
    shared, read = layout.ends["shared"], []
    for entry in found:
        layout.ends["shared"] = shared
        read.append(Program(entry, layout, variables))
    return read, layout.arrays
