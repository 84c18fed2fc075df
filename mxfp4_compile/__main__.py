"""``python -m mxfp4_compile``: the command line."""

import sys

from .tools.main import main

sys.exit(main())
