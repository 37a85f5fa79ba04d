"""`python -m microserve.router` is `microserve router`."""

import sys

from microserve.router.daemon import main

sys.exit(main())
