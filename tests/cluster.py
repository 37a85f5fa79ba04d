"""A real router and real engines, as processes on free ports, for tests: started, waited for, killed, drained, checked.

    with Cluster(engines=2) as cluster:
        cluster.http          # "http://127.0.0.1:41233"
        cluster.router        # "tcp://127.0.0.1:41234"
        cluster.engines[0].kill()

Leaving the block drains everything and fails when a process ended in a way that nobody asked for, or does not end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.client import Client
from microserve.runtime.errors import MicroserveError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from microserve.runtime.messages import StatusReply

START_LIMIT = 60.0
"""Seconds that a process may take to become ready, on a busy machine."""
STOP_LIMIT = 20.0
_LOOK_EVERY = 0.05

FAKE = (
    *("--executor", "fake", "--fake-decode-base-us", "1000", "--fake-prefill-us-per-token", "1"),
    # No checkpoint has this name, so there is no tokenizer either: token ids in, token ids out.
    *("--model", "tokens-only"),
)
"""Engines that need nothing and are quick."""


class ClusterError(AssertionError):
    """The cluster did not do what the test needs; the message ends with the processes' last lines."""


class Daemon:
    """One process: its log in a file, its end accounted for."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.expected: int | None = 0
        """The exit code that the end of the cluster asks for; None: any."""
        # Unbuffered append: the last words of a killed process are there.
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=daemon_environ() | dict(environ or {}),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.expected = -signal.SIGKILL
        self.process.kill()
        self.process.wait(STOP_LIMIT)

    def pause(self) -> None:
        """SIGSTOP: alive, and silent."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: drain and end. Does not wait."""
        self.process.terminate()

    def wait(self, limit: float = STOP_LIMIT) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{self.name} did not end within {limit:g} s\n{self.tail()}") from None

    def text(self) -> str:
        """Everything that it printed."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 30) -> str:
        last = "\n".join(f"    {line}" for line in self.text().splitlines()[-lines:])
        return f"--- {self.name} (pid {self.process.pid}, exit code {self.process.poll()}):\n{last}"


class Cluster:
    """A context manager; see the module. `engine_args` go to every engine, `router_args` to the router.

    `digests`: the engines answer `page_digests`; `page_kib` is the size of a fake page then (see `tests.engine_child`).
    `environ` goes to every process.
    """

    def __init__(
        self,
        engines: int = 1,
        *,
        engine_args: Sequence[str] = FAKE,
        router_args: Sequence[str] = (),
        start_router: bool = True,
        digests: bool = False,
        page_kib: int = 0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._wanted = engines
        self._digests = digests
        self._page_kib = page_kib
        self._environ = dict(environ or {})
        self._engine_args = tuple(engine_args)
        self._router_args = tuple(router_args)
        self._start_router = start_router
        self._folder = tempfile.TemporaryDirectory(prefix="microserve-test-")
        self._clients: list[Client] = []
        # Ports are chosen here so that a restarted router comes back where the engines look for it.
        bus_port, http_port = free_ports(2)
        self.router = f"tcp://127.0.0.1:{bus_port}"
        self.http = f"http://127.0.0.1:{http_port}"
        self._http_port = http_port
        self.daemons: list[Daemon] = []
        self.router_daemon: Daemon | None = None
        self.engines: list[Daemon] = []

    def __enter__(self) -> Cluster:
        try:
            if self._start_router:
                self.start_router()
            for _ in range(self._wanted):
                self.add_engine(wait=False)
            if self._start_router:
                self.wait_ready(self._wanted)
        except BaseException:
            self._end_now()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            if error is not None:
                error.add_note("\n".join(daemon.tail() for daemon in self.daemons))
            self._end_now()

    # --- processes ---

    def start_router(self) -> Daemon:
        """Start the router, or start it again; does not wait."""
        arguments = [
            "microserve.router",
            "--router-id",
            "r",
            "--bind",
            self.router,
            "--http-port",
            str(self._http_port),
        ]
        self.router_daemon = self._start("router", [*arguments, *self._router_args])
        return self.router_daemon

    def add_engine(self, name: str | None = None, *args: str, wait: bool = True) -> Daemon:
        """Start one more engine, or one under the name of an engine that is gone."""
        name = name if name is not None else f"e{len(self.engines)}"
        module = ["microserve.engine"]
        if self._digests:
            self.control(name).unlink(missing_ok=True)
            module = ["tests.engine_child", "--control", str(self.control(name)), "--page-kib", str(self._page_kib)]
        arguments = [*module, "--engine-id", name, "--routers", self.router, *self._engine_args, *args]
        daemon = self._start(name, arguments)
        self.engines.append(daemon)
        if wait:
            self.wait_for(lambda status: state_of(status, name) == "ready", f"engine {name} to be ready")
        return daemon

    def control(self, name: str) -> Path:
        """The socket of an engine that answers `page_digests`."""
        return Path(self._folder.name) / f"{name}.sock"

    def page_digests(self, name: str, **question: Sequence[int]) -> list[str]:
        """A digest of each page that an engine holds of `prompt=…`, of the `pages=…` of its pool, or of those that it
        has `pushed=()` since that was last asked."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.control(name)))
            asked = {key: [int(each) for each in ids] for key, ids in question.items()}
            connection.sendall(json.dumps(asked).encode() + b"\n")
            with connection.makefile() as answers:
                found: list[str] = json.loads(answers.readline())
        return found

    def _start(self, name: str, arguments: Sequence[str]) -> Daemon:
        log = Path(self._folder.name) / f"{len(self.daemons)}-{name}.log"
        daemon = Daemon(name, arguments, log, self._environ)
        self.daemons.append(daemon)
        return daemon

    # --- waiting ---

    def client(self) -> Client:
        """A client of the router; closed with the cluster."""
        client = Client(self.router, connect_timeout=START_LIMIT)
        self._clients.append(client)
        return client

    def status(self) -> StatusReply:
        if not self._clients:
            self.client()
        return self._clients[0].status()

    def endpoints(self) -> dict[str, str]:
        """Where the engines' verbs are, by name."""
        return {engine.info.engine_id: engine.info.endpoint for engine in self.status().engines}

    def wait_ready(self, engines: int) -> StatusReply:
        """Wait until the router answers and sees so many engines ready."""
        return self.wait_for(
            lambda status: sum(engine.state == "ready" for engine in status.engines) >= engines,
            f"{engines} engines to be ready",
        )

    def wait_for(self, holds: Callable[[StatusReply], bool], what: str, limit: float = START_LIMIT) -> StatusReply:
        """Look at the router's status until `holds`. Fails at once when a process ends unasked."""
        deadline = time.monotonic() + limit
        while True:
            try:
                status = self.status()
                if holds(status):
                    return status
            except MicroserveError:
                # Starting, or being restarted by the test.
                status = None
            self._check_alive()
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {limit:g} s for {what}; the router says {status}\n{self._tails()}")
            time.sleep(_LOOK_EVERY)

    def _check_alive(self) -> None:
        for daemon in self.daemons:
            code = daemon.process.poll()
            if code is not None and daemon.expected not in (None, code):
                raise ClusterError(f"{daemon.name} ended with exit code {code}\n{daemon.tail()}")

    # --- ending ---

    def stop(self) -> None:
        """Drain the router, then the engines, and check how every process ended."""
        self._close_clients()
        routers = [daemon for daemon in self.daemons if daemon not in self.engines]
        for group in (routers, self.engines):
            for daemon in group:
                if daemon.alive:
                    daemon.terminate()
            for daemon in group:
                code = daemon.wait()
                if daemon.expected not in (None, code):
                    raise ClusterError(f"{daemon.name} ended with exit code {code}\n{daemon.tail()}")

    def _close_clients(self) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            client.close()

    def _end_now(self) -> None:
        self._close_clients()
        for daemon in self.daemons:
            if daemon.alive:
                daemon.process.kill()
                daemon.process.wait(STOP_LIMIT)
        self._folder.cleanup()

    def _tails(self) -> str:
        return "\n".join(daemon.tail() for daemon in self.daemons)


def state_of(status: StatusReply, name: str) -> str | None:
    """The state of an engine as the router sees it; None where it sees none."""
    return next((engine.state for engine in status.engines if engine.info.engine_id == name), None)


def free_ports(count: int) -> list[int]:
    """Ports that are free, and that nobody is given by chance.

    Below those that the system hands out, each once, and other ones in every process of a parallel run: what is free
    now is free when a daemon that was ended asks for it again.
    """
    found: list[int] = []
    while len(found) < count:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_PORTS = (12000 + 2000 * _WORKER + number % 2000 for number in itertools.count(os.getpid() * 17))


def daemon_environ() -> dict[str, str]:
    """The environment of a process under test: ours, without the user's settings, and able to import what we can."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MICROSERVE_")}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environ["PYTHONUNBUFFERED"] = "1"
    return environ
