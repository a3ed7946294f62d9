"""What the decoder of each architecture is, beside its attention: descriptions only.

One file per family; a file that is added is found.
"""

from qattn.models.architectures._registry import Architecture as Architecture
from qattn.models.architectures._registry import get as get
from qattn.models.architectures._registry import names as names
