"""`python -m microserve.tools` is the command `microserve`."""

import sys

from microserve.tools.cli import main

sys.exit(main())
