"""Every instruction-set level gives the same results: products and attention, in a process for each.

By default with one format of each kind; `QATTN_ALL_LEVELS=1` runs the whole suites, some minutes for each level.

Levels are forced with Numba's own variables.  What a level promises is looked for in the machine code, which is also
compiled for machines that this one is not.
"""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from qattn.cpu.target import TARGET

ROOT = Path(__file__).parent.parent
SUITES = ["tests/test_matmul.py", "tests/test_attention.py"]
FEW = "Q4_0] or half_precision"
LEVELS = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+sse4.2,+bmi,+bmi2,+popcnt"},
    "plain": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}
# What stands in the machine code of an int8 product, and of attention over a bfloat16 cache.
PROMISED = {
    "avx512": ("vpdpbusd", "vdpbf16ps" if TARGET.bf16 else "vfmadd"),
    "avx2": ("vpmaddubsw", "vfmadd"),
    "plain": ("pmul", "mulps"),
}
x86 = pytest.mark.skipif(not llvm.get_process_triple().startswith("x86_64"), reason="levels of x86")


def run(*command, **environment):
    environment = {**os.environ, "PYTEST_ADDOPTS": "", **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout + done.stderr


@x86
@pytest.mark.parametrize("level", LEVELS)
def test_products_and_attention_hold_at_every_level(level):
    few = [] if os.environ.get("QATTN_ALL_LEVELS") else ["-k", FEW]
    code, output = run("-m", "pytest", "-q", "-x", *SUITES, *few, **LEVELS[level])
    assert code == 0, output[-3000:]


CODE = """
import numpy as np, qattn
from qattn.cpu import attention, matmul
from qattn.cpu.target import TARGET
from qattn.masks.causal import Causal
from tests.strategies import normal, random_weights
w = qattn.PackedMatrix(random_weights("Q4_0", 16, 64))
qattn.matmul(normal((3, 64)), w)
attn = attention.attend(attention.Storage("bf16", "bf16"), Causal)
cache = qattn.KVCache(qattn.KVCacheParams(1, 32))
q = normal((2, 1, 32))
qattn.ops.store(normal((2, 64)), cache)
qattn.ops.attend(q, cache, np.array([0, 2]), Causal(), 1.0, exact=False)
print(TARGET.level)
for kernel in (matmul.product(w.layouts[0], False), attn):
    print("=====", *kernel.body.inspect_asm().values(), sep="\\n")
"""


@x86
@pytest.mark.parametrize("level", [TARGET.level, *(level for level in LEVELS if level != TARGET.level)])
def test_machine_code_has_the_instructions_that_a_level_promises(level, tmp_path):
    # a cache of its own: machine code that was loaded cannot be read
    code, output = run("-c", CODE, **LEVELS.get(level, {}), NUMBA_CACHE_DIR=str(tmp_path))
    assert code == 0, output[-3000:]
    said, *kernels = output.split("=====\n")
    assert said.strip().endswith(level)
    for promised, machine_code in zip(PROMISED[level], kernels, strict=True):
        assert promised in machine_code
        assert level == "avx512" or "zmm" not in machine_code
