"""Which CPU the kernels are generated for: what LLVM says of the host, or what ``NUMBA_CPU_*`` asks for."""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

import llvmlite.binding as llvm
from numba import config
from numba.core.codegen import get_host_cpu_features, initialize_llvm


class Target(NamedTuple):
    """An instruction-set level and the sizes that follow from it."""

    level: str
    """"avx512", "avx2", "neon" or "plain"."""
    vnni: bool
    """u8·s8 dot products in one instruction, accumulating without saturation."""
    bf16: bool
    """bf16 pair dot products in one instruction."""
    vbmi: bool
    """Bytes are looked up among 64 in one instruction, which takes no more of an index than it needs."""
    amx: bool
    """There are tile registers for bfloat16, see `qattn.cpu.amx`."""
    rows: int
    """Rows of activations that a micro-kernel keeps in registers: what is left beside weights and scales."""


def _features() -> set[str]:
    if config.CPU_FEATURES is not None:
        text = config.CPU_FEATURES
    elif config.CPU_NAME not in (None, "host"):
        return set()  # a named CPU: LLVM knows its features, we don't, so nothing special is assumed
    else:
        text = llvm.get_host_cpu_features().flatten()
    return {word[1:] for word in text.split(",") if word.startswith("+")}


def _has_amx(features: set[str]) -> bool:
    """Whether the CPU has tile registers and the system lets this process use them: Linux wants to be asked."""
    if not {"amx-tile", "amx-bf16", "avx512bf16"} <= features or not sys.platform.startswith("linux"):
        return False
    arch_prctl, permit, tile_data = 158, 0x1023, 18  # numbers of Linux's ABI
    return ctypes.CDLL(None).syscall(arch_prctl, permit, tile_data) == 0


def has_dot_products(triple: str, name: str, features: str) -> bool:
    """Whether LLVM uses ARM's dot products of bytes on this CPU.

    LLVM knows from the CPU's name: they are not among the features that it finds on Linux, and on macOS it finds none.
    """
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2)
    return "sdot" in machine.emit_assembly(llvm.parse_assembly(f'target triple = "{triple}"\n{_DOT_PRODUCT}'))


_DOT_PRODUCT = """
define i32 @dot(<16 x i8> %a, <16 x i8> %b) {
  %left = sext <16 x i8> %a to <16 x i32>
  %right = sext <16 x i8> %b to <16 x i32>
  %products = mul <16 x i32> %left, %right
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %sum
}
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""


def _detect() -> Target:
    has = _features()
    triple = llvm.get_process_triple()
    if triple.startswith("x86_64"):
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"} <= has and "avx512vnni" in has:
            return Target("avx512", True, "avx512bf16" in has, "avx512vbmi" in has, _has_amx(has), 12)
        if {"avx2", "fma", "f16c"} <= has:
            return Target("avx2", "avxvnni" in has, False, False, False, 4)
    if triple.startswith(("aarch64", "arm64")):
        initialize_llvm()
        name = llvm.get_host_cpu_name() if config.CPU_NAME is None else config.CPU_NAME
        features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
        if has_dot_products(triple, name, features):  # as Numba compiles
            return Target("neon", True, False, False, False, 4)
    return Target("plain", False, False, False, False, 4)


TARGET = _detect()
