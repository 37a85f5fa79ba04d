"""`python -m microserve.engine`: the engine daemon."""

from __future__ import annotations

import sys

from microserve.engine.daemon import main

if __name__ == "__main__":
    sys.exit(main())
