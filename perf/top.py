"""CPU time of `microserve top` while it watches a fleet of a hundred busy engines, a pane at a time.

Real processes: a router, one process that announces all of the engines (`perf.announced`; each has a bus of its own and
a load that is another at every heartbeat), and the command in a pseudo-terminal that is read as fast as it writes. This
process holds a request for every engine. The figures are CPU time of the command's process (user and system, all
threads), as a share of one core.

Requests come and go: each lasts up to a minute, so that about four a second end and as many begin.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import itertools
import os
import pty
import random
import struct
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import uvloop

from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import MicroserveError
from perf.announced import name_of
from perf.harness import Benchmark, Sample
from perf.router import Fleet, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_START_LIMIT = 60.0
_TAIL = 1 << 18
_SETTLE = 2.0
"""Seconds between the first look at a pane and the measurement: what is drawn once is not measured."""


@dataclass(frozen=True, slots=True)
class View:
    """A pane in a window of a size. `mark` is on the screen when it shows what it is about."""

    key: str
    title: str
    mark: str
    columns: int
    lines: int

    @property
    def name(self) -> str:
        return f"{self.title}, {self.columns}x{self.lines}"


VIEWS = (
    View("1", "fleet", name_of(0), 80, 24),
    View("1", "fleet", name_of(0), 160, 50),
    View("2", "requests", "request-00", 160, 50),
    View("3", "strategies", "data_parallel@", 160, 50),
    View("4", "cache", "1 2 3 4", 160, 50),
    View("5", "events", "connected", 160, 50),
)


class Terminal:
    """A process in a pseudo-terminal of a size. `written` counts the bytes that it has drawn with."""

    def __init__(self, command: list[str], columns: int, lines: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._began = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True
        )
        os.close(slave)
        self.written = 0
        self._seen = bytearray()
        self._more = asyncio.Event()
        os.set_blocking(self._master, False)
        asyncio.get_running_loop().add_reader(self._master, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            # The other end is closed: the process is gone.
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._master)
        self.written += len(data)
        self._seen += data
        del self._seen[:-_TAIL]
        self._more.set()

    async def shows(self, mark: str, *, after: str = "") -> float:
        """Presses the keys `after`, and returns once `mark` was drawn: seconds since the process began."""
        if after:
            self._seen.clear()
            os.write(self._master, after.encode())
        try:
            async with asyncio.timeout(_START_LIMIT):
                while mark.encode() not in self._seen:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise SystemExit(
                f"{mark!r} was not shown within {_START_LIMIT:g} s: {bytes(self._seen[-2000:])!r}"
            ) from None
        return time.perf_counter() - self._began

    async def end(self) -> None:
        """Presses q. Raises `SystemExit` when the command failed."""
        os.write(self._master, b"q")
        code = await asyncio.to_thread(self.process.wait, 15)
        if code:
            raise SystemExit(f"the command ended with {code}: {bytes(self._seen[-2000:])!r}")

    def close(self) -> None:
        """Whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        asyncio.get_running_loop().remove_reader(self._master)
        os.close(self._master)


