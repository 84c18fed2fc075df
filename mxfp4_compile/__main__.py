"""``python -m mxfp4_compile``: the command line."""

import sys

from .tools.cli import main

sys.exit(main())
