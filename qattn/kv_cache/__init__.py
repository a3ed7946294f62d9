"""Where keys and values of earlier tokens are kept."""

from qattn.kv_cache.cascading import merge_states as merge_states
from qattn.kv_cache.contiguous import KVCache as KVCache
from qattn.kv_cache.paged import PagedKVCache as PagedKVCache
from qattn.kv_cache.params import KVCacheParams as KVCacheParams
from qattn.kv_cache.sequences import SequenceCache as SequenceCache
