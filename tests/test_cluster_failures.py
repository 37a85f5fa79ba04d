"""Processes that die, stall, restart and drain, under load: nothing hangs, and every request ends exactly once."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.cluster import Cluster, Daemon, state_of
from tests.raw_calls import Recorder

from microserve.runtime.client import AsyncClient
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import Draining, MicroserveError, PeerError, Unavailable
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import Generate, Info, InfoReply, SamplingParams, Stats, StatsReply
from microserve.runtime.rpc import connect
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from microserve.runtime.messages import Load, StatusReply

IN_FLIGHT = 32
TOKENS = 40


def request(number: int, tokens: int = TOKENS) -> Generate:
    prompt = [number % 1000 + 1, number % 7 + 1, *range(1, 40)]
    return Generate(prompt=pack_tokens(prompt), sampling=SamplingParams(max_tokens=tokens, ignore_eos=True))


def engine_endpoint(status: StatusReply, name: str) -> str:
    return next(engine.info.endpoint for engine in status.engines if engine.info.engine_id == name)


@asynccontextmanager
async def open_bus() -> AsyncIterator[ZmqBus]:
    bus = ZmqBus(Peer("client", "test", new_epoch()))
    try:
        yield bus
    finally:
        await bus.close()


async def engine_load(bus: ZmqBus, endpoint: str) -> Load:
    rpc = await connect(bus, endpoint)
    try:
        reply = await rpc.call(Info(), budget=10)
        assert isinstance(reply, InfoReply)
        return reply.load
    finally:
        rpc.close()


async def until_running(bus: ZmqBus, endpoint: str, running: int) -> None:
    """Wait until an engine runs so many requests; what it says of its load is a moment old."""
    async with asyncio.timeout(10):
        # Each asking takes a round trip, so this does not spin.
        while (await engine_load(bus, endpoint)).running != running:
            pass


async def freed(bus: ZmqBus, endpoint: str, limit: float = 10.0) -> None:
    """Wait until an engine runs nothing and owns no pages, and check its books."""
    async with asyncio.timeout(limit):
        load = await engine_load(bus, endpoint)
        while load.running or load.waiting or load.owned_pages:
            load = await engine_load(bus, endpoint)
    assert load.free_pages + load.cached_pages == load.total_pages
    rpc = await connect(bus, endpoint)
    stats = await rpc.call(Stats(), budget=10)
    rpc.close()
    assert isinstance(stats, StatsReply)
    assert stats.integrity == "ok"
    assert stats.values["cache_locks"] == 0


def test_one_engine_killed_and_one_added_under_load() -> None:
    async def scenario(cluster: Cluster) -> None:
        numbers = iter(range(1_000_000))
        going = True

        def start() -> None:
            number = next(numbers)
            recorder.call(number, request(number))

        def ended(_: int) -> None:
            if going:
                start()

        recorder = Recorder(ended)
        async with open_bus() as bus:
            await bus.dial(cluster.router, recorder)
            for _ in range(IN_FLIGHT):
                start()

            def done() -> int:
                return len(recorder.terminals) - len(recorder.open)

            def served_by(name: str, first: int) -> int:
                return sum(
                    recorder.finished(id).engine == name  # type: ignore[union-attr]
                    for id, ends in recorder.terminals.items()
                    if id >= first and ends and recorder.error(id) is None
                )

            await recorder.wait(lambda: done() >= 3 * IN_FLIGHT)
            assert served_by("e0", 0) > 0
            assert served_by("e1", 0) > 0
            cluster.engines[0].kill()
            # Once the router has seen it, nothing new goes there.
            await asyncio.to_thread(
                cluster.wait_for, lambda status: state_of(status, "e0") != "ready", "e0 to be missed"
            )
            after_kill = len(recorder.terminals)
            await asyncio.to_thread(cluster.add_engine, "e2")
            await recorder.wait(lambda: served_by("e2", after_kill) >= 2 * IN_FLIGHT)
            going = False
            await recorder.wait(lambda: not recorder.open)

            status = await asyncio.to_thread(cluster.status)
            for name in ("e1", "e2"):
                await freed(bus, engine_endpoint(status, name))

        assert {len(ends) for ends in recorder.terminals.values()} == {1}
        assert recorder.stray == []
        # What the dead engine had begun, another finished.
        assert {id: error for id in recorder.terminals if (error := recorder.error(id)) is not None} == {}
        for id in recorder.terminals:
            assert len(recorder.tokens[id]) == TOKENS
            assert recorder.finished(id).usage.completion_tokens == TOKENS
            if id >= after_kill:
                assert recorder.finished(id).engine in ("e1", "e2")  # type: ignore[union-attr]

    with Cluster(engines=2) as cluster:
        asyncio.run(scenario(cluster))


def test_a_killed_engine_comes_back_as_a_new_epoch() -> None:
    async def scenario(cluster: Cluster) -> None:
        async with AsyncClient(cluster.router) as client:
            (before,) = (await client.status()).engines
            stream = client.stream([1, 2, 3], max_tokens=20000, ignore_eos=True)
            await anext(stream)
            cluster.engines[0].kill()
            with pytest.raises((PeerError, Unavailable)):
                async for _ in stream:
                    pass
            await asyncio.to_thread(cluster.add_engine, "e0")
            (after,) = (await client.status()).engines
            assert after.info.engine_id == before.info.engine_id == "e0"
            assert after.info.epoch > before.info.epoch
            completion = await client.generate([1, 2, 3], max_tokens=5, ignore_eos=True)
            assert len(completion.token_ids) == 5

    with Cluster(engines=1) as cluster:
        asyncio.run(scenario(cluster))


def wait_for_line(daemon: Daemon, text: str) -> None:
    """Until a process has printed `text`; for what no status can tell."""
    deadline = time.monotonic() + 30
    while text not in daemon.text():
        assert daemon.alive, daemon.tail()
        assert time.monotonic() < deadline, daemon.tail()
        time.sleep(0.02)


def test_engine_before_router_and_a_restarted_router() -> None:
    """Start order does not matter; a router killed with work in flight frees that work, and finds its engines again."""

    async def scenario(cluster: Cluster) -> None:
        async with open_bus() as bus:
            recorder = Recorder()
            await bus.dial(cluster.router, recorder)
            status = await asyncio.to_thread(cluster.status)
            endpoint = engine_endpoint(status, "e0")
            for number in range(8):
                recorder.call(number, request(number, tokens=30000))
            await recorder.wait(lambda: all(recorder.tokens[number] for number in range(8)))
            await until_running(bus, endpoint, 8)
            assert cluster.router_daemon is not None
            cluster.router_daemon.kill()
            await recorder.wait(lambda: recorder.lost_with is not None)
            await freed(bus, endpoint)
            cluster.start_router()
            again = await asyncio.to_thread(cluster.wait_ready, 1)
            assert again.epoch > status.epoch
            async with AsyncClient(cluster.router) as client:
                assert len((await client.generate([1, 2], max_tokens=5, ignore_eos=True)).token_ids) == 5

    with Cluster(engines=0, start_router=False) as cluster:
        engine = cluster.add_engine(wait=False)
        wait_for_line(engine, " ready ")
        cluster.start_router()
        cluster.wait_ready(1)
        asyncio.run(scenario(cluster))


def test_what_a_killed_engine_was_streaming_goes_on_at_another_token_for_token() -> None:
    async def scenario(cluster: Cluster) -> None:
        recorder = Recorder()
        async with open_bus() as bus:
            await bus.dial(cluster.router, recorder)
            for number in range(8):
                recorder.call(number, request(number, tokens=800))
            await recorder.wait(lambda: all(recorder.tokens[number] for number in range(8)))
            cluster.engines[0].kill()
            await recorder.wait(lambda: not recorder.open)
            assert [recorder.error(number) for number in range(8)] == [None] * 8
            assert {recorder.finished(number).engine for number in range(8)} == {"e1"}  # type: ignore[union-attr]
            usages = [recorder.finished(number).usage for number in range(8)]
            assert {(each.prompt_tokens, each.completion_tokens) for each in usages} == {(41, 800)}
            # The same, by the one that lives, in one go.
            for number in range(8):
                recorder.call(100 + number, request(number, tokens=800))
            await recorder.wait(lambda: not recorder.open)
            for number in range(8):
                assert recorder.tokens[number] == recorder.tokens[100 + number]
            await freed(bus, engine_endpoint(await asyncio.to_thread(cluster.status), "e1"))

    with Cluster(engines=2) as cluster:
        asyncio.run(scenario(cluster))


def test_a_stalled_engine_is_missed_within_seconds_and_comes_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        loop = asyncio.get_running_loop()
        async with AsyncClient(cluster.router) as client:
            stream = client.stream([1, 2, 3], max_tokens=30000, ignore_eos=True)
            await anext(stream)
            began = loop.time()
            cluster.engines[0].pause()
            with pytest.raises((PeerError, Unavailable)):
                async for _ in stream:
                    pass
            assert loop.time() - began < 8
            with pytest.raises(MicroserveError):
                await client.generate([1, 2], max_tokens=1)
            cluster.engines[0].resume()
            await asyncio.to_thread(cluster.wait_ready, 1)
            assert len((await client.generate([1, 2], max_tokens=5, ignore_eos=True)).token_ids) == 5
            async with open_bus() as bus:
                await freed(bus, engine_endpoint(await client.status(), "e0"))

    with Cluster(engines=1) as cluster:
        asyncio.run(scenario(cluster))


def test_a_drained_router_finishes_what_runs_and_refuses_what_is_new() -> None:
    async def scenario(cluster: Cluster) -> None:
        recorder = Recorder()
        async with open_bus() as bus:
            await bus.dial(cluster.router, recorder)
            for number in range(8):
                recorder.call(number, request(number, tokens=800))
            await recorder.wait(lambda: all(recorder.tokens[number] for number in range(8)))
            assert cluster.router_daemon is not None
            cluster.router_daemon.terminate()
            # Asked until the signal has been handled; each asking takes a round trip.
            probe = 100
            while True:
                recorder.call(probe, request(probe, tokens=1))
                await recorder.wait(lambda: bool(recorder.terminals[probe]))  # noqa: B023
                if isinstance(recorder.error(probe), Draining):
                    break
                probe += 1
            await recorder.wait(lambda: not recorder.open)
            for number in range(8):
                assert recorder.error(number) is None
                assert len(recorder.tokens[number]) == 800
            assert await asyncio.to_thread(cluster.router_daemon.wait) == 0

    with Cluster(engines=1) as cluster:
        asyncio.run(scenario(cluster))


def test_a_drained_engine_finishes_what_runs_and_the_other_takes_what_is_new() -> None:
    async def scenario(cluster: Cluster) -> None:
        recorder = Recorder()
        async with open_bus() as bus:
            await bus.dial(cluster.router, recorder)
            for number in range(8):
                recorder.call(number, request(number, tokens=800))
            await recorder.wait(lambda: all(recorder.tokens[number] for number in range(8)))
            cluster.engines[0].terminate()
            await asyncio.to_thread(cluster.wait_for, lambda status: state_of(status, "e0") != "ready", "e0 to drain")
            for number in range(100, 120):
                recorder.call(number, request(number))
            await recorder.wait(lambda: not recorder.open)
            assert [recorder.error(id) for id in recorder.terminals] == [None] * 28
            assert {recorder.finished(number).engine for number in range(8)} == {"e0", "e1"}  # type: ignore[union-attr]
            assert {recorder.finished(number).engine for number in range(100, 120)} == {"e1"}  # type: ignore[union-attr]
            assert await asyncio.to_thread(cluster.engines[0].wait) == 0
            gone = await asyncio.to_thread(
                cluster.wait_for, lambda status: state_of(status, "e0") is None, "e0 to have left"
            )
            assert [engine.info.engine_id for engine in gone.engines] == ["e1"]

    with Cluster(engines=2) as cluster:
        asyncio.run(scenario(cluster))
