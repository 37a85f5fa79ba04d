"""What a service manager hears, on a real datagram socket, from real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.virtual_time import run_virtual

from microserve.runtime.service import Lifecycle
from microserve.runtime.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = """
import asyncio, sys, time
from microserve.runtime.errors import ConfigError
from microserve.runtime.service import run_service
async def main(lifecycle):
{body}
sys.exit(run_service(main, name="service"))
"""


class Manager:
    """The end of `NOTIFY_SOCKET` that systemd would hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(20)

    def heard(self) -> dict[str, str]:
        """The next datagram. Raises `TimeoutError` when none comes."""
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def until(self, key: str) -> dict[str, str]:
        """The next datagram that has `key`."""
        while key not in (fields := self.heard()):
            pass
        return fields

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing more is heard for so long."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(20)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@contextmanager
def service(manager: Manager, *body: str, watchdog: float | None = None) -> Iterator[subprocess.Popen[str]]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environ["NOTIFY_SOCKET"] = str(manager.path)
    if watchdog is not None:
        environ["WATCHDOG_USEC"] = str(round(watchdog * 1e6))
    code = PROGRAM.format(body="\n".join("    " + line for line in body))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_ready_comes_when_the_service_says_so_and_stopping_with_the_drain(manager: Manager) -> None:
    with service(manager, "lifecycle.ready(lambda: '3 running')", "await lifecycle.draining.wait()") as process:
        assert manager.heard() == {"READY": "1", "STATUS": "3 running"}
        process.send_signal(signal.SIGTERM)
        assert manager.until("STOPPING") == {"STOPPING": "1", "STATUS": "draining"}
        assert process.wait(20) == 0


def test_the_watchdog_is_fed_at_half_its_interval(manager: Manager) -> None:
    with service(manager, "await lifecycle.draining.wait()", watchdog=0.2):
        assert [manager.heard() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3


def test_a_loop_that_hangs_feeds_no_watchdog(manager: Manager) -> None:
    with service(manager, "await asyncio.sleep(0)", "lifecycle.ready()", "time.sleep(600)", watchdog=0.1):
        manager.until("READY")
        assert manager.silent_for(0.5)


def test_what_is_not_healthy_feeds_no_watchdog(manager: Manager) -> None:
    body = ("lifecycle.healthy = lambda: False", "lifecycle.ready()", "await lifecycle.draining.wait()")
    with service(manager, *body, watchdog=0.1):
        manager.until("READY")
        assert manager.silent_for(0.5)


def test_sighup_reloads_and_says_ready_again(manager: Manager) -> None:
    body = ("lifecycle.reload = lambda: print('reloaded', flush=True)", "lifecycle.ready(lambda: 'fine')")
    with service(manager, *body, "await lifecycle.draining.wait()") as process:
        manager.until("READY")
        process.send_signal(signal.SIGHUP)
        assert manager.until("RELOADING")["MONOTONIC_USEC"].isdigit()
        assert manager.until("READY") == {"READY": "1", "STATUS": "fine"}
        assert process.stdout is not None
        assert process.stdout.readline() == "reloaded\n"


def test_a_configuration_that_is_wrong_changes_nothing(manager: Manager) -> None:
    body = (
        "def reload():",
        "    raise ConfigError('page_size: wrong')",
        "from microserve.runtime.log import setup_logging",
        "setup_logging('info', False, 'test')",
        "lifecycle.reload = reload",
        "lifecycle.ready()",
        "await lifecycle.draining.wait()",
    )
    with service(manager, *body) as process:
        manager.until("READY")
        process.send_signal(signal.SIGHUP)
        manager.until("READY")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "the configuration was not reloaded; the old one stays" in err
        assert "page_size: wrong" in err


def test_without_a_manager_nothing_is_sent() -> None:
    notifier = Notifier({})
    notifier.ready("fine")
    notifier.alive()
    assert not notifier.active
    assert notifier.watchdog_interval is None


def test_a_status_that_is_shown_already_is_not_sent_again_and_stays_one_line(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(manager.path)})
    notifier.status("two\nlines")
    notifier.status("two\nlines")
    notifier.extend_start(90, "compiling kernels")
    notifier.close()
    assert manager.heard() == {"STATUS": "two lines"}
    assert manager.heard() == {"EXTEND_TIMEOUT_USEC": "90000000", "STATUS": "compiling kernels"}


def test_a_manager_that_is_gone_does_not_disturb_the_service(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    notifier.alive()
    notifier.close()


def test_a_manager_that_does_not_read_is_not_waited_for(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(manager.path)})
    sent = 0
    while notifier.alive():
        sent += 1
    assert [manager.heard() for _ in range(sent)] == [{"WATCHDOG": "1"}] * sent
    assert notifier.alive()
    notifier.close()


class Busy(Notifier):
    """A manager whose queue is full now and then; when it was told, and when not."""

    def __init__(self, *answers: bool) -> None:
        super().__init__({})
        self.watchdog_interval = 30.0
        self.signs: list[tuple[float, bool]] = []
        self._answers = list(answers)

    def alive(self) -> bool:
        self.signs.append((asyncio.get_running_loop().time() - 1000.0, self._answers.pop(0)))
        return self.signs[-1][1]


def test_a_sign_of_life_that_could_not_be_sent_is_sent_again_soon() -> None:
    notifier = Busy(True, False, False, True, True)

    async def main() -> None:
        lifecycle = Lifecycle(notifier)
        lifecycle.start_watchdog()
        await asyncio.sleep(63)
        await lifecycle.close()

    run_virtual(main())
    assert notifier.signs == [(0.0, True), (30.0, False), (31.0, False), (32.0, True), (62.0, True)]


def test_a_bug_in_a_look_is_told_and_is_not_the_end_of_looking(caplog: pytest.LogCaptureFixture) -> None:
    notifier, looks = Busy(True), iter([0, 1])

    def healthy() -> bool:
        return bool(1 // next(looks))

    async def main() -> None:
        lifecycle = Lifecycle(notifier)
        lifecycle.healthy = healthy
        lifecycle.start_watchdog()
        await asyncio.sleep(5)
        await lifecycle.close()

    run_virtual(main())
    assert notifier.signs == [(1.0, True)]
    assert [record.message for record in caplog.records] == ["whether this service is healthy cannot be said: a bug"]


def test_a_status_that_cannot_be_made_once_is_told_and_made_again(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    looks = iter([1, 0, 2])

    async def main() -> None:
        lifecycle = Lifecycle(Notifier({"NOTIFY_SOCKET": str(manager.path)}))
        lifecycle.ready(lambda: str(2 // next(looks)))
        await asyncio.sleep(3)
        await lifecycle.close()
        lifecycle.notifier.close()

    run_virtual(main())
    assert manager.heard() == {"READY": "1", "STATUS": "2"}
    assert manager.heard() == {"STATUS": "1"}
    assert [record.message for record in caplog.records] == ["the status cannot be told: a bug"]


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "4000000"}, 2.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval(environ: dict[str, str], interval: float | None, manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(manager.path), **environ})
    assert notifier.watchdog_interval == interval
    notifier.close()
