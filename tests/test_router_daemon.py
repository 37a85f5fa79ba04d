"""The router process: addresses that are taken, a request through HTTP and bus, and a drain on the first signal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.router_support import folder_with_tokenizer

from microserve.router.daemon import bind_http, load_versions, main, serve, url_of
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.config import RouterConfig
from microserve.runtime.errors import ConfigError
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    Finished,
    Generate,
    ListModels,
    Models,
    SamplingParams,
    Status,
    StatusReply,
    TextChunk,
)
from microserve.runtime.rpc import connect
from microserve.runtime.service import Lifecycle
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator
    from pathlib import Path

    from microserve.runtime.rpc import RpcClient

PATIENCE = 30.0


class Daemon:
    """A child process whose log is read line by line."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def line(self, pattern: str) -> re.Match[str]:
        """Waits for a line of its log. Fails when it ends without it."""
        assert self.process.stderr is not None
        while raw := await asyncio.wait_for(self.process.stderr.readline(), PATIENCE):
            self.lines.append(raw.decode())
            found = re.search(pattern, self.lines[-1])
            if found is not None:
                return found
        raise AssertionError(f"no line with {pattern!r}:\n{''.join(self.lines)}")

    async def wait(self) -> int:
        assert self.process.stderr is not None
        self.lines.append((await self.process.stderr.read()).decode())
        return await asyncio.wait_for(self.process.wait(), PATIENCE)


@asynccontextmanager
async def daemon(module: str, *flags: str) -> AsyncIterator[Daemon]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MICROSERVE_")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *flags,
        stderr=asyncio.subprocess.PIPE,
        env=environ | {"PYTHONPATH": path},
    )
    try:
        yield Daemon(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def router() -> AsyncIterator[tuple[Daemon, str, str]]:
    """A router process: (daemon, bus endpoint, HTTP URL)."""
    flags = ("--bind", "tcp://127.0.0.1:*", "--http-port", "0", "--router-id", "r")
    async with daemon("microserve.router.daemon", *flags) as process:
        ready = await process.line(r"ready  bus=(\S+) http=(\S+)")
        yield process, ready[1], ready[2]


@asynccontextmanager
async def engine(bus: str, folder: Path, *, step_us: int) -> AsyncIterator[Daemon]:
    """An engine process with the fake executor, whose steps take `step_us` microseconds."""
    flags = ("--executor", "fake", "--routers", bus, "--engine-id", "e", "--bind", "tcp://127.0.0.1:*")
    model = ("--model", folder_with_tokenizer(folder), "--model-name", "m", "--fake-decode-base-us", str(step_us))
    async with daemon("microserve.engine.daemon", *flags, *model) as process:
        yield process


@asynccontextmanager
async def client(endpoint: str) -> AsyncIterator[RpcClient]:
    bus = ZmqBus(Peer("client", "c", new_epoch()))
    try:
        yield await connect(bus, endpoint)
    finally:
        await bus.close()


def test_a_request_over_the_bus_and_http_and_a_drain_that_finishes_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with router() as (process, bus, http), engine(bus, tmp_path, step_us=20_000) as worker:
            await process.line("engine connected")
            async with client(bus) as rpc, httpx.AsyncClient(base_url=http, timeout=PATIENCE) as web:
                models = await rpc.call(ListModels())
                assert isinstance(models, Models)
                assert [model.name for model in models.models] == ["m"]
                stream = rpc.stream(Generate(prompt=pack_tokens([1, 2, 3]), sampling=SamplingParams(max_tokens=40)))
                await anext(stream)
                # It runs for most of a second more; the signal comes in its middle.
                process.process.send_signal(signal.SIGTERM)
                await process.line("new requests are refused  requests=1")
                refused = await web.post("/v1/completions", json={"model": "m", "prompt": [1], "max_tokens": 1})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "draining"
                assert int(refused.headers["retry-after"]) >= 1
                count = 1
                async for part in stream:
                    assert isinstance(part, TextChunk)
                    count += len(unpack_tokens(part.ids))
                reply = stream.reply
                assert isinstance(reply, Finished)
                assert (count, reply.usage.completion_tokens, reply.finish_reason) == (40, 40, "length")
                assert reply.engine == "e"
            assert await process.wait() == 0
            assert any("drained" in line for line in process.lines)
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait() == 0

    asyncio.run(run())


def test_a_stream_over_http_and_a_client_that_goes_away(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            router() as (process, bus, http),
            engine(bus, tmp_path, step_us=5_000),
        ):
            await process.line("engine connected")
            async with client(bus) as rpc, httpx.AsyncClient(base_url=http, timeout=PATIENCE) as web:
                assert [each["id"] for each in (await web.get("/v1/models")).json()["data"]] == ["m"]
                body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 5, "stream": True, "ignore_eos": True}
                async with web.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    lines = [line async for line in response.aiter_lines() if line]
                assert lines[-1] == "data: [DONE]"
                events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
                assert events[-1]["choices"][0]["finish_reason"] == "length"
                async with web.stream("POST", "/v1/completions", json=body | {"max_tokens": 20_000}) as response:
                    lines_of_it = response.aiter_lines()
                    await anext(lines_of_it)
                    assert (await _status(rpc)).active_requests == 1
                # Its end is seen when the router next writes to it, a few milliseconds on.
                async with asyncio.timeout(PATIENCE):
                    while (await _status(rpc)).active_requests:  # each look is a round trip
                        continue
                status = await _status(rpc)
                assert [each.charged for each in status.engines] == [0]
                assert status.http == http
            process.process.send_signal(signal.SIGINT)
            assert await process.wait() == 0

    asyncio.run(run())


