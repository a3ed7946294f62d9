"""Blocks that llama.cpp computed, on a GPU: every architecture that was recorded."""

import numpy as np
import pytest

import qattn
from tests.reference import nmse
from tests.test_architectures import FILES, output_scale


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_layer_gives_the_recorded_block(cupy, path):
    recorded = np.load(path.with_suffix(".npz"))
    for name in [name for name in recorded.files if name.startswith("x-")]:
        attn = qattn.GGUFQAttentionWithRope.from_gguf(path, int(name[2:]), precision="int8", device="cuda:0")
        tokens = len(recorded[name]) if attn.mask.bounds(0, 9)[1] > 1 else 8  # later ones don't count
        with qattn.open(path) as model:
            scale = output_scale(model, attn.config)
        bias = 0 if attn.o_proj.bias is None else attn.o_proj.bias.get()
        got = attn(cupy.asarray(recorded[name][:tokens]))
        assert nmse(got.get(), recorded[name.replace("x", "wo", 1)][:tokens] * scale + bias) < 3e-4
