"""Sub-requests that fail, and choices that end early: others make up for it, and everything is given back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.router_support import ScriptedEngine, World, ids_of, read
from tests.strategy_rig import PROMPT, run, start, two

from microserve.router.strategy import Chunk, Fleet, Request
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LeaseNotFound,
    MicroserveError,
    PeerLost,
    StaleEpoch,
    TransferFailed,
)
from microserve.runtime.messages import (
    CacheMatch,
    CacheMatched,
    Commit,
    Ok,
    PrepRecv,
    RemoteSend,
    StartGenerate,
    Tokens,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Busy("full"), TransferFailed("torn"), PeerLost("no way to d"), LeaseNotFound("?")])
def test_a_send_that_fails_is_forgone_and_nobody_else_is_troubled(error: MicroserveError) -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.fail(error)
        assert world.log[3:] == ["d forgo lease=401 0 49"]
        assert world.charges()["p"] == (0, 0)
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]
        assert [each.outcome for each in generation.sub_requests] == ["ok", error.code, "ok"]

    run(check)


def test_a_prefill_engine_that_dies_is_forgone() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.die()
        assert world.log[3:] == ["d forgo lease=401 0 49"]
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]

    run(check)


def test_a_prefill_engine_that_is_gone_already_is_forgone() -> None:
    async def late(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode, prefill = fleet.pick("decode"), fleet.pick("prefill")
        kv = await decode.prep_recv(end=-1)
        await asyncio.sleep(1.0)
        sending = prefill.remote_send(kv)
        assert sending.failed
        async for chunk in decode.start_generate(kv):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.die()
        await asyncio.sleep(1.5)
        await world.settle()
        assert world.log == ["d prep_recv end=-1", "d forgo lease=401 0 49", "d start_generate 49 lease=401"]
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]

    run(check, late)


def test_what_another_sending_still_promises_is_not_forgone() -> None:
    async def hedged(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        kv = await decode.prep_recv(end=48)
        fleet.engine("p").remote_send(kv)
        fleet.engine("q").remote_send(kv, begin=16, end=32)
        async for chunk in decode.start_generate(kv):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.fail(TransferFailed("torn"))
        assert world.log[4:] == ["d forgo lease=401 0 16", "d forgo lease=401 32 48"]
        await q.fail(Conflict("somebody was first"))
        assert world.log[6:] == ["d forgo lease=401 16 32"]
        await d.finish(1)
        await read(generation)

    run(check, hedged)


def test_a_range_that_stands_at_no_page_is_forgone_in_pages() -> None:
    async def careless(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        kv = await decode.prep_recv(end=-1)
        fleet.engine("p").remote_send(kv, begin=20, end=60)
        async for chunk in decode.start_generate(kv):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.fail(InvalidRequest("begin is not at a page", param="begin"))
        assert world.log[-1] == "d forgo lease=401 16 49"
        generation.cancel()

    run(check, careless)


def test_a_sending_that_is_cancelled_is_forgone() -> None:
    async def impatient(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        kv = await decode.prep_recv(end=-1)
        sending = fleet.engine("p").remote_send(kv)
        sending.cancel()
        sending.cancel()
        with pytest.raises(Cancelled):
            await sending
        async for chunk in decode.start_generate(kv):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        assert sorted(world.log[1:]) == sorted(
            ["p remote_send d 0 49", "p cancel remote_send", "d forgo lease=401 0 49", "d start_generate 49 lease=401"]
        )
        await d.finish(1)
        await read(generation)

    run(check, impatient)


@pytest.mark.parametrize("error", [TransferFailed("torn"), StaleEpoch("restarted"), LeaseNotFound("expired")])
def test_a_program_that_waits_for_its_sending_runs_again(error: MicroserveError) -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.fail(error)
        assert world.log[2:] == [
            "d forgo lease=401 0 49",
            "d release lease=401",
            "d prep_recv end=-1",
            "p remote_send d 0 49",
        ]
        p.report(p.calls[-1])
        await world.settle()
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]

    run(check, two, wait=True)


def test_a_prefill_engine_that_is_busy_is_avoided() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.fail(Busy("full"))
        (other,) = [each for each in (d, q) if each.open]
        assert len(p.calls) == 1
        other.report(other.last(RemoteSend))
        await world.settle()
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]

    run(check, two, wait=True)


def test_a_sender_that_says_that_its_peer_is_lost_is_not_to_blame() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        await p.fail(PeerLost("no way to d"))
        assert world.log[-1] == "p remote_send d 0 49"
        generation.cancel()

    run(check, two, wait=True)


def test_an_engine_that_refuses_to_prepare_is_avoided() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        p.grant_always()
        q.grant_always()
        d.answers[PrepRecv] = lambda call: call.fail(Busy("no room", retry_after=1.0))
        generation = await start(world)
        assert len(d.calls) == 1
        (other,) = [each for each in (p, q) if each.leases]
        await other.finish(1)
        assert ids_of(await read(generation)) == [1]
        assert generation.engine_ids == (other.info.engine_id,)

    run(check)


def test_a_decode_engine_that_dies_while_it_waits_is_replaced() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        p.grant_always()
        generation = await start(world)
        await d.die()
        replaced = next(each for each in (p, q) if any(isinstance(call.body, StartGenerate) for call in each.open))
        assert "p cancel remote_send" in world.log
        await replaced.finish(3)
        assert ids_of(await read(generation)) == [3]

    run(check)


@pytest.mark.parametrize("kind", [PrepRecv, RemoteSend, Commit, CacheMatch, StartGenerate])
def test_an_engine_that_answers_with_something_else(kind: type) -> None:
    async def all_verbs(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode, other = fleet.pick("decode"), fleet.engine("q")
        await decode.cache_match()
        kv = await decode.prep_recv()
        sending = fleet.pick("prefill").remote_send(kv)
        unused = await other.prep_recv(prompt=[1, 2, 3])
        await other.commit(unused)
        await sending
        async for chunk in decode.start_generate(kv):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        d.answers[CacheMatch] = lambda call: call.reply(CacheMatched(tokens=0))
        p.answers[RemoteSend] = p.report
        q.answers[Commit] = lambda call: q.settle_commit(call, 0)
        for engine in (d, p, q):
            if kind in engine.answers or kind is StartGenerate:
                engine.answers[kind] = lambda call: call.reply(Ok())
        generation = await start(world)
        with pytest.raises(MicroserveError, match="Ok") as caught:
            await read(generation)
        assert caught.value.code == "protocol_error"

    run(check, all_verbs)


# --- ways out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(7))
@pytest.mark.parametrize("way", ["cancel", "expire", "suffice"])
def test_at_every_stage_everything_is_given_back(stage: int, way: str) -> None:
    """A program of every verb; it is left at each place where it waits."""

    async def everything(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode, prefill, other = fleet.pick("decode"), fleet.pick("prefill"), fleet.engine("q")
        kv = await decode.prep_recv(end=-1)
        sending = prefill.remote_send(kv)
        match = decode.cache_match()
        unused = await other.prep_recv(prompt=list(range(100, 140)), wait=5.0)
        decode.remote_send(unused)
        await other.commit(unused)
        await sending
        await match
        async for chunk in decode.start_generate(kv, watch=[sending]):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        del d.answers[PrepRecv]
        generation = await start(world, timeout=20.0)
        steps: list[Callable[[], object]] = [
            lambda: d.grant(d.last(PrepRecv)),
            lambda: q.grant(q.last(PrepRecv)),
            lambda: q.settle_commit(q.last(Commit), 32),
            lambda: p.report(p.last(RemoteSend)),
            lambda: d.last(CacheMatch).reply(CacheMatched(tokens=0)),
            lambda: d.last(StartGenerate).part(Tokens(ids=b"\x01\0\0\0")),
        ]
        for step in steps[:stage]:
            step()
            await world.settle()
        before = len(world.log)
        if way == "cancel":
            generation.cancel()
        elif way == "suffice":
            generation.suffice()
        else:
            await asyncio.sleep(20.0)
        assert set(world.charges().values()) == {(0, 0)}
        await world.settle()
        if stage == 6:
            d.leases.clear()
        told = world.log[before:]
        # (The time of a call may be over an instant before that of the choice.)
        assert way == "expire" or not any(" forgo " in line for line in told)
        # Calls first, so that nothing is written into what is released.
        assert told == sorted(told, key=lambda line: " release " in line)
        assert all(each.outcome for each in generation.sub_requests)
        world.check_clean()

    run(check, everything)


def test_a_lease_that_is_granted_too_late_is_given_back() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        del d.answers[PrepRecv]
        generation = await start(world)
        # Both are on their way at the same time, in opposite directions.
        d.grant(d.calls[0])
        generation.cancel()
        await world.settle()
        assert world.log[1:] == ["d abort", "d release lease=401"]

    run(check)


def test_a_preparation_that_nobody_wants_is_ended_at_the_engine() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        del d.answers[PrepRecv]
        generation = await start(world)
        generation.cancel()
        await world.settle()
        assert world.log[1:] == ["d abort"]
        assert d.open == []
        (record,) = generation.sub_requests
        assert (record.verb, record.outcome) == ("prep_recv", "cancelled")

    run(check)


def test_a_lease_of_a_dead_engine_is_not_asked_for() -> None:
    async def waiting(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        kv = await fleet.pick("decode").prep_recv()
        await asyncio.sleep(100)
        assert kv.missing
        yield Chunk([])

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, timeout=10.0)
        await d.die()
        with pytest.raises(DeadlineExceeded):
            await read(generation)

    run(check, waiting)


def test_a_lease_may_be_given_back_early() -> None:
    async def careful(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        kv = await decode.prep_recv()
        decode.release(kv)
        decode.release(kv)
        async for chunk in decode.start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world)
        assert world.log == ["d prep_recv end=None", "d release lease=401", "d start_generate 0"]
        await d.finish(1)
        await read(generation)
        assert len(world.log) == 3

    run(check, careful)


def test_who_holds_a_lease_does_not_wait_for_another() -> None:
    async def greedy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        first = fleet.engine("d").prep_recv()
        second = fleet.engine("q").prep_recv()
        await asyncio.gather(first, second)
        fleet.engine("q").release(await second)
        fleet.engine("d").release(await first)
        await fleet.engine("p").prep_recv()
        yield Chunk([])

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        generation = await start(world, timeout=10.0)
        bodies = [engine.calls[0].body for engine in (d, q, p)]
        waits = [body.admit_by for body in bodies if isinstance(body, PrepRecv)]
        assert waits == [5.0, None, 5.0]
        generation.cancel()

    run(check, greedy)


@pytest.mark.parametrize(("timeout", "lasts"), [(None, 10.0), (4.0, 4.0)])
def test_work_after_the_last_chunk_is_bounded(timeout: float | None, lasts: float) -> None:
    """By ten seconds, and by the request's own time."""

    async def tidy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        async for chunk in decode.start_generate():
            yield chunk
        await fleet.engine("q").prep_recv()
        await asyncio.sleep(1000)

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        generation = await start(world, timeout=timeout)
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]
        await world.settle()
        began = asyncio.get_running_loop().time()
        assert world.charges() == {"d": (0, 0), "p": (0, 0), "q": (0, 0)}
        await world.core.wait_idle()
        assert asyncio.get_running_loop().time() - began == pytest.approx(lasts)
        assert generation.error is None
        await world.settle()
        assert [line for line in world.log if line.startswith("q release")] == ["q release lease=1701"]

    run(check, tidy)


def test_a_program_that_runs_again_is_the_one_that_began() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        version = generation.strategy_version
        await world.core.versions.set("data_parallel", {})
        p.grant_always()
        q.grant_always()
        await d.die()
        assert [line.split(" lease")[0] for line in world.log if "prep_recv" in line][1:] != []
        assert generation.strategy_version == version
        other = world.generate(PROMPT)
        await world.settle()
        assert other.strategy_version.startswith("data_parallel@")
        assert [record.verb for record in other.sub_requests] == ["start_generate"]
        generation.cancel()
        other.cancel()

    run(check)
