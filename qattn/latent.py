"""Multi-head latent attention (DeepSeek-AI, 2024): keys and values are made of one short vector for each token.

With weights that are taken apart (``k_b_proj`` and ``v_b_proj``), the vector itself is cached: a head's query is
multiplied by its part of ``k_b_proj`` before attention, its output by that of ``v_b_proj`` afterwards, and all heads
share one key and one value.  With ``kv_b_proj``, each head has its own, as in any other attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qattn import ops
from qattn._backend import namespace
from qattn.architectures import AttentionConfig, Norm
from qattn.array import QuantArray
from qattn.head_steps import HeadNorm
from qattn.packing import PackedMatrix
from qattn.state import State

Array = np.ndarray[Any, Any]


class LatentProjection:
    """x → q, k and v side by side, the part of q and k that turns first in each head."""

    bias = None
    finishing, gate_finishes = (None, None, None), False

    def __init__(self, config: AttentionConfig, state: State, *, device: str, precision: ops.Precision) -> None:
        if config.latent is None:
            raise ValueError("the description has no latent vector")
        self._config, self._latent, self._precision = config, config.latent, precision
        c, latent, heads = config, config.latent, config.num_attention_heads
        plain = latent.key_dim - latent.rope_dims
        self.nbytes = 0
        """Bytes of the packed weights."""

        def packed(weights: QuantArray) -> PackedMatrix:
            matrix = PackedMatrix(weights).to(device)
            self.nbytes += matrix.nbytes
            return matrix

        def load(name: str, rows: int, columns: int) -> tuple[PackedMatrix, float]:
            return packed(state.matrix(name, rows, columns)), state.factor(name)

        def load_each(name: str, rows: int, columns: int) -> tuple[PackedMatrix | list[PackedMatrix], float]:
            """All heads' matrices as one, or a list of them if they can't be divided again."""
            matrices = state.matrices(name, heads, rows, columns)
            together = PackedMatrix(np.concatenate(matrices)).to(device)
            if together.divisible(heads):
                self.nbytes += together.nbytes
                return together, state.factor(name)
            return [packed(matrix) for matrix in matrices], state.factor(name)

        norm = Norm("rms", latent.epsilon)
        if latent.q_rank:
            self._q_a = load("q_a_proj", latent.q_rank, c.hidden_size)
            self._q_a_norm = HeadNorm(norm, "q_a_norm", state, 1, latent.q_rank, device)
            self._q_b = load("q_b_proj", heads * latent.key_dim, latent.q_rank)
        else:
            self._q_b = load("q_proj", heads * latent.key_dim, c.hidden_size)
        self._shared_norm: HeadNorm | None = None
        if latent.shared_norm:
            self._shared_norm = HeadNorm(norm, "k_norm", state, 1, latent.rope_dims, device)
        self._gate = None
        if c.gate is not None:
            self._gate = load("gate_proj", state.rows("gate_proj"), c.hidden_size)
        self._kv_a = load("kv_a_proj", latent.rank + latent.rope_dims, c.hidden_size)
        self._kv_a_norm = HeadNorm(norm, "kv_a_norm", state, 1, latent.rank, device)
        if latent.absorbed:
            self._k_b, self._v_b = (
                load_each("k_b_proj", latent.rank, plain),
                load_each("v_b_proj", latent.value_dim, latent.rank),
            )
        else:
            self._kv_b = load("kv_b_proj", heads * (plain + latent.value_dim), latent.rank)

    def _times(self, x: Array, weights: tuple[PackedMatrix, float]) -> Array:
        matrix, factor = weights
        product = ops.affine(x, matrix, None, precision=self._precision)
        return product if factor == 1 else product * np.float32(factor)

    def _times_each(self, x: Array, weights: tuple[PackedMatrix | list[PackedMatrix], float]) -> Array:
        """x (tokens, heads, n), a matrix for each head → (tokens, heads, m)."""
        xp, (matrices, factor) = namespace(x), weights
        if isinstance(matrices, PackedMatrix):
            product = ops.affine_each(x, matrices, precision=self._precision)
            return product if factor == 1 else product * np.float32(factor)
        parts = [self._times(xp.ascontiguousarray(x[:, h]), (matrix, factor)) for h, matrix in enumerate(matrices)]
        return xp.stack(parts, axis=1)

    def __call__(self, x: Array) -> Array:
        """x (tokens, hidden_size) → (tokens, outputs) float32."""
        latent, xp, tokens, heads = self._latent, namespace(x), len(x), self._config.num_attention_heads
        plain, turning = latent.key_dim - latent.rope_dims, latent.rope_dims
        q = x
        if latent.q_rank:
            q = self._times(x, self._q_a)
            self._q_a_norm(q, 0)
        q = self._times(q, self._q_b).reshape(tokens, heads, latent.key_dim)
        vector = self._times(x, self._kv_a)
        self._kv_a_norm(vector, 0)
        if self._shared_norm is not None:
            self._shared_norm(vector, latent.rank)
        short, shared = xp.ascontiguousarray(vector[:, : latent.rank]), vector[:, latent.rank :]
        if latent.absorbed:
            k, v = xp.concatenate([shared, short], axis=1), short
            q = xp.concatenate([q[..., plain:], self._times_each(q[..., :plain], self._k_b)], axis=2)
        else:
            both = self._times(short, self._kv_b).reshape(tokens, heads, plain + latent.value_dim)
            same = xp.broadcast_to(shared[:, None], (tokens, heads, turning))
            k, v = xp.concatenate([same, both[..., :plain]], axis=2), both[..., plain:]
            q = xp.concatenate([q[..., plain:], q[..., :plain]], axis=2)
        parts = [q, k, v] if self._gate is None else [q, k, v, self._times(x, self._gate)]
        rows = xp.concatenate([part.reshape(tokens, math.prod(part.shape[1:])) for part in parts], axis=1)
        return xp.ascontiguousarray(rows, dtype=np.float32)

    unfinished = __call__  # nothing is left to others

    def expand(self, heads: Array) -> Array:
        """What attention made of the vectors → the heads' output, (tokens, heads, value_dim) float32."""
        return self._times_each(heads, self._v_b) if self._latent.absorbed else heads