async def _status(rpc: RpcClient) -> StatusReply:
    status = await rpc.call(Status())
    assert isinstance(status, StatusReply)
    return status


def test_a_second_signal_is_immediate(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            router() as (process, bus, _http),
            engine(bus, tmp_path, step_us=100_000),
        ):
            await process.line("engine connected")
            async with client(bus) as rpc:
                stream = rpc.stream(Generate(prompt=pack_tokens([1]), sampling=SamplingParams(max_tokens=10_000)))
                await anext(stream)
                process.process.send_signal(signal.SIGTERM)
                await process.line("new requests are refused  requests=1")
                process.process.send_signal(signal.SIGTERM)
                assert await process.wait() == 128 + signal.SIGTERM

    asyncio.run(run())


def test_a_port_that_is_taken_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        assert main(["--http-port", str(port), "--bind", "tcp://127.0.0.1:*"]) == 1
        expected = (
            f"microserve router: error: cannot serve HTTP at 127.0.0.1:{port}: Address already in use (http_host, "
        )
        assert capsys.readouterr().err == f"{expected}http_port)\n"
        assert main(["--http-port", "0", "--bind", f"tcp://127.0.0.1:{port}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"microserve router: error: cannot listen at 'tcp://127.0.0.1:{port}'")
        assert error.count("\n") == 1


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError, match="http_host: 'no such host' is not an address"):
        bind_http("no such host", 0)


def test_urls() -> None:
    with bind_http("127.0.0.1", 0) as sock:
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_wrong_settings_of_the_strategy_stop_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_versions(RouterConfig()).default.strategy.name == "data_parallel"
    with pytest.raises(ConfigError, match="no strategy 'data_paralell'; did you mean 'data_parallel'"):
        load_versions(RouterConfig(strategy="data_paralell"))
    with pytest.raises(ConfigError, match="strategy_settings: strategy 'data_parallel' has no setting 'ratio'"):
        load_versions(RouterConfig(strategy_settings={"ratio": 0.1}))
    assert main(["--strategy", "nothing"]) == 2
    assert "no strategy 'nothing'" in capsys.readouterr().err


def test_a_strategy_from_the_configured_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text(
        "from microserve import strategy\n\n\n@strategy\nasync def mine(request, fleet, *, ratio: float = 0.2):\n"
        "    async for chunk in fleet.pick().start_generate():\n        yield chunk\n"
    )
    (tmp_path / "broken.py").write_text("x = = 1\n")
    config = RouterConfig(strategy="mine", strategy_settings={"ratio": 0.5}, strategy_folder=str(tmp_path))
    program = load_versions(config).default
    assert (program.strategy.name, program.settings) == ("mine", {"ratio": 0.5})
    (record,) = [record for record in caplog.records if record.getMessage() == "strategy cannot be used"]
    assert record.fields["problem"] == f"{tmp_path}/broken.py:1: SyntaxError: invalid syntax"  # type: ignore[attr-defined]


def test_serve_ends_when_its_lifecycle_drains() -> None:
    async def run() -> None:
        lifecycle = Lifecycle()
        config = RouterConfig(bind="tcp://127.0.0.1:*", http_port=0)
        serving = asyncio.create_task(serve(config, "r", lifecycle))
        lifecycle.drain("test")
        await asyncio.wait_for(serving, PATIENCE)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
