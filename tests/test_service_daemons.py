"""The real daemons under a service manager: readiness, watchdogs, drains, reloads, and loops that hang."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.cluster import FAKE, free_ports, state_of
from tests.service_rig import LIMIT, Unit

from microserve.runtime.client import Client
from microserve.runtime.errors import DeadlineExceeded, MicroserveError, PeerLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from microserve.runtime.messages import StatusReply

BLOCKS_ONCE = """
import os, time
from microserve.router.strategy import Chunk, strategy

@strategy
async def blocks_once(request, fleet, *, marker: str = ""):
    if os.path.exists(marker):
        os.unlink(marker)
        time.sleep(3600)
    async for chunk in fleet.pick().start_generate():
        yield chunk
"""

REFUSES_TO_END = """
import asyncio
from microserve.router.strategy import Chunk, strategy

@strategy
async def refuses_to_end(request, fleet):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
    yield Chunk()
"""


def get(port: int, path: str) -> tuple[int, object]:
    """Status and JSON of a page of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


class Fleet:
    """A router and engines under managers, on ports of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        bus, http_port = free_ports(2)
        self.bus = f"tcp://127.0.0.1:{bus}"
        self.http = f"http://127.0.0.1:{http_port}"
        self._http_port = http_port
        self._clients: list[Client] = []

    def router(self, *arguments: str) -> Unit:
        given = ["--router-id", "r", "--bind", self.bus, "--http-port", str(self._http_port)]
        return self._unit("router", ["microserve.router", *given, *arguments])

    def engine(self, *arguments: str, module: Sequence[str] = ("microserve.engine",)) -> Unit:
        given = ["--engine-id", "e", "--routers", self.bus, *FAKE]
        return self._unit("engine", [*module, *given, *arguments])

    def _unit(self, name: str, arguments: list[str]) -> Unit:
        unit = self._stack.enter_context(Unit(name, arguments, self.folder))
        unit.start()
        return unit

    def client(self) -> Client:
        """A new connection: the one before may have ended with its router."""
        return self._stack.enter_context(Client(self.bus, connect_timeout=LIMIT))

    def complete(self, tokens: int = 3) -> int:
        """One request over a session of its own; how many tokens came."""
        with Client(self.bus, connect_timeout=LIMIT) as client:
            return len(client.generate([5, 6, 7], max_tokens=tokens, ignore_eos=True).token_ids)

    def until(self, holds: Callable[[StatusReply], bool], client: Client) -> StatusReply:
        """The router's status, once `holds`."""
        ended = threading.Event()
        timer = threading.Timer(LIMIT, ended.set)
        timer.start()
        try:
            while not ended.wait(0.02):
                status = client.status()
                if holds(status):
                    return status
        finally:
            timer.cancel()
            timer.join()
        raise AssertionError(f"waited {LIMIT:g} s; the router says {client.status()}")

    def until_ready(self) -> Client:
        client = self.client()
        self.until(lambda status: state_of(status, "e") == "ready", client)
        return client


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


