"""Every kernel is assembled for every architecture, and takes no more of a GPU than is recorded in ``budget.json``.

No kernel may spill registers, nor lose a wide load or a tensor core's instruction.  After a change that is meant to
change the figures: ``python -m tests.cuda.test_budget``.
"""

from __future__ import annotations

import json
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


def measured() -> dict[str, dict[str, Report]]:
    """What kernels take now."""
    kernels = {kernel.name: kernel.ptx_file for kernel in all_kernels()}
    jobs = [(name, arch) for name in kernels for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda job: assemble(kernels[job[0]], job[1]), jobs)
    taken: dict[str, dict[str, Report]] = {}
    for (name, arch), report in zip(jobs, reports, strict=True):
        taken.setdefault(name, {})[arch] = report
    return taken


@pytest.mark.skipif(tool("ptxas") is None or tool("nvdisasm") is None, reason="needs NVIDIA's assembler")
def test_kernels_stay_in_their_budget():
    budget, taken = recorded(), measured()
    assert taken.keys() == budget.keys(), "kernels came or went: record the budget anew"
    wrong = []
    for name, reports in taken.items():
        for arch, now in reports.items():
            before = budget[name][arch]
            if now.stack:
                wrong.append(f"{name} {arch}: {now.stack} bytes of local memory")
            if now.registers > before.registers + 8 or now.shared > before.shared:
                wrong.append(f"{name} {arch}: {now[:2]} registers and bytes of shared memory, before {before[:2]}")
            lost = [key for key, count in before.instructions.items() if now.instructions.get(key, 0) < count // 2 + 1]
            if lost:
                wrong.append(f"{name} {arch}: lost {lost}: {before.instructions} became {now.instructions}")
    assert not wrong, "\n".join(wrong)


def main() -> None:
    """Record the budget."""
    lines = [f"{json.dumps(name)}: {json.dumps(reports)}" for name, reports in sorted(measured().items())]
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
