"""F64, F32, F16 and BF16: weights as they are."""

import numpy as np

from qattn.formats._registry import Format, register

register(Format("F32", type_id=0, block=1, bytes=4, dtype=np.dtype("<f4")))
register(Format("F16", type_id=1, block=1, bytes=2, dtype=np.dtype("<f2")))
register(Format("F64", type_id=28, block=1, bytes=8, dtype=np.dtype("<f8")))
register(Format("BF16", type_id=30, block=1, bytes=2, dtype=np.dtype("<u2")))
