"""The same work by other libraries, in the same run and in turn with qattn, as ratios: above 1, qattn is faster.

layer   llama.cpp (llama-cpp-python) on a file of four layers of Llama 3 8B's attention, random weights, and next to no
        feed-forward network, so that nearly all work is attention blocks: prefill of 512 tokens, and decode of 32, one
        after the other as when a model writes: cores need some milliseconds to be at full speed after a rest
model   llama.cpp on SmolLM2-135M, or others that `qattn fetch` knows: a prompt of 512 tokens, and 64 more
torch   PyTorch: F.linear in float32 and bfloat16, scaled_dot_product_attention
gguf    dequantization by the gguf package

llama.cpp runs with batches of 512 tokens, its cache in float16, with and without flash attention; of several peers the
fastest counts.  Takes two minutes, the layers one for each format.  Peers that are not installed are named and left
out; all come with pip install ".[peers]".
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
from cases import Shape, gaussian, random_cache, random_weights, write_llama

import qattn
from qattn import masks
from qattn.backends import cpu
from qattn.logits import Logits
from qattn.models.fetch import SOURCES, fetch

LAYERS = 4
PROMPT, GENERATE, DECODE = 512, 64, 32
Calls = dict[str, Callable[[], object]]


def against(work: str, calls: Calls, args: argparse.Namespace) -> harness.Row:
    """Time qattn and its peers in turn."""
    times = harness.compare(calls, args.rounds)
    mine = times.pop("qattn")
    best = min(times, key=lambda name: times[name].median)
    return {
        "work": work,
        "qattn ms": 1e3 * mine.median,
        "± %": 100 * mine.spread,
        "peer": best,
        "peer ms": 1e3 * times[best].median,
        "peer ± %": 100 * times[best].spread,
        "ratio": times[best].median / mine.median,
    }


def have(module: str) -> bool:
    """Whether a peer is installed; says so if it isn't."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"{module} is not installed: skipped")
    return found


def layer(args: argparse.Namespace) -> Iterator[harness.Row]:
    if not have("llama_cpp"):
        return
    from llama_peer import Contestants

    for name in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            path = write_llama(Path(folder, "layers.gguf"), name, LAYERS)
            both = Contestants(path, max(args.depths) + PROMPT, args.threads)
            print(f"{name}: logits differ by {both.difference():.1e} (NMSE)", flush=True)
            for depth in sorted(args.depths):
                both.fill(depth)
                if depth <= args.prefill_depth:
                    yield against(f"{name} prefill {PROMPT} @ {depth}", both.calls([both.tokens(PROMPT)]), args)
                yield against(f"{name} decode {DECODE} @ {depth}", both.calls(list(both.tokens(DECODE)[:, None])), args)
            both.close()


def model(args: argparse.Namespace) -> Iterator[harness.Row]:
    if not have("llama_cpp"):
        return
    from llama_peer import Contestants

    for name in args.models:
        both = Contestants(fetch(SOURCES[name]), PROMPT + GENERATE, args.threads)
        print(f"{name}: logits differ by {both.difference():.1e} (NMSE)", flush=True)
        yield against(f"{name} prompt {PROMPT}", both.calls([both.tokens(PROMPT)]), args)
        both.fill(PROMPT)
        yield against(f"{name} generate {GENERATE}", both.calls(list(both.tokens(GENERATE)[:, None])), args)
        both.close()


def torch(args: argparse.Namespace) -> Iterator[harness.Row]:
    if not have("torch"):
        return
    import torch

    torch.set_num_threads(args.threads)
    kinds = {"torch f32": torch.float32, "torch bf16": torch.bfloat16}
    for name in args.formats:
        for tokens in (1, 8, 512):
            yield against(f"{name} linear 4096x14336, {tokens} tokens", _linear(name, tokens, kinds), args)
    for tokens, depth in ((512, 0), (1, 4096), (1, 16384)):
        yield against(f"attention, {tokens} tokens @ {depth}", _attention(tokens, depth, kinds), args)


def _linear(name: str, tokens: int, kinds: dict[str, Any]) -> Calls:
    """The product that a feed-forward network ends with, over weights that aren't in the processor's caches."""
    import torch

    rows, columns = 4096, 14336
    x, w = gaussian(tokens, columns), random_weights(name, rows, columns)
    packed = [qattn.PackedMatrix(w) for _ in range(harness.copies(w.nbytes))]
    calls: Calls = {"qattn": harness.in_turn(packed, functools.partial(qattn.matmul, x))}
    for peer, kind in kinds.items():
        y = torch.from_numpy(x).to(kind)
        weights = [torch.randn(rows, columns).to(kind) for _ in range(harness.copies(rows * columns * kind.itemsize))]
        calls[peer] = harness.in_turn(weights, functools.partial(torch.nn.functional.linear, y))
    return calls


def _attention(tokens: int, depth: int, kinds: dict[str, Any]) -> Calls:
    """Attention over a bfloat16 cache, over copies that together exceed the processor's caches."""
    import torch

    shape, keys, offsets, mask = Shape(), depth + tokens, np.array([0, tokens]), masks.get("causal")
    params = qattn.KVCacheParams(shape.kv_heads, shape.head_dim)
    copies = range(harness.copies(params.bytes_per_token * keys))
    q, logits = gaussian(tokens, shape.heads, shape.head_dim), Logits(shape.head_dim**-0.5)
    caches = [random_cache(params, keys) for _ in copies]
    calls: Calls = {"qattn": harness.in_turn(caches, lambda c: cpu.attend(q, c, offsets, mask, logits, exact=False))}
    for peer, kind in kinds.items():
        y = torch.from_numpy(q).transpose(0, 1)[None].to(kind).contiguous()
        kv = [torch.randn(2, 1, shape.kv_heads, keys, shape.head_dim).to(kind) for _ in copies]
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, y)
        attend = functools.partial(attend, is_causal=tokens > 1, enable_gqa=True)
        calls[peer] = harness.in_turn(kv, lambda both, attend=attend: attend(*both))
    return calls


def gguf(args: argparse.Namespace) -> Iterator[harness.Row]:
    from gguf import GGMLQuantizationType, quants

    for name in args.formats:
        w = random_weights(name, 4096, 4096)
        calls: Calls = {
            "qattn": lambda w=w: qattn.dequantize(w),
            "gguf": lambda w=w, kind=GGMLQuantizationType[name]: quants.dequantize(w.data, kind),
        }
        yield against(f"{name} dequantize 4096x4096", calls, args)


SECTIONS = {"layer": layer, "model": model, "torch": torch, "gguf": gguf}


def main() -> None:
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--formats", nargs="+", default=["Q4_0"], help="Q4_0 Q4_K Q6_K Q8_0 …")
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 4096], help="16384 takes minutes to fill")
    parser.add_argument("--prefill-depth", type=int, default=4096, help="up to which prefill is timed")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=SOURCES)
    args = harness.start(parser)
    rows = [row for name in args.only for row in SECTIONS[name](args)]
    if rows:
        harness.report(args, rows, x="work", y="ratio")


if __name__ == "__main__":
    main()
