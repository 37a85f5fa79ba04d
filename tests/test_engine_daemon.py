"""The engine daemon with the fake executor over ZeroMQ: in this process, and as a process of its own."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import daemon_environ

from microserve.engine import daemon
from microserve.engine.daemon import Engine, main, open_engine_transport, open_executor, serve
from microserve.engine.fake_executor import FakeExecutor
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.config import EngineConfig, FakeConfig
from microserve.runtime.errors import ConfigError, Draining, InternalError, TransferFailed
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    Announce,
    Drain,
    EngineEvent,
    Generated,
    Heartbeat,
    Info,
    InfoReply,
    Leave,
    Meet,
    Ok,
    PeerAddress,
    Prepared,
    PrepRecv,
    Release,
    RemoteSend,
    SamplingParams,
    SendReport,
    StartGenerate,
    Stats,
    StatsReply,
    Tokens,
)
from microserve.runtime.rpc import IncomingCall, RpcClient, RpcServer, connect
from microserve.runtime.service import Lifecycle
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from microserve.engine.executor import Executor
    from microserve.engine.progress import Progress

LIMIT = 20.0
"""Seconds after which something counts as stuck."""


class Router:
    """Takes announcements as a router does, and calls the engine that announced itself."""

    def __init__(self) -> None:
        self.bus = ZmqBus(Peer("router", "r", 1))
        self.heard: asyncio.Queue[Announce | Heartbeat | Leave] = asyncio.Queue()

    def _handle(self, call: IncomingCall) -> None:
        assert isinstance(call.body, Announce | Heartbeat | Leave)
        self.heard.put_nowait(call.body)
        call.reply(Ok())

    async def open(self) -> str:
        return (await self.bus.listen("tcp://127.0.0.1:*", RpcServer(self._handle))).endpoint

    async def hear(self, wanted: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(LIMIT):
            while not wanted(message := await self.heard.get()):
                pass
        return message

    async def dial(self) -> tuple[Announce, RpcClient]:
        announce = await self.hear(lambda message: isinstance(message, Announce))
        return announce, await connect(self.bus, announce.info.endpoint)


def config(router: str, **options: Any) -> EngineConfig:
    fake = FakeConfig(prefill_us_per_token=0, decode_base_us=500, decode_us_per_sequence=0, vocab_size=100)
    settings = {"model": "tokens-only", "executor": "fake", "fake": fake, "routers": (router,), **options}
    return EngineConfig(**settings)


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[tuple[Router, Lifecycle, asyncio.Task[None]]]:
    router = Router()
    lifecycle = Lifecycle()
    engine = asyncio.create_task(serve(config(await router.open(), **options), "e1", lifecycle))
    try:
        yield router, lifecycle, engine
        lifecycle.drain("the test is over")
        async with asyncio.timeout(LIMIT):
            await engine
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        await router.bus.close()


def run(work: Callable[[Router, Lifecycle, asyncio.Task[None]], Awaitable[None]], **options: Any) -> None:
    async def body() -> None:
        async with served(**options) as (router, lifecycle, engine):
            await work(router, lifecycle, engine)

    asyncio.run(body())


def generate(sub_id: str, *, max_tokens: int) -> StartGenerate:
    sampling = SamplingParams(max_tokens=max_tokens)
    return StartGenerate(request_id="r", sub_id=sub_id, prompt=pack_tokens([1, 2, 3]), sampling=sampling)


def test_it_announces_itself_serves_and_leaves() -> None:
    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        announce, client = await router.dial()
        info = announce.info
        assert (info.engine_id, info.executor, info.max_running, info.labels) == ("e1", "fake", 3, {"pool": "x"})
        assert (info.model.name, info.layout.page_size, announce.load.total_pages) == ("tokens-only", 8, 50)
        assert announce.load.state == "ready"
        stream = client.stream(generate("s", max_tokens=40))
        tokens: list[int] = []
        async for body in stream:
            assert isinstance(body, Tokens)
            tokens += unpack_tokens(body.ids).tolist()
        assert len(tokens) == 40
        assert isinstance(stream.reply, Generated)
        reply = await client.call(Info())
        assert isinstance(reply, InfoReply)
        assert reply.info == info
        stats = await client.call(Stats())
        assert isinstance(stats, StatsReply)
        assert stats.integrity == "ok"
        assert stats.values["scheduler_finished"] == 1
        assert stats.values["cache_free"] + stats.values["cache_cached"] == 50
        lifecycle.drain("test")
        leave = await router.hear(lambda message: isinstance(message, Leave))
        assert (leave.engine_id, leave.epoch) == ("e1", info.epoch)

    run(work, max_running=3, page_size=8, kv_pages=50, labels={"pool": "x"})


def test_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        _, client = await router.dial()
        stream = client.stream(generate("s", max_tokens=100))
        await anext(stream)
        lifecycle.drain("test")
        await router.hear(lambda message: isinstance(message, Heartbeat) and message.load.state == "draining")
        with pytest.raises(Draining):
            await client.call(generate("t", max_tokens=1))
        count = 1
        async for _ in stream:
            count += 1
        assert count == 100

    run(work)


def test_a_drain_that_takes_too_long_cuts_off() -> None:
    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        _, client = await router.dial()
        stream = client.stream(generate("s", max_tokens=30_000))
        await anext(stream)
        lifecycle.drain("test")
        with pytest.raises(Draining, match="this engine stops"):
            async for _ in stream:
                pass

    run(work, drain_timeout=0.05)


def test_the_drain_verb_does_not_end_the_process() -> None:
    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        _, client = await router.dial()
        assert await client.call(Drain()) == Ok()
        await router.hear(lambda message: isinstance(message, Heartbeat) and message.load.state == "draining")
        assert not engine.done()

    run(work)


def test_events_are_numbered_and_tell_the_state() -> None:
    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        announce, _ = await router.dial()
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        await router.bus.subscribe(announce.info.events_endpoint, events.put_nowait)
        async with asyncio.timeout(LIMIT):
            first = await events.get()
            # The subscription has taken: from here on nothing is lost.
            lifecycle.drain("test")
            seen = [first]
            while seen[-1].kind != "stopping":
                seen.append(await events.get())
        assert {(event.engine_id, event.epoch) for event in seen} == {("e1", announce.info.epoch)}
        assert [event.seq for event in seen] == list(range(first.seq, first.seq + len(seen)))
        states = [event.load.state for event in seen if event.kind == "state"]
        assert states == ["draining"]
        assert all(event.load.total_pages == FakeConfig().total_pages for event in seen)

    run(work)


def test_a_dead_step_thread_ends_the_engine_with_an_error() -> None:
    async def body() -> None:
        router = Router()
        settings = config(await router.open())
        bus = ZmqBus(Peer("engine", "e1", 1))
        engine = Engine(settings, "e1", 1, open_executor(settings), None, bus)
        try:
            await engine.start()
            running = asyncio.create_task(engine.run(Lifecycle()))
            _, client = await router.dial()
            stream = client.stream(generate("s", max_tokens=30_000))
            await anext(stream)

            def bug(now: float) -> None:
                raise ZeroDivisionError(f"a bug at {now}")

            engine.scheduler.schedule = bug  # type: ignore[method-assign]
            with pytest.raises(Draining, match="the engine ends: the step thread died: ZeroDivisionError"):
                async for _ in stream:
                    pass
            with pytest.raises(InternalError, match="the step thread died"):
                await running
        finally:
            await engine.stop()
            await bus.close()
            await router.bus.close()

    asyncio.run(body())


def test_an_address_in_use_is_a_configuration_error() -> None:
    async def body() -> None:
        router = Router()
        taken = await router.open()
        try:
            with pytest.raises(ConfigError):
                await serve(config(taken, bind=taken), "e1", Lifecycle())
        finally:
            await router.bus.close()

    asyncio.run(body())


def test_two_engines_move_kv_and_end_in_order() -> None:
    async def body() -> None:
        router = Router()
        endpoint = await router.open()
        lives = [Lifecycle(), Lifecycle()]
        engines = [
            asyncio.create_task(serve(config(endpoint), name, life)) for name, life in zip("ab", lives, strict=True)
        ]
        try:
            (first, a), (second, b) = sorted(
                [await router.dial(), await router.dial()], key=lambda found: found[0].info.engine_id
            )
            known = [
                PeerAddress(engine_id=each.info.engine_id, epoch=each.info.epoch, endpoint=each.info.endpoint)
                for each in (first, second)
            ]
            for client in (a, b):
                assert await client.call(Meet(peers=known)) == Ok()
            prompt = pack_tokens(range(90))
            prepared = await b.call(PrepRecv(request_id="q", sub_id="p", prompt=prompt, end=-1))
            assert isinstance(prepared, Prepared)
            kv = prepared.address
            sending = asyncio.create_task(
                a.call(RemoteSend(request_id="q", sub_id="s", prompt=prompt, address=kv, begin=0, end=kv.end))
            )
            sampling = SamplingParams(max_tokens=3, seed=1)
            moved = StartGenerate(
                request_id="q", sub_id="g", prompt=prompt, begin=-1, lease=kv.lease, sampling=sampling
            )
            alone = StartGenerate(request_id="q", sub_id="g", prompt=prompt, sampling=sampling)
            (tokens, end), (expected, _) = await read(b, moved), await read(a, alone)
            assert tokens == expected
            assert end.received_tokens == 89
            report = await sending
            assert isinstance(report, SendReport)
            assert report.computed == 89
            for client in (a, b):
                stats = await client.call(Stats())
                assert isinstance(stats, StatsReply)
                assert stats.integrity == "ok"
                reply = await client.call(Info())
                assert isinstance(reply, InfoReply)
                assert [link.state for link in reply.links] == ["ready"]
            for life in lives:
                life.drain("the test is over")
            async with asyncio.timeout(LIMIT):
                await asyncio.gather(*engines)
        finally:
            for engine in engines:
                engine.cancel()
            await asyncio.gather(*engines, return_exceptions=True)
            await router.bus.close()

    asyncio.run(body())


async def read(client: RpcClient, body: StartGenerate) -> tuple[list[int], Generated]:
    stream = client.stream(body)
    tokens: list[int] = []
    async for part in stream:
        assert isinstance(part, Tokens)
        tokens += unpack_tokens(part.ids).tolist()
    assert isinstance(stream.reply, Generated)
    return tokens, stream.reply


def test_a_drain_waits_for_what_was_prepared() -> None:
    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        _, client = await router.dial()
        prompt = pack_tokens([1, 2, 3])
        prepared = await client.call(PrepRecv(request_id="q", sub_id="p", prompt=prompt, end=0))
        assert isinstance(prepared, Prepared)
        lifecycle.drain("test")
        await router.hear(lambda message: isinstance(message, Heartbeat) and message.load.state == "draining")
        with pytest.raises(Draining):
            await client.call(PrepRecv(request_id="q", sub_id="p2", prompt=prompt))
        assert not engine.done()
        sampling = SamplingParams(max_tokens=5)
        body = StartGenerate(request_id="q", sub_id="g", prompt=prompt, lease=prepared.address.lease, sampling=sampling)
        assert len((await read(client, body))[0]) == 5
        async with asyncio.timeout(LIMIT):
            await engine

    run(work)


def test_a_process_that_is_told_to_end_does_not_wait_for_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    read_on = threading.Event()

    def slow(settings: EngineConfig, progress: Progress) -> Executor:
        read_on.wait(LIMIT)
        return open_executor(settings, progress)

    async def body() -> None:
        monkeypatch.setattr(daemon, "open_executor", slow)
        lifecycle = Lifecycle()
        engine = asyncio.create_task(serve(config("tcp://127.0.0.1:1", transport="loopback"), "e1", lifecycle))
        await asyncio.sleep(0)
        lifecycle.drain("SIGTERM")
        async with asyncio.timeout(LIMIT / 4):
            await engine

    try:
        asyncio.run(body())
    finally:
        read_on.set()


@pytest.mark.parametrize("options", [{"transport": "nixl"}, {"require_link": "shm"}])
def test_a_transport_that_is_demanded_and_cannot_be_had_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setattr(daemon, "open_transport", no_transport)
    with pytest.raises(ConfigError, match="no such device"):
        asyncio.run(serve(config("tcp://127.0.0.1:1", **options), "e1", Lifecycle()))


def test_without_a_transport_it_serves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "open_transport", no_transport)

    async def work(router: Router, lifecycle: Lifecycle, engine: asyncio.Task[None]) -> None:
        announce, client = await router.dial()
        assert isinstance(await client.call(generate("s", max_tokens=3)), Generated)
        prompt = pack_tokens([1, 2, 3])
        prepared = await client.call(PrepRecv(request_id="q", sub_id="p", prompt=prompt))
        assert isinstance(prepared, Prepared)
        with pytest.raises(TransferFailed, match="no transport"):
            await client.call(RemoteSend(request_id="q", sub_id="r", prompt=prompt, address=prepared.address, begin=0))
        assert prepared.address.engine_id == announce.info.engine_id
        await client.call(Release(lease=prepared.address.lease))

    run(work)


def no_transport(*_arguments: object, **_options: object) -> None:
    raise OSError("no such device")


def test_the_fake_executor_is_sized_by_the_configuration() -> None:
    executor = open_executor(config("tcp://127.0.0.1:1", kv_pages=70, page_size=4, max_context=900))
    assert isinstance(executor, FakeExecutor)
    assert (executor.total_pages, executor.layout.page_size, executor.model.max_context) == (70, 4, 900)


def test_wrong_flags_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--page-size", "many"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("microserve engine: error: page_size: 'many' is not a whole number")
    assert error.count("\n") == 1


def test_the_collector_need_not_look_at_what_a_start_made(monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Any] = []

    def run(work: Any, *, name: str) -> int:
        works.append(work)
        return 0

    monkeypatch.setattr(daemon, "run_service", run)
    monkeypatch.setattr(daemon, "setup_logging", lambda *args, **settings: None)
    assert main(["--executor", "fake"]) == 0
    before = gc.get_freeze_count()
    try:
        works[0].keywords["ready"]()
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()


def test_a_process_serves_and_ends_with_0_on_sigterm() -> None:
    async def body() -> None:
        router = Router()
        endpoint = await router.open()
        arguments = ["--executor", "fake", "--model", "tokens-only", "--engine-id", "e9", "--routers", endpoint]
        process = subprocess.Popen(  # noqa: ASYNC220  # its output is read when it has ended
            [sys.executable, "-P", "-m", "microserve.engine", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=daemon_environ(),
        )
        try:
            announce, client = await router.dial()
            assert announce.info.engine_id == "e9"
            assert isinstance(await client.call(generate("s", max_tokens=3)), Generated)
            process.send_signal(signal.SIGTERM)
            await router.hear(lambda message: isinstance(message, Leave))
            _, log = await asyncio.to_thread(process.communicate, timeout=LIMIT)
        finally:
            process.kill()
            process.wait()
            await router.bus.close()
        assert process.returncode == 0
        ready = r"engine:e9@[0-9a-f]+ ready  endpoint=tcp://\S+ model=tokens-only executor=fake pages=8192"
        assert re.search(ready, log)
        assert re.search(r"engine:e9@[0-9a-f]+ drained  finished=0 cut_off=0", log)

    asyncio.run(body())


def test_a_process_with_limits_that_do_not_fit_ends_with_2() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "microserve.engine",
            "--executor",
            "fake",
            *("--step-tokens", "8", "--max-running", "8"),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**daemon_environ(), "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 2
    assert "step_tokens (8) must be larger than max_running (8)" in done.stderr


def test_kv_keeps_to_the_network_devices_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks there who somebody is: off this host only when that is said."""
    opened: list[tuple[str, str, str]] = []

    def open_transport(kind: str, _memory: object, *, name: str, devices: str) -> None:
        opened.append((kind, name, devices))

    monkeypatch.setattr(daemon, "open_transport", open_transport)
    for options in ({}, {"ucx_devices": "mlx5_0:1", "transport": "nixl"}):
        settings = config("tcp://127.0.0.1:1", **options)
        open_engine_transport(settings, open_executor(settings), "e1@7")
    assert opened == [("auto", "e1@7", "lo"), ("nixl", "e1@7", "mlx5_0:1")]


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")]
)
def test_threads_that_compute_together_do_not_spin_for_long(given: dict[str, str], spins: str) -> None:
    """As libgomp itself has it, which looks at the environment once, when torch is loaded."""
    command = [sys.executable, "-P", "-m", "microserve.engine", "--model", "/nope"]
    environ = {name: value for name, value in daemon_environ().items() if not name.startswith(("OMP_", "GOMP_"))}
    environ |= {"OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert "no model '/nope'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
