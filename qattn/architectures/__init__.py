"""What the attention of each GGUF architecture is: descriptions only, read out of a file's metadata.

One file per family; a file that is added is found.
"""

from qattn.architectures._registry import AttentionConfig as AttentionConfig
from qattn.architectures._registry import describe as describe
from qattn.architectures._registry import names as names
from qattn.architectures._registry import unsupported as unsupported
