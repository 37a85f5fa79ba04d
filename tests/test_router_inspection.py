"""What operators see of requests and of the fleet: over the bus, by the client, on a real router core."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from tests.router_support import World, read
from tests.virtual_time import run_virtual

from microserve.router import inspection
from microserve.router.bus_api import RouterApi
from microserve.router.events import EventLog
from microserve.router.strategies.prefill_decode import prefill_decode
from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import Cancelled, InvalidRequest, ModelNotFound, PeerLost
from microserve.runtime.ids import Peer
from microserve.runtime.log import get_logger
from microserve.runtime.messages import (
    CacheEvict,
    Drain,
    EngineEvent,
    Info,
    Load,
    Ok,
    PrepRecv,
    RemoteSend,
    StartGenerate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

ADDRESS = "memory://router"


def with_client(work: Callable[[World, AsyncClient], Coroutine[Any, Any, None]], *args: Any, **config: Any) -> None:
    async def main() -> None:
        async with World(*args, **config) as world:
            api = RouterApi(world.core, clock=world.network.clock)
            await world.bus.listen(ADDRESS, api.server)
            bus = world.network.bus(Peer("client", "c", 1))
            client = AsyncClient(ADDRESS, bus=bus)
            try:
                await work(world, client)
            finally:
                await client.close()
                await api.close()
                await bus.close()

    run_virtual(main())


def test_a_request_is_seen_with_its_sub_requests_while_it_runs_and_after() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        sender = await world.add("a", labels={"prefill": "1"})
        receiver = await world.add("b", labels={"decode": "1"})
        receiver.grant_always(matched=16)
        generation = world.generate(range(1, 91), request_id="q", max_tokens=2)
        await asyncio.sleep(0.5)
        [seen] = (await client.requests()).requests
        assert (seen.request_id, seen.state, seen.age, seen.prompt_tokens) == ("q", "running", 0.5, 90)
        assert (seen.engines, seen.first_token, seen.ended) == (["a", "b"], None, None)
        facts = [(sub.verb, sub.engine, sub.begin, sub.end, sub.ended, sub.outcome) for sub in seen.sub_requests]
        assert facts == [
            ("prep_recv", "b", 0, 89, 0.0, "ok"),
            ("remote_send", "a", 16, 89, None, ""),
            ("start_generate", "b", 89, 90, None, ""),
        ]
        assert seen.sub_requests[0].matched == 16
        sender.report(sender.last(RemoteSend), reused=16)
        await world.settle()
        await receiver.finish(5, 6, call=receiver.calls.index(receiver.last(StartGenerate)))
        await read(generation)
        assert (await client.requests()).requests == []
        [seen] = (await client.requests(recent=10)).recent
        assert (seen.state, seen.first_token, seen.ended, seen.output_tokens) == ("ok", 0.5, 0.5, 2)
        sent = seen.sub_requests[1]
        assert (sent.started, sent.ended, sent.outcome, sent.computed, sent.reused, sent.bytes) == (
            0.0,
            0.5,
            "ok",
            57,
            16,
            64,
        )
        assert receiver.last(PrepRecv).done

    with_client(work, prefill_decode.configure({"early_first": 0}))


def test_the_token_that_stopped_a_request_is_one_of_its_output_as_in_usage() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")
        generation = world.generate(range(1, 20), request_id="q", max_tokens=9)
        await world.settle()
        await engine.finish(5, 6, reason="stop", stop_token=2)
        await read(generation)
        assert generation.finish is not None
        [seen] = (await client.requests(recent=1)).recent
        assert seen.output_tokens == generation.finish.usage.completion_tokens == 3

    with_client(work)


def test_the_line_of_a_request_that_failed_names_engines_with_their_epochs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What other tests have logged does not count against the rate of what is logged now.
    monkeypatch.setattr(inspection, "_log", get_logger(inspection.__name__))

    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a", epoch=31), await world.add("b", epoch=47)
            generation = world.generate(request_id="q")
            await world.settle()
            await first.die()
            await world.settle()
            await second.die()
            with pytest.raises(PeerLost):
                await read(generation)

    run_virtual(main())
    [record] = [each for each in caplog.records if each.getMessage() == "request ended"]
    told = record.fields  # type: ignore[attr-defined]
    assert (told["request"], told["engines"], told["engine_epochs"]) == ("q", "a,b", "1f,2f")


def test_oldest_first_newest_past_first_and_limits() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")
        for name in ("one", "two", "three", "four"):
            world.generate(request_id=name)
            await asyncio.sleep(0.25)
        # The third waits: two run at a time.
        seen = await client.requests()
        assert [(each.request_id, each.state) for each in seen.requests] == [
            ("one", "running"),
            ("two", "running"),
            ("three", "queued"),
            ("four", "queued"),
        ]
        assert [each.request_id for each in (await client.requests(limit=3)).requests] == ["one", "two", "three"]
        assert (await client.requests(limit=3)).active == 4
        await engine.finish(1, call=0)
        await engine.finish(1, call=1)
        seen = await client.requests(recent=1)
        assert [each.request_id for each in seen.recent] == ["two"]
        seen = await client.requests(request_id="one")
        assert (seen.requests, [each.state for each in seen.recent], seen.active) == ([], ["ok"], 2)

    with_client(work, max_active=2)


def test_an_operator_ends_a_request_with_every_choice() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")
        generations = [world.generate(request_id=name) for name in ("q", "q-1", "q-x", "other")]
        await world.settle()
        assert await client.abort("q") == "freed"
        for generation in generations[:2]:
            with pytest.raises(Cancelled, match="ended by an operator"):
                await read(generation)
        await world.settle()
        assert len(engine.open) == 2
        assert await client.abort("q") == "unknown"
        assert [each.request_id for each in (await client.requests()).requests] == ["q-x", "other"]
        [event] = [each for each in (await client.events()).events if each.kind == "aborted"]
        assert event.detail == "q, by an operator"
        for generation in generations[2:]:
            generation.cancel()

    with_client(work)


def test_events_of_the_fleet() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a", events_endpoint="memory://a-events")
        await world.settle()
        publisher = await engine.bus.publisher("memory://a-events")
        for seq, (kind, detail) in enumerate(
            (("load", ""), ("lease_expired", "lease 5"), ("quarantined", "3 pages")), start=1
        ):
            publisher.publish(EngineEvent(engine_id="a", epoch=1, seq=seq, kind=kind, load=Load(), detail=detail))
        # Of another incarnation: not ours to tell.
        publisher.publish(EngineEvent(engine_id="a", epoch=9, seq=9, kind="state", load=Load()))
        await world.settle()
        with pytest.raises(ModelNotFound):
            world.generate(model="x")
        await client.set_strategy("prefill_decode")
        world.core.leave("a", 1)
        await world.settle()
        seen = await client.events()
        told = [(each.seq, each.kind, each.engine, each.epoch) for each in seen.events]
        assert told == [
            (1, "joined", "a", 1),
            (2, "connected", "a", 1),
            (3, "lease_expired", "a", 1),
            (4, "quarantined", "a", 1),
            (5, "refused", "", 0),
            (6, "strategy", "", 0),
            (7, "left", "a", 1),
        ]
        assert [each.detail for each in seen.events[2:5]] == ["lease 5", "3 pages", "model_not_found"]
        assert seen.last == 7
        assert [each.seq for each in (await client.events(after=5)).events] == [6, 7]
        assert [each.seq for each in (await client.events(after=0, limit=2)).events] == [6, 7]
        publisher.close()

    with_client(work)


def test_a_lost_session_is_an_event() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")
        await engine.die()
        # A session is lost when its heartbeats stay out.
        await asyncio.sleep(4.0)
        kinds = [each.kind for each in (await client.events()).events]
        assert kinds[:3] == ["joined", "connected", "lost"]

    with_client(work)


def test_what_operators_do_to_engines_is_an_event_with_the_name_of_their_key() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            engine.answers[Drain] = engine.answers[CacheEvict] = lambda call: call.reply(Ok())
            other = await world.add("b")
            other.answers[Drain] = lambda call: call.reply(Ok())
            for name, body, who in (
                ("a", Drain(), "ann"),
                ("b", Drain(), "ann"),
                ("a", CacheEvict(), ""),
                ("a", Info(), "ann"),
            ):
                world.core.engine_call(name, body, by=who)
            await world.settle()
            told = [(each.engine, each.epoch, each.detail) for each in world.core.events.after(0, 100).events[-3:]]
            assert told == [
                ("a", 1, "drain, by ann"),
                ("b", 1, "drain, by ann"),
                ("a", 1, "evict from the cache, by an operator"),
            ]
            generation = world.generate(request_id="q")
            assert world.core.abort("q", by="ann") == "freed"
            assert generation.error is not None
            assert world.core.events.after(0, 100).events[-1].detail == "q, by ann"
            await world.core.versions.set("cache_aware", {}, by="ann", share=0.25)
            assert re.sub("@[0-9a-f]+", "", world.core.status().strategy) == "data_parallel 75%, cache_aware 25%"
            world.core.versions.roll_back(by="root")
            reasons = [each.reason.partition(", by ")[2] for each in (await world.core.strategies()).history[:2]]
            assert reasons == ["root", "ann"]

    run_virtual(main())


def test_whoever_is_refused_is_an_event() -> None:
    async def main() -> None:
        async with World(engine_silence=4.0) as world:
            world.core.start()
            world.bus.counters.unauthorized += 3
            world.core.http_refused("wrong key")
            world.core.http_refused("wrong key")
            await asyncio.sleep(1.5)
            world.bus.counters.unauthorized += 1
            await asyncio.sleep(1.5)
            told = [each.detail for each in world.core.events.after(0, 100).events if each.kind == "refused"]
            assert told == [
                "wrong key, over HTTP",
                "3 without a key that is let in, by the bus",
                "1 without a key that is let in, by the bus",
            ]
            assert world.metric("unauthorized_total", reason="wrong key") == 2.0

    run_virtual(main())


def test_a_flood_is_one_event_and_is_counted() -> None:
    now = 0.0
    log = EventLog(now=lambda: 100.0 + now, clock=lambda: now, most=3)
    for _ in range(1000):
        log.add("refused", detail="busy", every=5.0)
    log.add("refused", detail="draining", every=5.0)
    now = 5.0
    log.add("refused", detail="busy", every=5.0)
    assert [(each.seq, each.at, each.detail) for each in log.after(0, 100).events] == [
        (1, 100.0, "busy"),
        (2, 100.0, "draining"),
        (3, 105.0, "busy (and 999 more before)"),
    ]
    assert log.counts == {"refused": 1002}
    log.add("joined", engine="a")
    assert [each.seq for each in log.after(0, 100).events] == [2, 3, 4]
    assert (log.after(4, 100).events, log.after(99, 100).events) == ([], [])


def test_limits_are_checked_where_they_arrive() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match="Expected `int` <= 256"):
            await client.requests(recent=257)
        with pytest.raises(InvalidRequest, match="Expected `int` >= 1"):
            await client.events(limit=0)
        assert (await client.events()).events == []

    with_client(work)
