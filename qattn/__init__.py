"""qattn: the attention of GGUF-quantized language models, from Python.

>>> import qattn
>>> model = qattn.open("model.gguf")                                # doctest: +SKIP
>>> attn = qattn.GGUFQAttentionWithRope.from_gguf(model, layer=0)   # doctest: +SKIP
>>> y = attn(x)                                                     # doctest: +SKIP
"""

from qattn.array import QuantArray as QuantArray
from qattn.attention import AttentionWithRope as AttentionWithRope
from qattn.capabilities import capabilities as capabilities
from qattn.cpu.threads import get_num_threads as get_num_threads
from qattn.cpu.threads import set_num_threads as set_num_threads
from qattn.errors import CacheError as CacheError
from qattn.errors import DeviceError as DeviceError
from qattn.errors import FormatError as FormatError
from qattn.errors import GGUFError as GGUFError
from qattn.errors import MissingExtraError as MissingExtraError
from qattn.errors import QattnError as QattnError
from qattn.gguf_attention import GGUFQAttentionWithRope as GGUFQAttentionWithRope
from qattn.gguf_file import GGUFFile as GGUFFile
from qattn.gguf_file import open as open
from qattn.kv_cache import KVCache as KVCache
from qattn.kv_cache import KVCacheParams as KVCacheParams
from qattn.kv_cache import PagedKVCache as PagedKVCache
from qattn.kv_cache import merge_states as merge_states
from qattn.linear import Linear as Linear
from qattn.masks import MHAMaskVariant as MHAMaskVariant
from qattn.ops import dequantize as dequantize
from qattn.ops import matmul as matmul
from qattn.ops import rope as rope
from qattn.packing import PackedMatrix as PackedMatrix
from qattn.quantize import quantize as quantize
from qattn.rope import NTK as NTK
from qattn.rope import DynamicNTK as DynamicNTK
from qattn.rope import LongRoPE as LongRoPE
from qattn.rope import RotaryEmbedding as RotaryEmbedding
from qattn.rope import YaRN as YaRN
from qattn.softmax_attention import alibi_slopes as alibi_slopes
from qattn.softmax_attention import attention as attention
from qattn.softmax_attention import relative_biases as relative_biases

__version__ = "0.1.0"