def cpu(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds so far, user and system."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


async def shares(seconds: float, *processes: subprocess.Popen[bytes]) -> list[float]:
    """The share of a core that each takes, over so many seconds."""
    before, began = [cpu(each) for each in processes], time.perf_counter()
    await asyncio.sleep(seconds)
    passed = time.perf_counter() - began
    return [(cpu(each) - used) / passed for each, used in zip(processes, before, strict=True)]


async def ask_on(client: AsyncClient, numbers: Iterator[int], draw: random.Random) -> None:
    """One request after the other, of a token a second."""
    while True:
        number = next(numbers)
        prompt = [number, *range(1, 500)]
        name = f"request-{number:06}"
        await client.generate(prompt, max_tokens=draw.randrange(2, 60), ignore_eos=True, request_id=name)


@asynccontextmanager
async def busy(router: str, count: int, fleet: Fleet) -> AsyncIterator[None]:
    """Every engine is there, and there are as many requests at any time."""
    client = AsyncClient(router, connect_timeout=_START_LIMIT)
    numbers, draw = itertools.count(), random.Random(1)
    running: list[asyncio.Task[None]] = []
    try:
        deadline = time.monotonic() + _START_LIMIT
        while True:
            with contextlib.suppress(MicroserveError):
                ready = sum(each.state == "ready" for each in (await client.status()).engines)
                if ready == count:
                    break
            if time.monotonic() > deadline:
                raise SystemExit(f"the engines were not ready within {_START_LIMIT:g} s\n{fleet.logs()}")
            await asyncio.sleep(0.1)
        running += [asyncio.create_task(ask_on(client, numbers, draw)) for _ in range(count)]
        yield
        if any(each.done() for each in running):
            raise SystemExit(f"requests failed: {[each for each in running if each.done()][:3]}\n{fleet.logs()}")
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await client.close()


class Figures:
    """What was measured, a value a turn."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def sample(self, name: str) -> Sample:
        return Sample(tuple(self.values[name]))


async def turn(figures: Figures, args: argparse.Namespace, router: str, daemon: subprocess.Popen[bytes]) -> None:
    """The router by itself, then every view."""
    figures.add("router alone", (await shares(args.seconds, daemon))[0])
    command = [sys.executable, "-P", "-m", "microserve.tools", "top", "--router", router]
    for size in dict.fromkeys((view.columns, view.lines) for view in VIEWS):
        terminal = Terminal([*command, "--interval", str(args.interval)], *size)
        try:
            figures.add("start", await terminal.shows(name_of(0)))
            for view in VIEWS:
                if (view.columns, view.lines) != size:
                    continue
                await terminal.shows(view.mark, after=view.key)
                await asyncio.sleep(_SETTLE)
                before = terminal.written
                ours, routers = await shares(args.seconds, terminal.process, daemon)
                figures.add(view.name, ours)
                figures.add(f"{view.name} router", routers)
                figures.add(f"{view.name} drawn", (terminal.written - before) / args.seconds)
                print(f"    {view.name}: {ours:.1%}", file=sys.stderr, flush=True)
            figures.add("memory", float(psutil.Process(terminal.process.pid).memory_info().rss))
            await terminal.end()
        finally:
            terminal.close()


async def measure(bench: Benchmark, args: argparse.Namespace, fleet: Fleet) -> None:
    """Turns of everything, and the rows."""
    router = f"tcp://127.0.0.1:{free_port()}"
    quiet = ("--log-level", "warning")
    daemon = fleet.start("microserve.router", "--bind", router, "--http-port", str(free_port()), *quiet)
    fleet.start("perf.announced", router, str(args.engines))
    figures = Figures()
    async with busy(router, args.engines, fleet):
        for index in range(args.warmup + args.repeat):
            await turn(figures if index >= args.warmup else Figures(), args, router, daemon)
    pace = f"{args.seconds:g} s, a look each {args.interval:g} s"
    for view in VIEWS:
        drawn = figures.sample(f"{view.name} drawn").median / 1000
        note = f"{pace}; {drawn:.1f} kB/s drawn"
        bench.row(view.name, figures.sample(view.name), unit="% of a core", scale=100, limit="under 10", note=note)
    alone = figures.sample("router alone")
    bench.row("the router, nobody watching", alone, unit="% of a core", scale=100, note=f"{args.engines} heartbeats/s")
    for view in VIEWS[1:3]:
        watched = figures.sample(f"{view.name} router")
        bench.row(f"the router, {view.title} watched", watched, unit="% of a core", scale=100)
    bench.row("from start to the first engine on the screen", figures.sample("start"), unit="s")
    bench.row("memory", figures.sample("memory"), unit="MB", scale=1e-6, note="resident, after the last pane")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", type=int, default=100, help="engines that are announced (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, help="the command's --interval (default: %(default)s)")
    bench = Benchmark("top", "share of a core that `microserve top` takes, watching 100 engines")
    args = bench.arguments(parser, repeat=3, warmup=0)
    with tempfile.TemporaryDirectory(prefix="microserve-perf-") as folder:
        fleet = Fleet(Path(folder))
        try:
            uvloop.run(measure(bench, args, fleet))
        finally:
            fleet.end()
    bench.finish(args)


if __name__ == "__main__":
    main()
