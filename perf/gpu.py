"""What an NVIDIA GPU reaches, as shares of what it can: one table, in one run.

First the GPU's own limits: copying within its memory (bytes read and written), and cuBLAS in float16.  Then, in Llama 3
8B's shape: dequantization to float16, by format; projections of one token, over weights in rotation that exceed every
cache, and of 4096 tokens, by the kernels ("int8") and by cuBLAS where that is faster ("fast"); attention of one token
for each of 8 sequences behind 32768 others, of 16 tokens of one, and of 8192 tokens; and a whole layer's step for one
token, replayed from a CUDA graph.  Times are medians between CUDA events.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import numpy as np
from cases import Shape, gaussian, random_layer, random_weights

import qattn
from qattn import devices, formats, masks
from qattn.batch import Batch
from qattn.logits import Logits


class Sizes(NamedTuple):
    """How large the work is."""

    shape: Shape = Shape()
    copied: int = 1 << 30
    """Bytes."""
    square: int = 8192
    """Of cuBLAS's matrices."""
    weights: int = 1 << 28
    """Weights that are dequantized."""
    rotation: int = 400 << 20
    """Bytes of packed weights that a projection goes through before it comes to the same again."""
    prompt: int = 4096
    drafted: int = 16
    """Tokens of one sequence, as when drafts are verified."""
    attended: int = 8192
    behind: int = 32768
    sequences: int = 8
    repeats: int = 10
    """Calls between two events."""


