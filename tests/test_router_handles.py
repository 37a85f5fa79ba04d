"""What a strategy is given: sub-requests run at once, may be left alone, and are the dispatcher's on every way out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from tests.router_support import ScriptedEngine, World, ids_of, read
from tests.virtual_time import run_virtual

from microserve.router.dispatch import AFTERWARDS_SECONDS
from microserve.router.pending import uncovered
from microserve.router.strategy import Chunk, Engine, Fleet, Request, strategy
from microserve.router.sub_requests import MOST_RECORDS
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseNotFound,
    MicroserveError,
    NoEngine,
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
    from collections.abc import AsyncIterator

    from microserve.router.dispatch import Generation

PROMPT = list(range(50))
"""Three whole pages and two tokens."""

Check = Callable[[World, ScriptedEngine, ScriptedEngine, ScriptedEngine], Awaitable[None]]


@strategy
async def two(request: Request, fleet: Fleet, *, end: int = -1, wait: bool = False) -> AsyncIterator[Chunk]:
    """Prefill on p, decode on d."""
    decode, prefill = fleet.pick("decode"), fleet.pick("prefill")
    kv = await decode.prep_recv(end=end)
    sending = prefill.remote_send(kv)
    if wait:
        await sending
    async for chunk in decode.start_generate(kv, watch=sending):
        yield chunk


def run(check: Check, function: Any = two, /, **settings: Any) -> None:
    """A world of d, p and q (which prefills, too), and nothing left in it afterwards."""
    program = (function if not callable(function) else strategy(function)).configure(settings)

    async def main() -> None:
        async with World(program) as world:
            d = await world.add("d", labels={"decode": "yes"})
            p = await world.add("p", labels={"prefill": "yes"})
            q = await world.add("q", labels={"second": "yes"})
            d.grant_always()
            await check(world, d, p, q)
            await world.settle()
            world.check_clean()

    run_virtual(main())


async def start(world: World, **changes: Any) -> Generation:
    generation = world.generate(PROMPT, **changes)
    await world.settle()
    return generation


# --- the way that it should go -------------------------------------------------------------------------------------


def test_a_send_and_a_generation_run_side_by_side() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=5)
        assert world.log == ["d prep_recv end=-1", "p remote_send d 0 49", "d start_generate 49 lease=401"]
        prepared, sent, started = d.calls[0].body, p.calls[0].body, d.started()
        assert isinstance(prepared, PrepRecv)
        assert isinstance(sent, RemoteSend)
        assert {prepared.request_id, sent.request_id, started.request_id} == {"q"}
        assert len({prepared.sub_id, sent.sub_id, started.sub_id}) == 3
        assert prepared.prompt == sent.prompt == started.prompt
        assert prepared.expect_tokens == 5
        p.report(p.calls[0])
        await d.finish(1, 2, received=49)
        assert ids_of(await read(generation)) == [1, 2]
        assert generation.engine_ids == ("d",)
        assert [(each.verb, each.engine, each.outcome) for each in generation.sub_requests] == [
            ("prep_recv", "d", "ok"),
            ("remote_send", "p", "ok"),
            ("start_generate", "d", "ok"),
        ]
        assert [(each.begin, each.end, each.computed) for each in generation.sub_requests] == [
            (0, 49, 0),
            (0, 49, 49),
            (49, 50, 1),
        ]
        # Nothing was left to give back.
        assert len(world.log) == 3

    run(check)


def test_waits_are_bounded_by_the_requests_time() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, timeout=8.0, max_tokens=50)
        prepared = d.calls[0].body
        assert isinstance(prepared, PrepRecv)
        assert (prepared.admit_by, prepared.expect_tokens) == (4.0, 50)
        assert d.started().kv_wait == 4.0
        assert [call.deadline for call in (d.calls[1], p.calls[0])] == [world.network.clock() + 8.0] * 2
        generation.cancel()
        generation = await start(world, timeout=300.0)
        # The engine's own setting is shorter than half of that.
        assert d.started().kv_wait is None
        generation.cancel()

    run(check)


def test_what_is_asked_for_counts() -> None:
    async def asking(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        kv = await decode.prep_recv(end=32, expect_tokens=7, wait=1.5)
        await fleet.pick("prefill").remote_send(kv, begin=16, end=-18)
        async for chunk in decode.start_generate(kv, begin=16, kv_wait=0.25):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        p.answers[RemoteSend] = p.report
        generation = await start(world)
        assert world.log == ["d prep_recv end=32", "p remote_send d 16 32", "d start_generate 16 lease=401"]
        prepared = d.calls[0].body
        assert isinstance(prepared, PrepRecv)
        assert (prepared.expect_tokens, prepared.admit_by, d.started().kv_wait) == (7, 1.5, 0.25)
        generation.cancel()

    run(check, asking)


@pytest.mark.parametrize(("matched", "end"), [(48, 48), (48, 32), (0, 0)])
def test_an_empty_range_is_sent_by_nobody(matched: int, end: int) -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        d.matched = matched
        generation = await start(world)
        assert p.calls == []
        assert world.charges()["p"] == (0, 0)
        assert d.started().begin == end
        await d.finish(1, cached=matched)
        (chunk,) = await read(generation)
        assert chunk.finish is not None
        assert chunk.finish.usage.cached_tokens == matched

    run(check, two, end=end, wait=True)


def test_sub_requests_may_be_awaited_late_often_or_never() -> None:
    got: list[object] = []

    async def lazy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode, prefill = fleet.pick("decode"), fleet.pick("prefill")
        preparing = decode.prep_recv()
        decode.cache_match()
        match = prefill.cache_match([1, 2])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(preparing, 1.0)
        kv, again = await asyncio.gather(preparing, preparing)
        got.append(kv is again)
        sending = prefill.remote_send(kv)
        got.append((sending.done, sending.failed))
        reports = await asyncio.gather(sending, sending)
        got.append((sending.done, sending.failed, reports[0] is reports[1], await sending is reports[0]))
        got.append((await match, kv.engine, kv.address.lease, kv.missing))
        async for chunk in decode.start_generate(kv):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        d.answers[CacheMatch] = lambda call: call.reply(CacheMatched(tokens=0))
        p.answers[CacheMatch] = lambda call: call.reply(CacheMatched(tokens=2))
        p.answers[RemoteSend] = p.report
        del d.answers[PrepRecv]
        generation = await start(world)
        await asyncio.sleep(2.0)
        d.grant(d.last(PrepRecv))
        await world.settle()
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]
        assert got == [True, (False, False), (True, False, True, True), (2, "d", 402, 50)]

    run(check, lazy)


# --- charges ---------------------------------------------------------------------------------------------------------


def test_each_engine_is_charged_with_what_it_computes() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        del d.answers[PrepRecv]
        generation = await start(world)
        # Others send 32 of the 50 tokens.
        assert world.charges() == {"d": (1, 18), "p": (1, 50), "q": (0, 0)}
        d.grant(d.calls[0])
        await world.settle()
        assert world.charges() == {"d": (1, 18), "p": (1, 32), "q": (0, 0)}
        p.report(p.calls[0])
        await world.settle()
        assert world.charges() == {"d": (1, 18), "p": (0, 0), "q": (0, 0)}
        await d.tokens(1)
        assert world.charges() == {"d": (1, 0), "p": (0, 0), "q": (0, 0)}
        await d.finish(2)
        await read(generation)
        # The next one with that prompt finds it: on d all of it, on p the first two pages.
        generation = await start(world)
        assert world.charges() == {"d": (1, 2), "p": (1, 18), "q": (0, 0)}
        d.grant(d.last(PrepRecv))
        await world.settle()
        assert world.charges() == {"d": (1, 18), "p": (1, 0), "q": (0, 0)}
        generation.cancel()

    run(check, two, end=32)


def test_the_work_of_an_engine_is_that_of_others() -> None:
    seen: list[float] = []

    async def looking(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        seen.extend((decode.work, fleet.engine("d").work, fleet.engine("p").work))
        async for chunk in decode.start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        first = await start(world)
        second = await start(world)
        assert seen == [0, 50 + 64, 0, 50 + 64, 2 * (50 + 64), 0]
        first.cancel()
        second.cancel()

    run(check, looking)


# --- picking ---------------------------------------------------------------------------------------------------------


def test_picking_prefers_and_never_insists() -> None:
    seen: list[str] = []

    async def choosy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        seen.append(fleet.pick("prefill").id)
        seen.append(fleet.pick("prefill", exclude=["p"]).id)
        seen.append(fleet.pick(exclude=["d", "p", "q"], label="decode").id)
        assert fleet.engines == ["d", "p", "q"]
        assert fleet.engine("q").labels == {"second": "yes"}
        assert [fleet.engine("q").carries(label) for label in ("second", "second=yes", "second=no", "x")] == [
            True,
            True,
            False,
            False,
        ]
        with pytest.raises(NoEngine, match="engine 'z' cannot serve 'm' now"):
            fleet.engine("z")
        async for chunk in fleet.engine("q").start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        assert seen[0] == "p"
        assert seen[1] in "dq"
        assert seen[2] == "d"
        assert generation.engine_ids == ("q",)
        generation.cancel()

    run(check, choosy)


def test_a_cached_prefix_is_weighed_against_work() -> None:
    seen: list[tuple[str, int]] = []

    async def aware(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        engine = fleet.pick(prefix=True)
        seen.append((engine.id, engine.matched))
        async for chunk in engine.start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = world.generate(list(range(90)))
        await world.settle()
        await world.engines[seen[0][0]].finish(1)
        await read(generation)
        # 80 cached tokens outweigh one request (64 tokens, and 10 of its prompt), and not two.
        generations = []
        for _ in range(3):
            generations.append(world.generate(list(range(90))))
            await world.settle()
        first = seen[0][0]
        assert seen[1:3] == [(first, 80), (first, 80)]
        assert seen[3][0] != first
        assert seen[3][1] == 0
        for generation in generations:
            generation.cancel()

    run(check, aware)


def test_a_restarted_engine_has_nothing_cached() -> None:
    seen: list[dict[str, int]] = []

    async def asking(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        seen.append({name: fleet.engine(name).matched for name in fleet.engines})
        async for chunk in fleet.pick("decode").start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        for _ in range(2):
            generation = await start(world)
            await world.engines["d"].finish(1)
            await read(generation)
        await world.add("d", epoch=2, labels={"decode": "yes"})
        assert world.core.fleet.prefixes._bits == {}
        (await start(world)).cancel()
        assert seen == [{"d": 0, "p": 0, "q": 0}, {"d": 48, "p": 0, "q": 0}, {"p": 0, "q": 0, "d": 0}]
        await d.bus.close()

    run(check, asking)


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


# --- wrong programs --------------------------------------------------------------------------------------------------


def wrong(act: Callable[[Fleet], Awaitable[None]], match: str) -> None:
    async def program(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        await act(fleet)
        yield Chunk([])

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        with pytest.raises((InvalidRequest, InternalError), match=match):
            await read(await start(world))

    run(check, program)


def test_kv_of_another_engine_cannot_be_used() -> None:
    async def generate(fleet: Fleet) -> None:
        kv = await fleet.engine("d").prep_recv()
        fleet.engine("q").start_generate(kv)

    async def commit(fleet: Fleet) -> None:
        kv = await fleet.engine("d").prep_recv()
        await fleet.engine("q").commit(kv)

    for act in (generate, commit):
        wrong(act, "the KV is prepared on engine d, not on q")


def test_a_kv_of_the_users_making_is_refused() -> None:
    async def act(fleet: Fleet) -> None:
        engine: Any = fleet.engine("d")
        engine.remote_send("kv")

    wrong(act, "str is not what prep_recv gives")


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


def test_work_after_the_last_chunk_is_bounded() -> None:
    async def tidy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        async for chunk in decode.start_generate():
            yield chunk
        await fleet.engine("q").prep_recv()
        await asyncio.sleep(1000)

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        generation = await start(world)
        await d.finish(1)
        assert ids_of(await read(generation)) == [1]
        await world.settle()
        began = asyncio.get_running_loop().time()
        assert world.charges() == {"d": (0, 0), "p": (0, 0), "q": (0, 0)}
        await world.core.wait_idle()
        assert asyncio.get_running_loop().time() - began == pytest.approx(AFTERWARDS_SECONDS)
        assert generation.error is None
        await world.settle()
        assert [line for line in world.log if line.startswith("q release")] == ["q release lease=1701"]

    run(check, tidy)


# --- what was cached -------------------------------------------------------------------------------------------------


def test_cached_is_what_nobody_computed() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        d.matched = 16
        generation = await start(world)
        p.report(p.calls[0], reused=16)
        await world.settle()
        d.calls[1].part(Tokens(ids=b"\x01\0\0\0", cached=16))
        await world.settle()
        # Known before the end, for a reader that stops early.
        assert generation.cached_tokens == 32
        await d.finish(2, cached=16, received=33)
        chunks = await read(generation)
        assert chunks[-1].finish is not None
        assert chunks[-1].finish.usage.cached_tokens == generation.cached_tokens == 32

    run(check)


def test_what_was_computed_for_us_and_moved_here_is_not_cached() -> None:
    async def moved(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode, prefill = fleet.pick("decode"), fleet.pick("prefill")
        kv = await decode.prep_recv(end=48)
        await prefill.remote_send(kv)
        assert await decode.commit(kv) == 48
        async for chunk in decode.start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        p.answers[RemoteSend] = lambda call: p.report(call, reused=16)
        d.answers[Commit] = lambda call: d.settle_commit(call, 48)
        generation = await start(world)
        await d.finish(1, cached=48)
        (chunk,) = await read(generation)
        assert chunk.finish is not None
        assert chunk.finish.usage.cached_tokens == 16

    run(check, moved)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_only_so_many_sub_requests_are_remembered() -> None:
    async def busy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        engine: Engine = fleet.pick("decode")
        for _ in range(MOST_RECORDS + 10):
            await engine.cache_match()
        async for chunk in engine.start_generate():
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        d.answers[CacheMatch] = lambda call: call.reply(CacheMatched(tokens=0))
        generation = await start(world)
        await d.finish(1)
        await read(generation)
        assert len(generation.sub_requests) == MOST_RECORDS

    run(check, busy)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], [(0, 10)]),
        ([(0, 10)], []),
        ([(3, 5)], [(0, 3), (5, 10)]),
        ([(5, 20), (0, 2)], [(2, 5)]),
        ([(2, 4), (3, 8), (9, 9)], [(0, 2), (8, 9), (9, 10)]),
        ([(12, 20)], [(0, 10)]),
    ],
)
def test_uncovered(ranges: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert uncovered(0, 10, ranges) == expected
