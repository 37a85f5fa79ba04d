"""What every test is held to: no process, thread, event loop or ZMQ socket outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq

if TYPE_CHECKING:
    from collections.abc import Iterator

_JOIN_LIMIT = 5.0
"""Seconds that a thread which was told to end may take."""
_ALLOWED_THREADS = ("pydevd", "ThreadPoolExecutor", "tokenizers", "QueueFeederThread", "pytest_timeout")


def pytest_configure() -> None:
    """A suite in the background of a shell may ignore Ctrl-C, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the GPU are there only where a GPU is."""
    if Path("/dev/nvidiactl").exists():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


class _Tracked:
    """The ZMQ sockets and event loops that are made while the tests run."""

    def __init__(self) -> None:
        self.sockets: weakref.WeakSet[zmq.Socket[Any]] = weakref.WeakSet()
        self.loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


@pytest.fixture(scope="session")
def _tracked() -> Iterator[_Tracked]:
    tracked = _Tracked()
    make_socket, make_loop = zmq.Socket.__init__, asyncio.BaseEventLoop.__init__

    def socket_made(self: Any, *args: Any, **kwargs: Any) -> None:
        make_socket(self, *args, **kwargs)
        tracked.sockets.add(self)

    def loop_made(self: Any) -> None:
        make_loop(self)
        tracked.loops.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zmq.Socket, "__init__", socket_made)
        patch.setattr(asyncio.BaseEventLoop, "__init__", loop_made)
        yield tracked


@pytest.fixture(autouse=True)
def _nothing_left_behind(_tracked: _Tracked) -> Iterator[None]:
    children = _children()
    threads = set(threading.enumerate())
    sockets, loops = set(_tracked.sockets), set(_tracked.loops)
    yield
    left = [f"process {pid}: {_command(pid)}" for pid in _children() - children]
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith(_ALLOWED_THREADS):
            continue
        thread.join(_JOIN_LIMIT)
        if thread.is_alive():
            left.append(f"thread {thread.name}")
    left += [f"ZMQ socket {socket}" for socket in set(_tracked.sockets) - sockets if not socket.closed]
    left += [f"event loop {loop}" for loop in set(_tracked.loops) - loops if not loop.is_closed()]
    for loop in set(_tracked.loops) - loops:
        left += [f"task {task}" for task in _tasks(loop)]
    if left:
        pytest.fail("the test left behind: " + "; ".join(left))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A daemon's `main` sets up logging, also where a test calls it."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:  # those of pytest are of other classes
            root.removeHandler(handler)


def _children() -> set[int]:
    """Ids of every live process below this one. From /proc where there is one: this runs twice for every test."""
    if not Path("/proc/self/task").is_dir():
        return {child.pid for child in psutil.Process().children(recursive=True)}
    found: set[int] = set()
    parents = [os.getpid()]
    while parents:
        for listing in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                new = {int(pid) for pid in listing.read_text().split()} - found
                found |= new
                parents += new
    return {pid for pid in found if _alive(pid)}


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return "gone"


def _tasks(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks(loop) if not task.done()]
