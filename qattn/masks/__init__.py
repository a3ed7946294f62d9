"""Attention masks: which keys a query sees.  One class per file; a file that is added is found."""

from qattn.masks._registry import Mask as Mask
from qattn.masks._registry import MHAMaskVariant as MHAMaskVariant
from qattn.masks._registry import get as get
from qattn.masks._registry import names as names
