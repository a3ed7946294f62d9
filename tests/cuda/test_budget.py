"""Every kernel is assembled for every architecture, and takes no more of a GPU than is recorded in ``budget.json``.

No kernel may spill registers, nor lose a wide load or a tensor core's instruction.  After a change that is meant to
change the figures: ``python -m tests.cuda.test_budget``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda.machine_code import ARCHITECTURES, Report, assemble, tool

pytest.importorskip("numba_cuda", reason="kernels for GPUs are compiled by numba-cuda")
from qattn.cuda.attention import merge
from qattn.cuda.kernel import Kernel, _tidied
from tests.cuda.kernels import all_kernels

BUDGET = Path(__file__).with_name("budget.json")


class Known(NamedTuple):
    """What a kernel took when it was last looked at."""

    digest: str
    """Of its PTX."""
    reports: dict[str, Report]
    """By architecture."""


def recorded() -> tuple[str, dict[str, Known]]:
    """The assembler's version at that time, and what kernels took, by name."""
    kept = json.loads(BUDGET.read_text())
    known = {}
    for name, (digest, reports) in kept["kernels"].items():
        known[name] = Known(digest, {arch: Report(*report) for arch, report in reports.items()})
    return kept["assembler"], known


def anonymous(text: str) -> str:
    """A name or a text without the digest of a mask of the tests, which each version of Python has its own of."""
    return re.sub("_[0-9a-f]{12}(?=_)", "", text)


def digest(kernel: Kernel) -> str:
    return hashlib.sha256(anonymous(kernel.ptx).encode()).hexdigest()[:16]


def measured(architecture: str, known: Mapping[str, Known]) -> dict[str, Report]:
    """What kernels take now: no need to assemble what is known to be the same PTX."""
    kernels = {anonymous(kernel.name): kernel for kernel in all_kernels()}

    def report(name: str) -> Report:
        before = known.get(name)
        if before and before.digest == digest(kernels[name]):
            return before.reports[architecture]
        return assemble(kernels[name].ptx_file, architecture)

    for kernel in kernels.values():
        _ = kernel.ptx_file  # compiled one by one: only the assembler works in threads
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(kernels, pool.map(report, kernels), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.skipif(tool("ptxas") is None or tool("nvdisasm") is None, reason="needs NVIDIA's assembler")
def test_kernels_stay_in_their_budget(architecture):
    assembler, budget = recorded()
    taken = measured(architecture, budget if assembler == version("nvidia-cuda-nvcc") else {})
    assert taken.keys() == budget.keys(), "kernels came or went: record the budget anew"
    wrong = []
    for name, now in taken.items():
        before = budget[name].reports[architecture]
        if now.stack:
            wrong.append(f"{name}: {now.stack} bytes of local memory")
        if now.registers > before.registers + 8 or now.shared > before.shared:
            wrong.append(f"{name}: {now[:2]} registers and bytes of shared memory, before {before[:2]}")
        lost = [key for key, count in before.instructions.items() if now.instructions.get(key, 0) < count // 2 + 1]
        if lost:
            wrong.append(f"{name}: lost {lost}: {before.instructions} became {now.instructions}")
    assert not wrong, "\n".join(wrong)


def test_a_kernel_is_the_same_ptx_however_often_it_is_made():
    """Numba numbers what it compiles; else nothing would be known again."""
    once, again = (_tidied(merge._compile(), merge.name) for _ in range(2))
    assert once == again == merge.ptx and ".shared" in once and "Numba" not in once


def main() -> None:
    """Record the budget."""
    assembler, before = recorded()
    known = before if assembler == version("nvidia-cuda-nvcc") else {}
    taken = {architecture: measured(architecture, known) for architecture in ARCHITECTURES}
    digests = {anonymous(kernel.name): digest(kernel) for kernel in all_kernels()}
    lines = [
        f"{json.dumps(name)}: {json.dumps([digests[name], {arch: taken[arch][name] for arch in taken}])}"
        for name in sorted(digests)
    ]
    start = f'{{"assembler": {json.dumps(version("nvidia-cuda-nvcc"))}, "kernels": {{\n'
    BUDGET.write_text(start + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
