"""What a strategy is given: sub-requests run at once, may be left alone, and are charged to whom they keep busy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.router_support import ScriptedEngine, World, ids_of, read
from tests.strategy_rig import run, start, two

from microserve.router.pending import uncovered
from microserve.router.strategy import Chunk, Engine, Fleet, Request
from microserve.router.sub_requests import MOST_RECORDS
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import (
    InternalError,
    NoEngine,
)
from microserve.runtime.messages import (
    CacheMatch,
    CacheMatched,
    Commit,
    PrepRecv,
    RemoteSend,
    StartGenerate,
    Tokens,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


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


def test_what_senders_computed_is_not_cached_when_a_request_is_cut_short() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=5)
        p.report(p.calls[0], reused=16)
        d.last(StartGenerate).part(Tokens(ids=pack_tokens([10]), cached=0))
        await world.settle()
        assert generation.cached_tokens == 16
        generation.cancel()
        await world.settle()
        assert generation.cached_tokens == 16

    run(check)


# --- a generation in two parts -------------------------------------------------------------------------------------


async def in_two_parts(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Two tokens of one engine, the rest of another."""
    output: list[int] = []
    async for chunk in fleet.pick("prefill").start_generate(max_tokens=2):
        output += chunk.tokens
        yield chunk
        if chunk.finish is not None:
            return
    async for chunk in fleet.pick("decode").start_generate(after=output):
        yield chunk


def test_a_generation_goes_on_elsewhere_after_the_tokens_it_was_limited_to() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=5)
        assert p.started().sampling.max_tokens == 2
        await p.finish(7, 8, cached=16)
        last = d.started()
        assert (last.sampling.max_tokens, last.prior_output) == (5, 2)
        assert unpack_tokens(last.prompt)[-2:].tolist() == [7, 8]
        assert generation.cached_tokens == 16
        await d.finish(9, cached=48)
        chunks = await read(generation)
        assert ids_of(chunks) == [7, 8, 9]
        assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        # What the second engine had cached may have been computed for this request.
        assert generation.cached_tokens == 16
        assert generation.engine_ids == ("p", "d")
        assert [(each.begin, each.end, each.computed) for each in generation.sub_requests] == [(0, 50, 34), (0, 52, 6)]

    run(check, in_two_parts)


@pytest.mark.parametrize(("reason", "limit"), [("stop", 5), ("length", 2), ("length", 1)])
def test_a_request_that_ends_within_its_first_part_is_over(reason: str, limit: int) -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=limit)
        assert p.started().sampling.max_tokens == min(2, limit)
        await p.finish(7, reason=reason)
        chunks = await read(generation)
        assert chunks[-1].finish is not None
        assert chunks[-1].finish.finish_reason == reason
        assert d.calls == []

    run(check, in_two_parts)


def test_a_limit_counts_from_what_was_delivered_before_an_engine_was_lost() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=9)
        await p.finish(7, 8, cached=16)
        await d.tokens(9)
        await d.die()
        await world.settle()
        again = (p.started(), p.started().prior_output, p.started().sampling.max_tokens)
        assert again[1:] == (3, 5)
        await p.finish(10, 11, cached=48)
        assert q.started().prior_output == 5
        await q.finish(12, cached=0)
        assert ids_of(await read(generation)) == [7, 8, 9, 10, 11, 12]
        assert generation.cached_tokens == 16

    run(check, in_two_parts)


def test_a_part_is_not_asked_for_more_tokens_at_least_than_at_most() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=9, min_tokens=4)
        asked = p.started().sampling
        assert (asked.min_tokens, asked.max_tokens) == (2, 2)
        await p.finish(7, 8)
        asked = d.started().sampling
        assert (asked.min_tokens, asked.max_tokens) == (4, 9)
        await d.finish(9)
        assert ids_of(await read(generation)) == [7, 8, 9]

    run(check, in_two_parts)


