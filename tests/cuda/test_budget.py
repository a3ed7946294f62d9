"""Every kernel is assembled for every architecture, and takes no more of a GPU than is recorded in ``budget.json``.

No kernel may spill registers, nor lose a wide load or a tensor core's instruction.  After a change that is meant to
change the figures: ``python -m tests.cuda.test_budget``.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda.machine_code import ARCHITECTURES, Report, assemble, tool

pytest.importorskip("numba_cuda", reason="kernels for GPUs are compiled by numba-cuda")
from tests.cuda.kernels import all_kernels

BUDGET = Path(__file__).with_name("budget.json")


def recorded() -> dict[str, dict[str, Report]]:
    """What kernels took when it was last looked at, by name and architecture."""
    kept = json.loads(BUDGET.read_text())
    return {name: {arch: Report(*report) for arch, report in reports.items()} for name, reports in kept.items()}


def measured(architecture: str) -> dict[str, Report]:
    """What kernels take now."""
    # A mask of the tests is named by its bytecode, too, which each version of Python has its own of.
    kernels = {re.sub("_[0-9a-f]{12}(?=_)", "", kernel.name): kernel.ptx_file for kernel in all_kernels()}
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda file: assemble(file, architecture), kernels.values())
    return dict(zip(kernels, reports, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.skipif(tool("ptxas") is None or tool("nvdisasm") is None, reason="needs NVIDIA's assembler")
def test_kernels_stay_in_their_budget(architecture):
    budget, taken = recorded(), measured(architecture)
    assert taken.keys() == budget.keys(), "kernels came or went: record the budget anew"
    wrong = []
    for name, now in taken.items():
        before = budget[name][architecture]
        if now.stack:
            wrong.append(f"{name}: {now.stack} bytes of local memory")
        if now.registers > before.registers + 8 or now.shared > before.shared:
            wrong.append(f"{name}: {now[:2]} registers and bytes of shared memory, before {before[:2]}")
        lost = [key for key, count in before.instructions.items() if now.instructions.get(key, 0) < count // 2 + 1]
        if lost:
            wrong.append(f"{name}: lost {lost}: {before.instructions} became {now.instructions}")
    assert not wrong, "\n".join(wrong)


def main() -> None:
    """Record the budget."""
    taken = {architecture: measured(architecture) for architecture in ARCHITECTURES}
    names = sorted(taken[ARCHITECTURES[0]])
    reports = ({arch: kernels[name] for arch, kernels in taken.items()} for name in names)
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in zip(names, reports, strict=True)]
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
