"""The script that measures a GPU runs through, in the emulator, where its times mean nothing."""

import math
from pathlib import Path


def test_every_row_of_the_gpu_script(cupy, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "perf"))
    import gpu
    from cases import Shape

    sizes = gpu.Sizes(
        shape=Shape(256, 2, 1, 128),
        copied=1 << 12,
        square=16,
        weights=1 << 12,
        rotation=1 << 18,
        prompt=20,
        drafted=7,
        attended=64,
        behind=128,
        sequences=2,
        repeats=1,
    )
    rows = gpu.measure(cupy, "cuda:0", sizes, 1, ["Q4_0"], ["Q4_0"])
    works = " ".join(row["work"] for row in rows)
    for part in (
        "copy",
        "cuBLAS",
        "dequantize",
        "1 tokens",
        "20 tokens, int8",
        "20 tokens, fast",
        "2 sequences @ 128, q4_0",
        "7 tokens @ 128, q8_0",
        "64 tokens",
        "graph",
    ):
        assert part in works
    assert all(math.isfinite(row["share %"]) and row["share %"] > 0 for row in rows)
