"""An operator's day with real daemons, as a script: install, keys, serve, watch, drain, change, roll, revoke, read.

Requests flow all the while, and none of them may fail.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import Cluster, daemon_environ, state_of
from tests.command_support import PROGRAM
from tests.test_tools_top import top

from microserve.runtime.api_keys import read_api_keys
from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import MicroserveError, PeerLost, Unauthorized

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ENGINES = ("e0", "e1", "e2")
STREAMS = 8
TOKENS = 30
FAKE = (
    *("--executor", "fake", "--model", "tokens-only", "--log-json"),
    *("--fake-decode-base-us", "10000", "--fake-prefill-us-per-token", "5"),
)


class Operator:
    """Types commands. Every one of them must succeed."""

    def __init__(self, cluster: Cluster, key_file: Path) -> None:
        self._environ = daemon_environ() | {
            "MICROSERVE_ROUTER": cluster.router,
            "MICROSERVE_KEY_FILE": str(key_file),
        }

    async def types(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._environ
        )
        out, err = await process.communicate()
        assert process.returncode == 0, (arguments, out.decode(), err.decode())
        return out.decode()


class Traffic:
    """Streams that follow each other on every line; a line is a client."""

    def __init__(self, router: str, key_file: Path) -> None:
        self.done = 0
        self.failed: list[MicroserveError] = []
        self.by_engine: set[str] = set()
        self.by_version: set[str] = set()
        self._client = AsyncClient(router, key_file=key_file)
        self._stop = False
        self._served = asyncio.Event()

    async def line(self, number: int) -> None:
        prompt = [number, *range(1, 150)]
        while not self._stop:
            try:
                answer = await self._client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
            except MicroserveError as error:
                self.failed.append(error)
                self._served.set()
                return
            assert len(answer.token_ids) == TOKENS
            prompt = [number, *answer.token_ids, *range(1, 100)]
            self.by_engine.add(answer.engine)
            self.by_version.add(answer.strategy.partition("@")[0])
            self.done += 1
            self._served.set()

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[Traffic]:
        lines = [asyncio.create_task(self.line(number)) for number in range(STREAMS)]
        try:
            yield self
        finally:
            self._stop = True
            await asyncio.gather(*lines)
            await self._client.close()

    async def more(self, count: int) -> None:
        """Until so many more requests have been served. What was counted of them is of these alone."""
        self.by_engine, self.by_version = set(), set()
        until = self.done + count
        async with asyncio.timeout(60):
            while self.done < until and not self.failed:
                self._served.clear()
                await self._served.wait()
        assert not self.failed


def installed(home: Path) -> str:
    done = subprocess.run(
        [*PROGRAM, "install-units", "--user", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        env=daemon_environ() | {"HOME": str(home)},
    )
    assert list(home.iterdir()) == []
    return done.stdout


def keys(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*PROGRAM, "keys", *arguments, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=daemon_environ(),
    )
    assert done.returncode == 0, (arguments, done)
    return done.stdout


async def http_answer(cluster: Cluster, key: str) -> int:
    """The status of one request over HTTP."""
    command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", f"{cluster.http}/v1/models"]
    process = await asyncio.create_subprocess_exec(*command, "-H", "@-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = await process.communicate(f"Authorization: Bearer {key}\n".encode())
    return int(out)


def events_of(log: str) -> list[dict[str, Any]]:
    """A log in JSON: one object a line, and nothing else."""
    return [json.loads(line) for line in log.splitlines()]


def test_an_operators_day(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    plan = installed(home)
    assert "microserve-router.service" in plan
    assert "microserve-engine@.service" in plan

    folder = tmp_path / "keys"
    for name, role in (
        ("r", "router"),
        *((engine, "engine") for engine in ENGINES),
        ("ann", "client"),
        ("root", "admin"),
    ):
        keys(folder, "new", name, "--role", role)
    api_key = keys(folder, "api", "new", "app", "--scope", "serve").strip()
    assert [each.name for each in read_api_keys(folder / "api_keys.toml")] == ["app"]

    router_args = (
        *("--key-file", str(folder / "r.key"), "--api-keys-file", str(folder / "api_keys.toml"), "--log-json"),
        *("--state-folder", str(tmp_path / "state")),
    )
    with pytest.MonkeyPatch.context() as patch:
        # What the test itself asks, it asks as root.
        patch.setenv("MICROSERVE_KEY_FILE", str(folder / "root.key"))
        with Cluster(engines=0, engine_args=FAKE, router_args=router_args) as cluster:
            for engine in ENGINES:
                cluster.add_engine(engine, "--key-file", str(folder / f"{engine}.key"), wait=False)
            cluster.wait_ready(len(ENGINES))
            asyncio.run(day(cluster, folder, api_key))
            cluster.stop()
            logs = {daemon.name: events_of(daemon.text()) for daemon in [cluster.router_daemon] if daemon is not None}
            engines = [events_of(daemon.text()) for daemon in cluster.engines]
    read_what_happened(logs["router"], engines)


async def day(cluster: Cluster, folder: Path, api_key: str) -> None:
    operator = Operator(cluster, folder / "root.key")
    key_file = str(folder / "root.key")
    async with (
        Traffic(cluster.router, folder / "ann.key").flowing() as traffic,
        top(cluster.router, key_file=key_file) as tui,
    ):
        await traffic.more(3 * STREAMS)
        assert await http_answer(cluster, api_key) == 200
        assert await http_answer(cluster, "ms_00000000_guess") == 401

        # Watch.
        await tui.until(lambda: [row[0] for row in tui.rows("engines")] == list(ENGINES), "the fleet")
        await tui.press("2")
        await tui.until(lambda: any(row[1] == "running" for row in tui.rows("requests")), "requests")
        await tui.press("1")

        # Drain an engine under load: nothing fails, and nothing more goes there.
        await operator.types("drain", "e1", "--yes", "--wait", "30")
        await tui.until(lambda: tui.rows("engines")[1][1] == "draining", "the draining engine in the TUI")
        await traffic.more(2 * STREAMS)
        assert traffic.by_engine == {"e0", "e2"}
        await operator.types("resume", "e1")
        await tui.until(lambda: tui.rows("engines")[1][1] == "ready", "the engine's return")

        # Change the strategy: the next requests are served by it.
        await operator.types("strategy", "set", "prefill_decode", "--set", "min_remote=1")
        await traffic.more(2 * STREAMS)
        await traffic.more(STREAMS)
        assert traffic.by_version == {"prefill_decode"}

        # Roll a restart through the fleet, an engine at a time, and then the router's strategy back.
        for name in ENGINES:
            await restart(cluster, operator, folder, name)
            await traffic.more(STREAMS)
        await operator.types("strategy", "rollback")
        await traffic.more(2 * STREAMS)
        shown = json.loads(await operator.types("engines", "--json"))
        assert sorted(engine["id"] for engine in shown) == list(ENGINES)

        # Revoke a key: its sessions end, and nobody else's.
        await asyncio.to_thread(keys, folder, "new", "eve", "--role", "client")
        eve = AsyncClient(cluster.router, key_file=folder / "eve.key", connect_timeout=2.0)
        await until_let_in(eve)
        await asyncio.to_thread(keys, folder, "revoke", "eve", "--yes")
        with pytest.raises((PeerLost, Unauthorized)):
            await ask_on(eve)
        await eve.close()
        await asyncio.to_thread(keys, folder, "api", "revoke", "app", "--yes")
        async with asyncio.timeout(30):
            while True:
                if await http_answer(cluster, api_key) == 401:
                    break
                await asyncio.sleep(0.05)
        await traffic.more(STREAMS)
        log = await operator.types("events", "--json")
        kinds = [json.loads(line)["kind"] for line in log.splitlines()]
        assert kinds.count("restarted") + kinds.count("joined") >= 2 * len(ENGINES)
        assert kinds.count("strategy") == 2
    assert not traffic.failed


async def ask_on(client: AsyncClient) -> None:
    """Until it is refused."""
    async with asyncio.timeout(30):
        while True:
            await client.status()
            await asyncio.sleep(0.05)


async def until_let_in(client: AsyncClient) -> None:
    """A key that was made while daemons run is known to them a moment later."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.status()
            except (PeerLost, Unauthorized):
                await asyncio.sleep(0.1)
            else:
                return


