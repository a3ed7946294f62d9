"""What the attention of each GGUF architecture is: descriptions only, read out of a file's metadata.

One file per family; a file that is added is found.
"""

from qattn.architectures._config import AttentionConfig as AttentionConfig
from qattn.architectures._config import Gate as Gate
from qattn.architectures._config import Latent as Latent
from qattn.architectures._config import Norm as Norm
from qattn.architectures._config import Temperature as Temperature
from qattn.architectures._registry import BESIDE as BESIDE
from qattn.architectures._registry import attention_layers as attention_layers
from qattn.architectures._registry import describe as describe
from qattn.architectures._registry import names as names
from qattn.architectures._registry import unsupported as unsupported
