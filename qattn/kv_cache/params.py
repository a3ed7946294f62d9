"""What a cache stores for one layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qattn import _check, cache_types
from qattn.cache_types import CacheType


@dataclass(frozen=True)
class KVCacheParams:
    """What a cache stores for one layer.

    Parameters
    ----------
    n_kv_heads, head_dim : int
        KV heads, and elements of a key.
    value_dim : int, optional
        Elements of a value, if other than `head_dim`.
    dtype : str
        What keys and values are rounded to: "float32", "float16", "bfloat16", "float8" (e4m3), or blocks of 32 elements
        as in the GGUF format of that name: "q8_0", "q5_1", "q5_0", "q4_1", "q4_0" or "iq4_nl".  Two of them for keys
        and values apart, in this order: "q8_0/q4_0".
    max_length : int, optional
        Tokens that a sequence can have.  Without it, the cache grows as long as there is memory.
    hadamard : bool
        Turn keys and values by a Walsh-Hadamard matrix before they are rounded, and queries and outputs likewise, which
        changes nothing else: an outlier is spread over its whole head, where it coarsens the rounding less.

    Notes
    -----
    The error that a type adds to the output of attention, as normalized mean squared error against a float32 cache:
    for Gaussian q, k and v, and the largest in the first, middle and last layer of SmolLM2-135M and of Gemma 3 270M;
    behind each, turned by a Hadamard matrix (``perf/cache_error.py``).

    ========  ==============  ========  =======  =======  =======  =======
    type      bits / element  Gaussian  SmolLM2  turned   Gemma 3  turned
    ========  ==============  ========  =======  =======  =======  =======
    float16   16              6.6e-8    1.6e-7            1.4e-7
    bfloat16  16              4.3e-6    6.4e-6            1.0e-5
    float8    8               1.1e-3    2.3e-3   1.7e-3   2.6e-3   2.3e-3
    q8_0      8.5             4.4e-5    2.0e-4   7.1e-5   2.6e-4   7.9e-5
    q5_1      6               2.2e-3    6.7e-3   3.0e-3   1.3e-2   5.3e-3
    q5_0      5.5             2.7e-3    1.4e-2   4.5e-3   1.4e-2   5.1e-3
    q4_1      5               9.1e-3    3.2e-2   1.4e-2   4.0e-2   1.5e-2
    q4_0      4.5             1.1e-2    4.8e-2   1.4e-2   4.6e-2   2.1e-2
    iq4_nl    4.5             9.1e-3    3.1e-2   1.3e-2   3.1e-2   1.9e-2
    ========  ==============  ========  =======  =======  =======  =======
    """

    n_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    dtype: str = "bfloat16"
    max_length: int | None = None
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name in ("n_kv_heads", "head_dim", "value_dim", "max_length"):
            value = getattr(self, name)
            if value is not None or name in ("n_kv_heads", "head_dim"):
                _check.at_least(name, value, 1)
                object.__setattr__(self, name, int(value))
        _check.choice("hadamard", self.hadamard, (True, False))
        if isinstance(self.dtype, (tuple, list)) or self.dtype is None:
            raise ValueError(f'dtype is {self.dtype!r}; expected a name, or two like "q8_0/q4_0"')
        given = self.dtype if isinstance(self.dtype, str) else np.dtype(self.dtype).name
        names = [cache_types.named(name).name for name in given.lower().split("/", 1)]
        object.__setattr__(self, "dtype", "/".join(dict.fromkeys(names)))

    @property
    def key_type(self) -> CacheType:
        """The type of keys."""
        return cache_types.named(self.dtype.split("/")[0])

    @property
    def value_type(self) -> CacheType:
        """The type of values."""
        return cache_types.named(self.dtype.split("/")[-1])

    @property
    def key_kind(self) -> str:
        """The type of keys as kernels call it."""
        return self.key_type.kind

    @property
    def value_kind(self) -> str:
        """The type of values as kernels call it."""
        return self.value_type.kind

    @property
    def values(self) -> int:
        """Elements of a value."""
        return self.value_dim or self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes."""
        return self.n_kv_heads * (self.key_type.row_bytes(self.head_dim) + self.value_type.row_bytes(self.values))