class Bench:
    """A GPU, its limits, and its clock."""

    def __init__(self, cupy: Any, device: str, sizes: Sizes, rounds: int) -> None:
        self.cupy, self.device, self.sizes, self.rounds = cupy, device, sizes, rounds
        source = cupy.empty(sizes.copied // 4, np.float32)
        target = cupy.empty_like(source)
        self.copy = 2 * source.nbytes / self.seconds(functools.partial(cupy.copyto, target, source))
        del source, target
        square = cupy.asarray(gaussian(sizes.square, sizes.square)).astype(np.float16)  # ones take less power
        self.cublas = 2 * sizes.square**3 / self.seconds(lambda: square @ square)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median time of a call."""
        cupy, samples, repeats = self.cupy, [], self.sizes.repeats
        call()
        for _ in range(self.rounds):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            samples.append(cupy.cuda.get_elapsed_time(start, end) / 1e3 / repeats)
        return statistics.median(samples)

    @staticmethod
    def recorded(calls: list[Any]) -> Callable[[], object]:
        """The kernels of some calls as one graph: a GPU is faster than Python can launch them."""
        from qattn.backends import cuda

        calls[0]()  # loads the kernels
        program = cuda.Program()
        with program.recording():
            for call in calls:
                call()
        return program.replay

    def row(self, work: str, seconds: float, *, moved: float = 0, operations: float = 0) -> harness.Row:
        """A row with the share of what binds: memory, or cuBLAS's rate."""
        share = moved / self.copy / seconds if moved else operations / self.cublas / seconds
        return {
            "work": work,
            "µs": 1e6 * seconds,
            "GB/s": moved / seconds / 1e9 if moved else None,
            "TFLOP/s": operations / seconds / 1e12 if operations else None,
            "share %": 100 * share,
        }

    def limits(self) -> Iterator[harness.Row]:
        yield {"work": "copy", "µs": None, "GB/s": self.copy / 1e9, "TFLOP/s": None, "share %": 100.0}
        yield {"work": "cuBLAS float16", "µs": None, "GB/s": None, "TFLOP/s": self.cublas / 1e12, "share %": 100.0}

    def dequantize(self, names: list[str]) -> Iterator[harness.Row]:
        from qattn.backends import cuda

        for name in names:
            columns = 4096
            w = random_weights(name, max(1, self.sizes.weights // columns), columns).to(self.device)
            out = self.cupy.empty(w.shape, np.float16)
            seconds = self.seconds(functools.partial(cuda.dequantize, w.data, formats.get(name), out))
            yield self.row(f"{name} dequantize to f16", seconds, moved=w.nbytes + out.nbytes)

    def projection(self, names: list[str], tokens: int) -> Iterator[harness.Row]:
        rows, columns = 4 * self.sizes.shape.hidden, self.sizes.shape.hidden
        x = self.cupy.asarray(gaussian(tokens, columns))
        for name in names:
            packed = qattn.PackedMatrix(random_weights(name, rows, columns)).to(self.device)
            count = max(1, math.ceil(self.sizes.rotation / packed.nbytes)) if tokens == 1 else 1
            copies = [packed, *(packed.to("cpu").to(self.device) for _ in range(count - 1))]
            out = self.cupy.empty((tokens, rows), np.float32)
            work = f"{name} projection {rows} × {columns}, {tokens} tokens"
            if tokens == 1:
                calls = [functools.partial(qattn.matmul, x, w, out=out) for w in copies]
                yield self.row(work, self.seconds(self.recorded(calls)) / count, moved=packed.nbytes)
            else:  # "fast" takes the better of the kernels and cuBLAS
                for precision in ("int8", "fast"):
                    call = functools.partial(qattn.matmul, x, packed, out=out, precision=precision)
                    seconds = self.seconds(call)
                    yield self.row(f"{work}, {precision}", seconds, operations=2 * tokens * rows * columns)

    def attention(self) -> Iterator[harness.Row]:
        s, shape = self.sizes, self.sizes.shape
        for dtype in ("float16", "q8_0", "q4_0"):
            seconds, moved = self.attend(dtype, 1, s.behind, s.sequences)
            yield self.row(f"attention, {s.sequences} sequences @ {s.behind}, {dtype}", seconds, moved=moved)
            seconds, moved = self.attend(dtype, s.drafted, s.behind, 1)
            yield self.row(f"attention, {s.drafted} tokens @ {s.behind}, {dtype}", seconds, moved=moved)
            seconds, _ = self.attend(dtype, s.attended, 0, 1)
            operations = shape.attention_ops(s.attended, 0)
            yield self.row(f"attention, {s.attended} tokens, causal, {dtype}", seconds, operations=operations)
        yield from self.sdpa(s.attended, operations)

    def attend(self, dtype: str, tokens: int, behind: int, sequences: int) -> tuple[float, int]:
        """Seconds for new tokens of each sequence over a cache of that type, and its bytes."""
        from qattn.backends import cuda

        shape, cupy = self.sizes.shape, self.cupy
        params = qattn.KVCacheParams(shape.kv_heads, shape.head_dim, dtype=dtype)
        cache = qattn.KVCache(params, sequences, device=self.device)
        cache.reserve(np.full(sequences, behind + tokens))
        cache.counts[...] = behind + tokens
        q = cupy.asarray(gaussian(sequences * tokens, shape.heads, shape.head_dim))
        out, offsets = cupy.empty_like(q), cupy.asarray(np.arange(sequences + 1) * tokens)
        logits, causal = Logits(shape.head_dim**-0.5), masks.get("causal")
        call = functools.partial(cuda.attend, q, cache, offsets, causal, logits, exact=False, out=out)
        return self.seconds(self.recorded([call])), sequences * (behind + tokens) * params.bytes_per_token

    def sdpa(self, tokens: int, operations: int) -> Iterator[harness.Row]:
        """The same by PyTorch, where it is installed with CUDA."""
        try:
            import torch
        except ImportError:
            return
        if not torch.cuda.is_available():
            return
        shape = self.sizes.shape
        q, k, v = (
            torch.randn(1, heads, tokens, shape.head_dim, dtype=torch.float16, device="cuda")
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        attend = torch.nn.functional.scaled_dot_product_attention
        stream = self.cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        with stream:
            seconds = self.seconds(lambda: attend(q, k, v, is_causal=True, enable_gqa=True))
        yield self.row(f"torch SDPA, {tokens} tokens, causal, f16", seconds, operations=operations)

    def step(self, name: str) -> Iterator[harness.Row]:
        """One token through one layer with an empty cache, replayed."""
        from qattn.backends import cuda

        layer = random_layer(name, self.sizes.shape, device=self.device)
        x, cache = self.cupy.asarray(gaussian(1, self.sizes.shape.hidden)), layer.kv_cache
        layer(x)
        zeros = self.cupy.zeros(1, np.int64)
        batch = Batch(zeros, zeros, zeros, self.cupy.asarray(np.array([0, 1])), one_each=True)
        program = cuda.Program()
        with program.recording():
            layer.forward(x, cache, batch, layer.rope.rotation(1, self.device))
        yield self.row(f"{name} layer, one token, from a graph", self.seconds(program.replay), moved=layer.nbytes)


def measure(
    cupy: Any, device: str, sizes: Sizes, rounds: int, names: list[str], blocks: list[str]
) -> list[harness.Row]:
    """All rows."""
    bench = Bench(cupy, device, sizes, rounds)
    rows = [*bench.limits(), *bench.dequantize(blocks), *bench.projection(names, 1)]
    rows += [*bench.projection(names, sizes.prompt), *bench.attention(), *bench.step(names[0])]
    return rows


def main() -> None:
    parser: argparse.ArgumentParser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "Q4_K", "Q6_K", "Q8_0"], help="of projections")
    args = harness.start(parser)
    try:
        device = devices.resolve(args.device)
    except qattn.DeviceError as error:
        sys.exit(f"gpu.py: {error}")
    import cupy

    with devices.current(device):
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        print(f"gpu: {properties['name'].decode()}  driver: {cupy.cuda.runtime.driverGetVersion()}")
        blocks = [name for name in formats.names() if not formats.get(name).is_float]
        rows = measure(cupy, device, Sizes(), args.rounds, args.formats, blocks)
    harness.report(args, rows, x="work", y="share %")


if __name__ == "__main__":
    main()
