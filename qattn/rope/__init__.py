"""Rotary position embedding: frequencies and tables of angles."""

from qattn.rope.tables import RotaryEmbedding as RotaryEmbedding
from qattn.rope.tables import Rotation as Rotation