@contextmanager
def running(work: Callable[[], object]) -> Iterator[list[object]]:
    """`work` in a thread; its result, or the error that it raised, when the block ends."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except MicroserveError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(LIMIT)
        assert not thread.is_alive()


# --- start -----------------------------------------------------------------------------------------------------------


def test_a_router_that_says_ready_serves(fleet: Fleet) -> None:
    router = fleet.router()
    assert router.manager.until("READY")["STATUS"] == "0 of 0 engines ready: 0 requests running, 0 queued, " + (
        fleet.client().status().strategy
    )
    with urllib.request.urlopen(f"{fleet.http}/health", timeout=LIMIT) as response:
        assert response.status == 200


def test_an_engine_says_what_it_loads_asks_for_time_and_is_ready_when_it_serves(fleet: Fleet) -> None:
    pipe = fleet.folder / "pipe"
    os.mkfifo(pipe)
    port, http_port = free_ports(2)
    engine = fleet.engine(
        *("--bind", f"tcp://127.0.0.1:{port}", "--metrics-port", str(http_port)),
        module=("tests.slow_engine_child", str(pipe)),
    )
    asked = engine.manager.until("EXTEND_TIMEOUT_USEC")
    assert asked == {"EXTEND_TIMEOUT_USEC": "30000000", "STATUS": "loading weights: 20%"}
    engine.manager.until("EXTEND_TIMEOUT_USEC"), engine.manager.until("WATCHDOG")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert get(http_port, "/health") == (200, {"status": "ok"})
    why = "the engine is starting: loading weights: 20%"
    assert get(http_port, "/ready") == (503, {"ready": False, "reasons": [why]})
    assert get(http_port, "/metrics") == (503, {"error": why})
    pipe.write_bytes(b"loaded")
    compiling = engine.manager.until("EXTEND_TIMEOUT_USEC", holds=lambda told: "compiling" in told["STATUS"])
    assert re.fullmatch(r"compiling kernels: \d+ so far", compiling["STATUS"])
    assert not any("READY" in told for told in engine.manager.told())
    pipe.write_bytes(b"compiled")
    assert engine.manager.until("READY")["STATUS"] == "ready: 0 running, 0 waiting, 0 of 8192 pages in use"
    assert get(http_port, "/ready") == (200, {"ready": True, "reasons": []})
    socket.create_connection(("127.0.0.1", port)).close()


def test_sighup_while_an_engine_loads_is_done_once_it_is_ready(fleet: Fleet) -> None:
    pipe = fleet.folder / "pipe"
    os.mkfifo(pipe)
    engine = fleet.engine(module=("tests.slow_engine_child", str(pipe)))
    engine.manager.until("EXTEND_TIMEOUT_USEC")
    engine.daemon.process.send_signal(signal.SIGHUP)
    pipe.write_bytes(b"loaded")
    engine.manager.until("EXTEND_TIMEOUT_USEC", holds=lambda told: "compiling" in told["STATUS"])
    pipe.write_bytes(b"compiled")
    engine.manager.until("READY")
    engine.manager.until("RELOADING")
    engine.manager.until("READY")


# --- life ------------------------------------------------------------------------------------------------------------


STOPPING = {"STOPPING": "1", "STATUS": "draining", "EXTEND_TIMEOUT_USEC": "45000000"}


def test_a_router_shows_its_load_and_its_drain_finishes_what_runs_and_what_is_queued(fleet: Fleet) -> None:
    router = fleet.router("--max-active", "1")
    fleet.engine("--fake-decode-base-us", "20000")
    with fleet.until_ready():
        with running(lambda: fleet.complete(150)) as first, running(lambda: fleet.complete(150)) as second:
            shown = router.manager.until("STATUS", holds=lambda told: "1 queued" in told["STATUS"])
            assert shown["STATUS"].startswith("1 of 1 engines ready: 1 requests running, 1 queued, ")
            router.manager.until("WATCHDOG"), router.manager.until("WATCHDOG")
            router.daemon.terminate()
            assert router.manager.until("STOPPING") == STOPPING
        assert (*first, *second) == (150, 150)
        assert router.daemon.wait() == 0


def test_an_engine_shows_its_load_and_its_drain_finishes_what_runs(fleet: Fleet) -> None:
    fleet.router()
    engine = fleet.engine("--fake-decode-base-us", "20000")
    with fleet.until_ready():
        with running(lambda: fleet.complete(200)) as request:
            engine.manager.until("STATUS", holds=lambda told: told["STATUS"].startswith("ready: 1 running, 0 waiting"))
            engine.manager.until("WATCHDOG")
            engine.daemon.terminate()
            assert engine.manager.until("STOPPING") == STOPPING
        assert request == [200]
        assert engine.daemon.wait() == 0


# --- reloads ---------------------------------------------------------------------------------------------------------


def changes(unit: Unit) -> set[tuple[str, str]]:
    """(setting, "applied" or "not applied") of the lines about reloads."""
    return {
        (found[2], found[1])
        for line in unit.lines()
        if (found := re.search(r"setting changed: (applied|not applied)  setting=(\S+)", line))
    }


def test_sighup_changes_what_can_change_in_an_engine_and_says_what_cannot(fleet: Fleet) -> None:
    file = fleet.folder / "engine.toml"
    file.write_text('labels = { pool = "a" }\n')
    fleet.router()
    engine = fleet.engine("--config", str(file), "--drain-timeout", "7")
    with fleet.until_ready() as client:
        assert client.status().engines[0].info.labels == {"pool": "a"}
        file.write_text(
            'labels = { pool = "b" }\nkv_wait = 1.5\nlease_term = 9.0\npage_size = 32\nlog_level = "debug"\n'
            "drain_timeout = 99.0\n"
        )
        engine.reload()
        assert changes(engine) == {
            ("labels", "applied"),
            ("kv_wait", "applied"),
            ("lease_term", "applied"),
            ("log_level", "applied"),
            ("page_size", "not applied"),
        }, "the flag stands above the file, so drain_timeout is as it was"
        fleet.until(lambda status: status.engines[0].info.labels == {"pool": "b"}, client)
        assert client.status().engines[0].load.state == "ready"
        assert any('hint="it needs a restart"' in line for line in engine.lines())
        file.write_text("pages = 3\n")
        engine.reload()
        assert any("the configuration was not reloaded; the old one stays" in line for line in engine.lines())
        assert any("unknown setting" in line for line in engine.lines())
        assert fleet.complete() == 3
    engine.daemon.terminate()
    assert engine.daemon.wait() == 0


def test_sighup_changes_what_can_change_in_a_router_and_says_what_cannot(fleet: Fleet) -> None:
    file, strategies = fleet.folder / "router.toml", fleet.folder / "strategies"
    file.write_text("max_active = 1\n")
    router = fleet.router("--config", str(file))
    fleet.engine("--fake-decode-base-us", "20000")
    with fleet.until_ready() as client:
        with running(lambda: fleet.complete(150)), running(lambda: fleet.complete(150)):
            fleet.until(lambda status: (status.active_requests, status.queued_requests) == (1, 1), client)
            strategies.mkdir()
            counted = f"open({str(fleet.folder / 'runs')!r}, 'a').write('x')\n"
            (strategies / "mine.py").write_text(BLOCKS_ONCE + counted)
            file.write_text(
                f'max_active = 5\nstrategy_folder = "{strategies}"\nstrategy = "balanced"\nmax_body_bytes = 2048\n'
                "engine_silence = 9.0\nlog_json = true\n"
            )
            router.reload()
            status = client.status()
            assert (status.active_requests, status.queued_requests) == (2, 0), "there is room now"
        assert changes(router) == {
            ("max_active", "applied"),
            ("strategy_folder", "applied"),
            ("engine_silence", "applied"),
            ("log_json", "applied"),
            ("max_body_bytes", "not applied"),
            ("strategy", "not applied"),
        }
        assert any('hint="it takes a restart, or now: microserve strategy set"' in line for line in router.lines())
        assert "blocks_once" in {each.name for each in client.strategies().strategies}
        router.reload()
        client.strategies()  # which waits for what is being read
        assert (fleet.folder / "runs").read_text() == "xx", "once in a process of its own, once here, and not again"
        file.write_text("max_active = [\n")
        router.reload()
        file.write_text('strategy_folder = "/nowhere"\n')
        router.reload()
        errors = [json.loads(line) for line in router.lines() if '"error"' in line and line.startswith("{")]
        assert [entry["event"] for entry in errors] == ["the configuration was not reloaded; the old one stays"] * 2
        assert "is not valid TOML" in errors[0]["error"]
        assert "/nowhere is not a folder" in errors[1]["error"]
        assert errors[0]["process"] == "router:r"
        assert re.fullmatch(r"[0-9a-f]+", errors[0]["epoch"])
        assert fleet.complete() == 3


def test_a_strategy_that_refuses_to_end_does_not_keep_its_router(fleet: Fleet) -> None:
    strategies = fleet.folder / "strategies"
    strategies.mkdir()
    (strategies / "mine.py").write_text(REFUSES_TO_END)
    router = fleet.router("--strategy-folder", str(strategies), "--strategy", "refuses_to_end")
    fleet.engine()
    with fleet.until_ready() as client, pytest.raises(DeadlineExceeded):
        client.generate([5, 6, 7], max_tokens=1, timeout=0.2)
    router.daemon.terminate()
    assert router.daemon.wait() == 0
    assert "tasks that refuse to end are left behind" in router.lines()[-1]


# --- what hangs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["router", "engine"])
def test_a_process_that_stands_still_is_restarted_and_the_fleet_recovers(fleet: Fleet, which: str) -> None:
    units = {"router": fleet.router(), "engine": fleet.engine()}
    with fleet.until_ready():
        fleet.complete()
    units[which].manager.until("WATCHDOG")
    units[which].daemon.pause()
    units[which].restart_when_silent()
    units[which].manager.until("READY")
    with fleet.until_ready():
        assert fleet.complete() == 3
    assert [unit.starts for unit in units.values()] == [1 + (name == which) for name in units]


def test_a_strategy_that_blocks_the_routers_loop_is_ended_by_the_watchdog(fleet: Fleet) -> None:
    marker, strategies = fleet.folder / "marker", fleet.folder / "strategies"
    marker.touch()
    strategies.mkdir()
    (strategies / "mine.py").write_text(BLOCKS_ONCE)
    settings = ["--strategy-folder", str(strategies), "--strategy", "blocks_once"]
    router = fleet.router(*settings, "--strategy-settings", f"marker={marker}")
    fleet.engine()
    with fleet.until_ready():
        router.manager.until("WATCHDOG")
        with running(fleet.complete) as answers:
            log = router.restart_when_silent()
    assert isinstance(answers[0], PeerLost), "its router died"
    assert "Fatal Python error: Aborted" in log
    assert re.search(r"mine\.py.*blocks_once", log), "the log says where it hung"
    with fleet.until_ready():
        assert fleet.complete() == 3


def test_an_engine_whose_step_never_ends_is_ended_by_the_watchdog(fleet: Fleet) -> None:
    fleet.router()
    engine = fleet.engine("--fake-decode-base-us", "3.6e9", "--step-timeout", "0.5")
    with fleet.until_ready(), running(fleet.complete) as answers:
        engine.manager.until("STATUS", holds=lambda told: told["STATUS"].startswith("hangs: a step has taken"))
        engine.arguments = [each if each != "3.6e9" else "1000" for each in engine.arguments]
        log = engine.restart_when_silent()
    assert "a step does not end: the step thread hangs" in log
    assert re.search(r"fake_executor\.py.* in collect", log), "the log says where it hung"
    assert answers
    with fleet.until_ready():
        assert fleet.complete() == 3
