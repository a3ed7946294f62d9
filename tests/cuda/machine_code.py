"""What NVIDIA's assembler makes of a kernel: registers, memory, and the instructions that count."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LISTED = "sm_90"  # whose instructions are counted: disassembling takes four times as long as assembling
# What a fast kernel is made of: tensor cores, four-byte dot products, wide and asynchronous loads, matrix loads.
NOTED = {
    "HMMA": r"\bHMMA\b",
    "IMMA": r"\bIMMA\b",
    "IDP": r"\bIDP\b",
    "LDG.128": r"\bLDG\b[.\w]*\.128\b",
    "STG.128": r"\bSTG\b[.\w]*\.128\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDSM": r"\bLDSM\b",
}


class Report(NamedTuple):
    """What a kernel takes of a GPU."""

    registers: int
    shared: int
    """Bytes of static shared memory."""
    stack: int
    """Bytes of local memory for each thread, spilled registers included: slow, and none is wanted."""
    instructions: dict[str, int]
    """How many of the noted instructions there are, on the listed architecture."""


@functools.cache
def tool(name: str) -> str | None:
    """The path of a program from NVIDIA's wheels, or None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob(f"*/bin/{name}"):
            return str(path)
    return None


def assemble(ptx_file: Path, architecture: str) -> Report:
    """Assemble PTX for an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernel.cubin"))
        command = [str(tool("ptxas")), f"-arch={architecture}", "-v", "-o", cubin, str(ptx_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses {ptx_file.name} for {architecture}:\n{done.stderr}")
        listing = ""
        if architecture == LISTED:
            command = [str(tool("nvdisasm")), "-c", cubin]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said = done.stderr
    return Report(
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        shared=int((re.search(r"(\d+) bytes smem", said) or (0, 0))[1]),
        stack=int(re.search(r"(\d+) bytes stack frame", said)[1]),
        instructions=_count(listing),
    )


def _count(sass: str) -> dict[str, int]:
    counts = Counter({name: len(re.findall(pattern, sass)) for name, pattern in NOTED.items()})
    return {name: count for name, count in counts.items() if count}
