"""``python -m qattn`` is ``qattn``."""

import sys

from qattn.cli import main

sys.exit(main())
