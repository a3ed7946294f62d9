"""Attention masks: which keys a query sees.  One class per file; a file that is added is found."""

from qattn.masks._registry import Mask as Mask
from qattn.masks._registry import MHAMaskVariant as MHAMaskVariant
from qattn.masks._registry import from_function as from_function
from qattn.masks._registry import get as get
from qattn.masks._registry import has_window as has_window
from qattn.masks._registry import names as names
from qattn.masks._registry import visible as visible
from qattn.masks.causal import Causal as Causal
from qattn.masks.chunked import Chunked as Chunked
from qattn.masks.null import Null as Null
from qattn.masks.prefix import PrefixLM as PrefixLM
from qattn.masks.window import SlidingWindow as SlidingWindow
from qattn.masks.window import SlidingWindowNoncausal as SlidingWindowNoncausal
from qattn.masks.window import SymmetricWindow as SymmetricWindow
