"""Children that are kept running: back-off, restarts, refusals, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Protocol

import pytest

from microserve.tools.signs import Signs
from microserve.tools.supervisor import Backoff, Child, ChildSpec, ChildState, describe_exit

if TYPE_CHECKING:
    from pathlib import Path

WAITS = """
import signal, sys, time
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not meet an interpreter that is on its way out
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up", *sys.argv[1:], flush=True)
while True: signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True: signal.pause()
"""


class Make(Protocol):
    """Makes a child that runs the given code, and the queue of the lines that it told."""

    def __call__(
        self, code: str, *arguments: str, first: float = 0.01, watchdog: float | None = None
    ) -> tuple[Child, asyncio.Queue[str]]: ...


@pytest.fixture
def make(tmp_path: Path) -> Make:

    def make(
        code: str, *arguments: str, first: float = 0.01, watchdog: float | None = None
    ) -> tuple[Child, asyncio.Queue[str]]:
        (tmp_path / "program.py").write_text(code)
        lines: asyncio.Queue[str] = asyncio.Queue()
        environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "src")])}
        spec = ChildSpec("c", "program", arguments, environ, watchdog)
        return Child(spec, told=lambda _, line: lines.put_nowait(line), backoff=Backoff(first)), lines

    return make


def test_backoff_doubles_and_starts_over_after_a_long_run() -> None:
    backoff = Backoff(first=0.5, most=3.0, settled=10.0)
    assert [backoff.after(1.0) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.after(10.0) == 0.5
    assert backoff.after(0.0) == 1.0


def test_exits_in_words() -> None:
    assert describe_exit(0) == "exit code 0"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-99) == "killed by signal 99"


def test_lines_are_told_and_stopping_is_orderly(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make(WAITS, "--x", "1")
        states = [child.state]
        task = asyncio.create_task(child.run())
        assert await lines.get() == "up --x 1"
        assert child.pid is not None
        states.append(child.state)
        child.stop()
        states.append(child.state)
        child.stop()
        assert await task == 0
        states.append(child.state)
        assert states == [ChildState.WAITING, ChildState.RUNNING, ChildState.STOPPING, ChildState.ENDED]
        assert list(child.lines) == ["up --x 1"]

    asyncio.run(scenario())


def test_a_signal_to_a_child_that_has_just_ended_leaves_its_exit_code(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled = threading.Event()
    waitpid = os.waitpid

    def late(pid: int, options: int) -> tuple[int, int]:
        """Of the thread that waits for the child: it is not told of the end before the child is signalled."""
        if threading.current_thread() is not threading.main_thread():
            signalled.wait()
        return waitpid(pid, options)

    monkeypatch.setattr(os, "waitpid", late)

    async def scenario() -> None:
        child, lines = make("print('up', flush=True); raise SystemExit(7)")
        task = asyncio.create_task(child.run())
        await lines.get()
        assert child.pid is not None
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - the loop is to hear nothing of it
        child.stop()
        signalled.set()
        assert await task == 7

    asyncio.run(scenario())


def test_a_killed_child_is_started_again(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make(WAITS)
        task = asyncio.create_task(child.run())
        for restarts in range(3):
            assert await lines.get() == "up"
            assert child.restarts == restarts
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            assert (await lines.get()).startswith("ended (killed by SIGKILL); starting again in ")
        assert await lines.get() == "up"
        child.stop()
        assert await task == 0

    asyncio.run(scenario())


def test_stopping_ends_the_pause_before_a_restart(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make("import sys; sys.exit(1)", first=1000.0)
        task = asyncio.create_task(child.run())
        assert await lines.get() == "ended (exit code 1); starting again in 1000 s"
        assert child.state is ChildState.WAITING
        child.stop()
        assert await task == 1

    asyncio.run(scenario())


def test_a_refused_configuration_is_not_tried_again(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make("import sys; print('page_size: 0 is wrong', file=sys.stderr); sys.exit(2)")
        assert await child.run() == 2
        assert list(child.lines) == ["page_size: 0 is wrong"]
        assert lines.qsize() == 1

    asyncio.run(scenario())


def test_a_stubborn_child_can_be_killed(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make(STUBBORN)
        task = asyncio.create_task(child.run())
        await lines.get()
        child.stop()
        child.kill()
        assert await task == -signal.SIGKILL

    asyncio.run(scenario())


def test_a_cancelled_supervisor_takes_its_child_along(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make(STUBBORN)
        task = asyncio.create_task(child.run())
        await lines.get()
        pid = child.pid
        assert pid is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(scenario())


SERVES_FOR_A_WHILE = """
import faulthandler, os, socket, sys, time
faulthandler.enable()
here = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
there = "\\0" + os.environ["NOTIFY_SOCKET"][1:]
assert "WATCHDOG_PID" not in os.environ
said = sys.argv[1].split(",")
print(os.environ["WATCHDOG_USEC"], flush=True)
for line in said:
    here.sendto(line.encode(), there)
