"""Start a daemon that must not outlive its supervisor: `python -m microserve.tools.child PID MODULE ARGUMENTS…`.

On Linux the kernel is asked to send SIGTERM when the supervisor (PID) dies, however it dies; then this process becomes
the daemon. Elsewhere it only becomes the daemon.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, module, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            # It died before the kernel was asked.
            sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


if __name__ == "__main__":
    main()
