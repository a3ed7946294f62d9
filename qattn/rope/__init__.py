"""Rotary position embedding: frequencies, their scalings, and tables of angles."""

from qattn.rope.scaling import NTK as NTK
from qattn.rope.scaling import DynamicNTK as DynamicNTK
from qattn.rope.scaling import LongRoPE as LongRoPE
from qattn.rope.scaling import Scaling as Scaling
from qattn.rope.scaling import YaRN as YaRN
from qattn.rope.scaling import longrope_magnitude as longrope_magnitude
from qattn.rope.scaling import yarn_magnitude as yarn_magnitude
from qattn.rope.tables import RotaryEmbedding as RotaryEmbedding
from qattn.rope.tables import Rotation as Rotation
from qattn.rope.tables import shared as shared
