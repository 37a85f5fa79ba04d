"""Signs of life of a daemon, as a service manager takes them: the other end of `runtime.systemd` (`sd_notify(3)`)."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_LONGEST = 4096


class Signs:
    """Listens to one process, on the running loop, while the block lasts.

    `silent` is called when, after it said that it is ready and before it says that it stops, it has given no sign of
    life for `within` seconds. A status is none: who hangs may say so.
    """

    def __init__(self, within: float, silent: Callable[[], None]) -> None:
        self._within = within
        self._silent = silent
        # In the abstract namespace of Linux: no file is left behind.
        name = f"microserve-{os.getpid()}-{secrets.token_hex(8)}"
        self.environ = {"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": str(round(within * 1_000_000))}
        """What the process has to be started with."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.bind(f"\0{name}")
        self._serves = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._wait(False)
        self._socket.close()

    def _read(self) -> bool:
        """Takes what has come. Whether there was a sign of life."""
        lives = False
        while True:
            try:
                said = self._socket.recv(_LONGEST).split(b"\n")
            except BlockingIOError:
                return lives
            self._serves = (self._serves or b"READY=1" in said) and b"STOPPING=1" not in said
            if not self._serves:
                self._wait(False)
            elif b"WATCHDOG=1" in said or b"READY=1" in said:
                lives = True
                self._wait(True)

    def _wait(self, on: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._within, self._over) if on else None

    def _over(self) -> None:
        # We may have been the one that stood still: what came meanwhile counts.
        if not self._read() and self._serves:
            self._silent()
