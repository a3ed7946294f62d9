"""Every CUDA kernel, or the representatives of those that are generated for any head size or mask."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

from qattn import cache_types, formats, packing
from qattn.cuda import (
    activations,
    attend_decode,
    attend_exact,
    attend_fused,
    attend_prefill,
    attention,
    dequantize,
    feed_forward,
    heads,
    matmul,
    matmul_exact,
    rope,
    unpack,
)
from qattn.cuda.attend_variant import Storage, Variant
from qattn.cuda.kernel import Kernel
from qattn.masks.causal import Causal
from tests.cuda.cases import Strided

BLOCK_FORMATS = [formats.get(name) for name in formats.names() if not formats.get(name).is_float]
with mock.patch.object(packing, "wants_signed", return_value=False):  # whatever this host's CPU wants
    LAYOUT_OF = {format: packing.layout_of(format) for format in BLOCK_FORMATS}
LAYOUTS = list(dict.fromkeys(LAYOUT_OF.values()))
CODES = [type_.kind for type_ in cache_types.TYPES if type_.bits <= 8]
PLAIN = Variant(Causal)
FULL = Variant(Strided, cap=True, slopes=True, sinks=True, bias=True, distances=True, paged=True)
SOME = [formats.get(name) for name in ("Q4_0", "Q6_K")]  # for kinds of results that differ in the last step only


def all_kernels() -> Iterator[Kernel]:
    """The kernels, not yet compiled."""
    for kind in ("f32", "f16", "bf16"):
        chosen = BLOCK_FORMATS if kind == "f16" else SOME
        yield from (dequantize.blocks_kernel(format, kind) for format in chosen)
        yield from (unpack.unpack_kernel(layout, kind) for layout in dict.fromkeys(map(LAYOUT_OF.__getitem__, chosen)))
        yield from (attend_exact.exact_kernel(Storage(kind, kind), PLAIN), rope.store_kernel(Storage(kind, kind)))
    for layout in LAYOUTS:
        yield from (matmul.decode_kernel(layout, tokens) for tokens in (1, 16))
        yield from (matmul.prefill_kernel(layout), matmul_exact.exact_kernel(layout))
    yield from (matmul.decode_kernel(LAYOUT_OF[format], 8) for format in SOME)
    yield from (matmul.decode_kernel(LAYOUT_OF[format], tokens, shares=True) for format in SOME for tokens in (1, 16))
    for zero, groups in dict.fromkeys((layout.zero, max(1, 32 // layout.group)) for layout in LAYOUTS):
        yield activations.quantize_kernel(zero, groups)
    for kind in ("f16", "bf16"):
        for dim in (64, 128) if kind == "f16" else (128,):
            for made in (attend_decode.decode_kernel, attend_fused.fused_kernel, attend_prefill.prefill_kernel):
                yield made(Storage(kind, kind), PLAIN, dim, dim)
    for kind in CODES:
        yield attend_decode.decode_kernel(Storage(kind, kind), PLAIN, 128, 128)
    for kind in ("q8_0", "q5_1"):
        yield from (attend_exact.exact_kernel(Storage(kind, kind), PLAIN), rope.store_kernel(Storage(kind, kind)))
        yield attend_prefill.prefill_kernel(Storage(kind, kind), PLAIN, 128, 128)
    both = Storage("f16", "f16")
    yield attend_fused.fused_kernel(both, PLAIN, 128, 128, prepared=True)
    yield from (rope.store_kernel(Storage(kind, kind), prepared=True) for kind in ("bf16", "q8_0"))
    yield from (made(both, PLAIN, 576, 512) for made in (attend_decode.decode_kernel, attend_prefill.prefill_kernel))
    yield from (attend_exact.exact_kernel(both, FULL), rope.store_kernel(both, paged=True))
    for made in (attend_decode.decode_kernel, attend_fused.fused_kernel, attend_prefill.prefill_kernel):
        yield made(both, FULL, 128, 128)
    yield from map(heads.gate_kernel, heads.GATES)
    yield from map(feed_forward.gate_kernel, ("silu", "gelu"))
    for module in (attention, feed_forward, heads, matmul, rope):
        yield from (value for value in vars(module).values() if isinstance(value, Kernel))