def test_an_engine_that_has_no_more_room_ends_the_request_and_not_its_part() -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, max_tokens=9)
        await p.finish(7, reason="length")
        chunks = await read(generation)
        assert (ids_of(chunks), chunks[-1].finish is not None, d.calls) == ([7], True, [])

    run(check, in_two_parts)


def test_a_limit_below_one_token_is_the_programs_mistake() -> None:
    async def none(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        async for chunk in fleet.pick().start_generate(max_tokens=0):
            yield chunk

    async def check(world: World, _d: ScriptedEngine, _p: ScriptedEngine, _q: ScriptedEngine) -> None:
        with pytest.raises(
            InternalError, match=r"at test_router_handles\.py:\d+: ValueError: max_tokens is 0, and at least 1"
        ):
            await read(await start(world))

    run(check, none)


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


# --- wrong programs --------------------------------------------------------------------------------------------------


def wrong(act: Callable[[Fleet], Awaitable[None]], match: str) -> None:
    async def program(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        await act(fleet)
        yield Chunk([])

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        q.grant_always()
        with pytest.raises(InternalError, match=match):
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


@pytest.mark.parametrize("told", [True, False])
def test_a_generation_that_ends_before_its_senders_have_told_waits_for_that(told: bool) -> None:
    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, _q: ScriptedEngine) -> None:
        d.matched = 16
        generation = await start(world)
        d.calls[1].part(Tokens(ids=pack_tokens([1]), cached=16))
        await d.finish(2, cached=16, received=33)
        chunks: list[Chunk] = []

        async def follow() -> None:
            async for chunk in generation:
                chunks.append(chunk)

        reading = asyncio.create_task(follow())
        await asyncio.sleep(0.2)
        # Tokens do not wait.
        assert [token for chunk in chunks for token in chunk.tokens] == [1, 2]
        assert not reading.done()
        if told:
            p.report(p.calls[0], reused=16)
            await world.settle()
        else:
            await asyncio.sleep(0.1)
        assert reading.done()
        assert chunks[-1].finish is not None
        assert chunks[-1].finish.usage.cached_tokens == (32 if told else 49)

    run(check)


@pytest.mark.parametrize("why", ["another has told", "recomputed", "nothing came", "behind the beginning"])
def test_a_generation_waits_for_no_report_that_it_did_not_need(why: str) -> None:
    async def sending(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        decode, prefill = fleet.pick("decode"), fleet.pick("prefill")
        kv = await decode.prep_recv()
        prefill.remote_send(kv, end=48)
        if why == "another has told":
            await fleet.pick("prefill").remote_send(kv, end=48)
        if why == "behind the beginning":
            await prefill.remote_send(kv, end=16)
        async for chunk in decode.start_generate(kv=kv, begin=16 if why == "behind the beginning" else 48):
            yield chunk

    async def check(world: World, d: ScriptedEngine, p: ScriptedEngine, q: ScriptedEngine) -> None:
        generation = await start(world)
        sends = [call for each in (p, q) for call in each.calls if isinstance(call.body, RemoteSend)]
        if len(sends) > 1:
            p.report(sends[-1])
            await world.settle()
        received = {"nothing came": 0, "behind the beginning": 16}.get(why, 48)
        began = asyncio.get_running_loop().time()
        await d.finish(2, received=received, recomputed=int(why == "recomputed"))
        chunks = await read(generation)
        assert chunks[-1].finish is not None
        assert asyncio.get_running_loop().time() - began < 0.1

    run(check, sending)


@pytest.mark.parametrize("left", [0.1, 10.0])
def test_waiting_for_a_report_costs_no_answer(left: float) -> None:
    """The time that the request has left is not spent."""

    async def check(world: World, d: ScriptedEngine, _p: ScriptedEngine, _q: ScriptedEngine) -> None:
        generation = await start(world, timeout=left)
        await d.finish(2, received=49)
        chunks = await read(generation)
        assert chunks[-1].finish is not None
        assert generation.error is None

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
