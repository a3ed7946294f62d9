"""Every instruction-set level gives right results, and has the instructions that it promises.

Levels are forced with Numba's own variables, in a process for each.  By default these run the tests of the little
language, one product and one attention; ``QATTN_ALL_LEVELS=1`` runs the whole suites of both, some minutes for each.
"""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from qattn.cpu.target import TARGET, has_dot_products

ROOT = Path(__file__).parent.parent
SUITES = ["tests/test_matmul.py", "tests/test_attention.py"]
AVX2 = "+avx,+avx2,+fma,+f16c,+sse4.2,+bmi,+bmi2,+popcnt"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,+avx512vnni"  # neither bfloat16 nor VBMI
LEVELS = {
    "avx512": {"NUMBA_CPU_NAME": "cascadelake", "NUMBA_CPU_FEATURES": AVX512},
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2},
    "plain": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}
# What stands in the machine code of an int8 product, and of attention over a bfloat16 cache.
PROMISED = {
    "avx512": ("vpdpbusd", "vfmadd"),
    "avx2": ("vpmaddubsw", "vfmadd"),
    "plain": ("paddd", "mulps"),
    "neon": ("sdot", "fmla"),
}
if TARGET.level != "avx512":
    del LEVELS["avx512"]
if not llvm.get_process_triple().startswith("x86_64"):  # what a host has is tested everywhere
    LEVELS, PROMISED = {}, {"neon": PROMISED["neon"]}
x86 = pytest.mark.skipif(not llvm.get_process_triple().startswith("x86_64"), reason="levels of x86")


def run(*command, **environment):
    environment = {**os.environ, "PYTEST_ADDOPTS": "", **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout + done.stderr


@x86
@pytest.mark.skipif(not os.environ.get("QATTN_ALL_LEVELS"), reason="takes minutes: QATTN_ALL_LEVELS=1 asks for it")
@pytest.mark.parametrize("level", LEVELS)
def test_products_and_attention_hold_at_every_level(level):
    code, output = run("-m", "pytest", "-q", "-x", *SUITES, **LEVELS[level])
    assert code == 0, output[-3000:]


@x86
@pytest.mark.parametrize("level", LEVELS)
def test_the_little_language_holds_at_every_level(level):
    code, output = run("-m", "pytest", "-q", "-x", "tests/test_simd.py", **LEVELS[level])
    assert code == 0, output[-3000:]


CODE = """
import numpy as np, qattn
from qattn.backends import cpu
from qattn.cpu import attention, matmul
from qattn.cpu.target import TARGET
from qattn.logits import Logits
from qattn.masks import Causal
from tests import reference
from tests.strategies import normal, random_weights
w, x = random_weights("IQ2_XXS", 20, 256), normal((35, 256))  # planes of two widths, and a table
packed = qattn.PackedMatrix(w)
product = qattn.matmul(x, packed)
assert reference.nmse(product, x @ np.asarray(w, np.float64).T) < 5e-4
assert np.array_equal(product[:3], qattn.matmul(x[:3], packed))  # whether unpacked once for many rows, or not
cache, kv, q = qattn.KVCache(qattn.KVCacheParams(1, 32)), normal((40, 64), 1), normal((5, 2, 32), 2)
qattn.ops.store(kv, cache)
out, _ = cpu.attend(q, cache, np.array([0, 5]), Causal(), Logits(0.2), exact=False)
k, v = kv[:, None, :32], kv[:, None, 32:]
want, _ = reference.attention(q, k, v, 0.2, reference.causal(5, 40))
assert reference.nmse(out, want) < 5e-4
attend = attention.attend(*[attention.Storage.best("bf16", False)] * 2, Causal)
print(TARGET.level)
for kernel in (matmul.product(packed.layouts[0], False), attend):
    print("=====", *(asm for thunk in kernel.thunks.values() for asm in thunk.inspect_asm().values()), sep="\\n")
"""


@pytest.mark.skipif(TARGET.level not in PROMISED, reason="nothing is promised")
@pytest.mark.parametrize("level", ["host", *LEVELS])
def test_a_level_computes_with_the_instructions_that_it_promises(level, tmp_path):
    # a cache of its own: machine code that was loaded cannot be read
    code, output = run("-c", CODE, **LEVELS.get(level, {}), NUMBA_CACHE_DIR=str(tmp_path))
    assert code == 0, output[-3000:]
    said, *kernels = output.split("=====\n")
    promised = PROMISED[TARGET.level if level == "host" else level]
    if level == "host" and TARGET.bf16:
        promised = (promised[0], "tdpbf16ps" if TARGET.amx else "vdpbf16ps")
    assert said.strip().endswith(TARGET.level if level == "host" else level)
    for instruction, machine_code in zip(promised, kernels, strict=True):
        assert instruction in machine_code
        assert "zmm" not in machine_code or said.strip().endswith("avx512")


@pytest.mark.parametrize(
    ("name", "features", "there"),
    [
        ("neoverse-n1", "", True), ("apple-m1", "", True), ("cortex-a72", "", False),
        ("generic", "+neon,+dotprod", True), ("neoverse-n1", "-dotprod", False),
    ],
)  # fmt: skip
def test_arm_is_known_by_what_llvm_makes_of_a_dot_product(name, features, there):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    assert has_dot_products("aarch64-unknown-linux-gnu", name, features) == there
