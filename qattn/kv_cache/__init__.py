"""Where keys and values of earlier tokens are kept."""

from qattn.kv_cache.contiguous import KVCache as KVCache
from qattn.kv_cache.contiguous import KVCacheParams as KVCacheParams