while True:
    here.sendto(b"STATUS=hangs", there)  # no sign of life
    time.sleep(0.05)
"""


def test_a_child_that_serves_and_gives_no_sign_of_life_is_ended_and_says_where_it_stood(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "1")

    async def scenario() -> None:
        child, lines = make(SERVES_FOR_A_WHILE, "STATUS=loading,READY=1,WATCHDOG=1", watchdog=0.2)
        task = asyncio.create_task(child.run())
        told = [await lines.get()]
        while "starting again" not in told[-1]:
            told.append(await lines.get())
        assert told[:2] == ["200000", "no sign of life for 0.2 s: ended; where it stood follows"]
        assert any("program.py" in line for line in told)
        assert told[-1].startswith("ended (killed by SIGABRT)")
        child.kill()
        await task

    asyncio.run(scenario())


def test_a_child_that_does_not_even_end_for_that_is_killed(make: Make) -> None:
    async def scenario() -> None:
        deaf = "import signal; signal.signal(signal.SIGABRT, signal.SIG_IGN)\nsaid = "
        child, lines = make(SERVES_FOR_A_WHILE.replace("said = ", deaf), "READY=1", watchdog=0.1)
        child._patience = 0.1
        task = asyncio.create_task(child.run())
        told = [await lines.get()]
        while "starting again" not in told[-1]:
            told.append(await lines.get())
        assert told[-1].startswith("ended (killed by SIGKILL)")
        child.kill()
        await task

    asyncio.run(scenario())


@pytest.mark.parametrize("said", [[], ["STATUS=loading"], ["READY=1", "WATCHDOG=1", "STOPPING=1"]], ids="/".join)
def test_who_does_not_serve_yet_or_stops_is_not_watched(said: list[str]) -> None:
    async def scenario() -> None:
        silent: list[str] = []
        with Signs(60.0, lambda: silent.append("silent")) as signs:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.connect("\0" + signs.environ["NOTIFY_SOCKET"][1:])
                for line in said:
                    sender.send(line.encode())
            for _ in range(2):
                signs._over()
            assert (silent, signs._timer) == ([], None)

    asyncio.run(scenario())


def test_signs_that_came_while_we_stood_still_count() -> None:
    async def scenario() -> None:
        silent: list[str] = []
        with Signs(60.0, lambda: silent.append("silent")) as signs:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.connect("\0" + signs.environ["NOTIFY_SOCKET"][1:])
                sender.send(b"READY=1")
            # Its time is over, says the loop, before it has looked at the socket.
            signs._over()
            assert silent == []
            signs._over()
            assert silent == ["silent"]

    asyncio.run(scenario())


def test_a_line_without_an_end_does_not_stop_the_reading(make: Make) -> None:
    async def scenario() -> None:
        child, lines = make("import sys\nprint('x' * 3_000_000)\nprint('after', flush=True)\nsys.exit(2)")
        await child.run()
        assert child.lines[-1] == "after"
        assert lines.qsize() >= 1

    asyncio.run(scenario())
