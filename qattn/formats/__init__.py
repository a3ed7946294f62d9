"""GGUF's tensor formats: one declarative file each.  A file that is added is found.

Every block format is read the same way: ``weight = scale[g] * level + offset[g]`` with small integer levels and a
group g of weights along a row.
"""

from qattn.formats._registry import Format as Format
from qattn.formats._registry import Planes as Planes
from qattn.formats._registry import by_type as by_type
from qattn.formats._registry import dequantize_reference as dequantize_reference
from qattn.formats._registry import get as get
from qattn.formats._registry import names as names
from qattn.formats._registry import scale_values as scale_values
