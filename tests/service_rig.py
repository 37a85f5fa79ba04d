"""A service manager for tests: it holds the end of `NOTIFY_SOCKET` that systemd would, and does what systemd would.

with Unit("router", ["microserve.router", …], folder) as unit:
    unit.start()
    unit.manager.until("READY")
    unit.restart_when_silent()      # the watchdog's time is over: SIGABRT, and start again
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from tests.cluster import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

LIMIT = 30.0
"""Seconds after which something counts as stuck, on a busy machine."""

Fields = dict[str, str]


class Manager:
    """Keeps what it is told, with the time. Each look goes on where the one before it ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._heard: list[tuple[float, Fields]] = []
        self._at = 0
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="service manager")
        self._thread.start()

    def _read(self) -> None:
        while text := self._socket.recv(4096):
            fields = dict(line.split("=", 1) for line in text.decode().splitlines())
            with self._news:
                self._heard.append((time.monotonic(), fields))
                self._news.notify_all()

    def until(self, *wanted: str, holds: Callable[[Fields], bool] = lambda fields: True) -> Fields:
        """The next datagram that has all of the fields `wanted` and for which `holds`."""
        deadline = time.monotonic() + LIMIT
        while True:
            fields = self._next(deadline)
            if fields is None:
                told = [fields for _, fields in self._heard[-10:]]
                raise AssertionError(f"waited {LIMIT:g} s for {wanted}; lastly told: {told}")
            if all(key in fields for key in wanted) and holds(fields):
                return fields

    def _next(self, deadline: float) -> Fields | None:
        with self._news:
            if not self._news.wait_for(lambda: len(self._heard) > self._at, max(0.0, deadline - time.monotonic())):
                return None
            self._at += 1
            return self._heard[self._at - 1][1]

    def silent(self, key: str, seconds: float) -> bool:
        """Whether a time of `seconds` without `key` comes (True) before the limit does."""
        deadline = time.monotonic() + LIMIT
        with self._news:
            while time.monotonic() < deadline:
                last = max((at for at, fields in self._heard if key in fields), default=0.0)
                left = last + seconds - time.monotonic()
                if left <= 0:
                    return True
                self._news.wait(left)
        return False

    def told(self) -> list[Fields]:
        """Everything so far."""
        with self._news:
            return [fields for _, fields in self._heard]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()


class Unit:
    """One daemon under a manager. `watchdog` in seconds, as `WatchdogSec` has it; None: without."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, *, watchdog: float | None = 2.0) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.manager = Manager(folder / f"{name}.notify")
        self.starts = 0
        self._folder = folder
        self._watchdog = watchdog
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None
        return self._daemon

    def start(self) -> Daemon:
        """A process; does not wait."""
        self.starts += 1
        environ = {"NOTIFY_SOCKET": str(self.manager.path)}
        if self._watchdog is not None:
            environ["WATCHDOG_USEC"] = str(round(self._watchdog * 1e6))
        self._daemon = Daemon(self.name, self.arguments, self._folder / f"{self.name}-{self.starts}.log", environ)
        return self._daemon

    def reload(self) -> None:
        """SIGHUP, and wait until it is over."""
        self.daemon.process.send_signal(signal.SIGHUP)
        self.manager.until("RELOADING", "MONOTONIC_USEC")
        self.manager.until("READY")

    def restart_when_silent(self) -> str:
        """Once there was no sign of life for as long as the watchdog allows: SIGABRT, then a new process.

        Returns what the old one had logged. Fails when the old one goes on to live.
        """
        assert self._watchdog is not None
        assert self.manager.silent("WATCHDOG", self._watchdog), f"{self.name} goes on to live\n{self.daemon.tail()}"
        old = self.daemon
        old.process.send_signal(signal.SIGABRT)
        # As systemd does, for a process that was stopped.
        old.process.send_signal(signal.SIGCONT)
        code = old.wait()
        # Looking at a thread that runs again may fault: either way it has ended, and the log has what was seen before.
        assert code in (-signal.SIGABRT, -signal.SIGSEGV), f"exit code {code}\n{old.tail()}"
        self.start()
        return old.text()

    def lines(self) -> list[str]:
        """What the process that runs now has logged."""
        return self.daemon.text().splitlines()

    def __enter__(self) -> Unit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._daemon is not None:
            if error is not None:
                error.add_note(self._daemon.tail())
            if self._daemon.alive:
                self._daemon.kill()
        self.manager.close()
