"""What a daemon tells systemd: readiness, status, watchdog, reload and stop, as `sd_notify(3)` describes.

Without `NOTIFY_SOCKET` in the environment (a terminal, a container) everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

_MICROSECONDS = 1_000_000
_PATIENCE = 1.0
"""Seconds to wait for a manager whose queue is full, with what it must not miss. (Linux keeps ten datagrams.)"""

_log = get_logger(__name__)


class Notifier:
    """Sends datagrams to the service manager. `close` it at the end."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self._status = ""
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.watchdog_interval = _watchdog(environ) if self._socket is not None else None
        """Seconds between signs of life: half of what the manager allows. None: it wants none."""

    @property
    def active(self) -> bool:
        """Whether a service manager listens."""
        return self._socket is not None

    def ready(self, status: str = "") -> None:
        """The service serves."""
        self._send(_PATIENCE, READY=1, **({"STATUS": status} if status else {}))
        self._status = status

    def status(self, text: str) -> None:
        """One line for `systemctl status`; what it shows already is not sent again."""
        if text != self._status:
            self._status = text
            self._send(0.0, STATUS=text)

    def alive(self) -> bool:
        """A sign of life for the watchdog. False: the manager's queue is full, or it is gone."""
        return self._send(0.0, WATCHDOG=1)

    def extend_start(self, seconds: float, status: str) -> None:
        """Start-up takes longer than the unit allows: `seconds` more from now."""
        self._send(0.0, EXTEND_TIMEOUT_USEC=round(seconds * _MICROSECONDS), STATUS=status)
        self._status = status

    def reloading(self) -> None:
        """The configuration is read again; `ready` follows."""
        self._send(_PATIENCE, RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self, status: str = "draining", *, within: float | None = None) -> None:
        """The service finishes what it has, `within` so many seconds, if that may be more than the unit allows."""
        extended = {} if within is None else {"EXTEND_TIMEOUT_USEC": round(within * _MICROSECONDS)}
        self._send(_PATIENCE, STOPPING=1, STATUS=status, **extended)
        self._status = status

    def close(self) -> None:
        """Idempotent."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _send(self, patience: float, /, **fields: object) -> bool:
        """Whether it was sent. A manager that does not read holds the service up for `patience` seconds at most."""
        if self._socket is None:
            return False
        # A newline would begin another field.
        text = "\n".join(f"{key}={str(value).replace(chr(10), ' ')}" for key, value in fields.items())
        self._socket.settimeout(patience)
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as error:
            _log.warning("the service manager cannot be told", every=60.0, error=error)
            return False
        return True


def _address(name: str) -> str:
    # A leading "@" stands for the abstract namespace.
    return "\0" + name[1:] if name.startswith("@") else name


def _watchdog(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    with contextlib.suppress(ValueError):
        microseconds = int(environ.get("WATCHDOG_USEC", "0"))
        if microseconds > 0:
            return microseconds / _MICROSECONDS / 2
    return None