async def restart(cluster: Cluster, operator: Operator, folder: Path, name: str) -> None:
    await operator.types("drain", name, "--yes", "--wait", "30")
    daemon = [each for each in cluster.engines if each.name == name][-1]
    daemon.terminate()
    assert await asyncio.to_thread(daemon.wait) == 0
    await asyncio.to_thread(cluster.add_engine, name, "--key-file", str(folder / f"{name}.key"))
    assert state_of(await asyncio.to_thread(cluster.status), name) == "ready"


def read_what_happened(router: list[dict[str, Any]], engines: list[list[dict[str, Any]]]) -> None:
    """The logs tell the day: who, when, and which incarnation."""
    events = [each["event"] for each in router]
    assert events[0] == "ready"
    assert {each["process"] for each in router} == {"router:r"}
    # Three that came, and three that came back.
    came = [each for each in router if each["event"] in ("engine joined", "engine restarted")]
    assert sorted(each["engine"] for each in came) == sorted(2 * ENGINES)
    assert len({each["engine_epoch"] for each in came}) == 6
    reasons = [each["reason"] for each in router if each["event"] == "strategy"]
    assert [re.sub("@[0-9a-f]+", "", each) for each in reasons] == [
        "set prefill_decode, by root",
        "rolled back change 2, by root",
    ]
    deeds = [(each["what"], each["engine"], each["by"]) for each in router if each["event"] == "asked of an engine"]
    assert deeds == [
        ("drain", "e1", "root"),
        ("resume", "e1", "root"),
        *(("drain", engine, "root") for engine in ENGINES),
    ]
    assert any(each["event"] == "keys reloaded" and each["revoked"] == 1 for each in router)
    assert any(each["event"] == "API keys read again" and each["ended"] == 1 for each in router)
    assert any(each["event"] == "HTTP request refused" and each["why"] == "wrong key" for each in router)
    assert not [each for each in router if each["level"] == "error"]
    for log in engines:
        said = [each["event"] for each in log]
        assert said[0] == "ready"
        assert said.count("drained") == 1
        assert not [each for each in log if each["level"] == "error"]
