"""The dispatcher: every way out of a choice frees what its strategy started, and ends it exactly once."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.router_support import ScriptedEngine, World, ids_of, read
from tests.virtual_time import run_virtual

from microserve.router import dispatch
from microserve.router.dispatch import LINGER_SECONDS, State
from microserve.router.prefix_index import page_names
from microserve.router.strategies.prefill_decode import prefill_decode
from microserve.router.strategy import Chunk, Fleet, Request, strategy
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    LeaseTooLarge,
    MicroserveError,
    PeerLost,
)
from microserve.runtime.log import get_logger
from microserve.runtime.messages import PrepRecv, RemoteSend, StartGenerate, TokenLogprobs, Tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from microserve.router.strategy import SettingValue
    from microserve.runtime.rpc import IncomingCall

FREE = {"a": (0, 0)}


def test_tokens_stream_and_the_last_chunk_says_why_it_ended() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate(max_tokens=3, temperature=0.0, request_id="r1")
            await world.settle()
            started = engine.started()
            assert (started.request_id, started.sampling.max_tokens, started.begin) == ("r1", 3, 0)
            assert world.charges() == {"a": (1, 3)}
            await engine.tokens(7)
            assert world.charges() == {"a": (1, 0)}
            first = await anext(generation)
            assert (first.tokens, first.finish) == ([7], None)
            await engine.finish(8, 9)
            last = await anext(generation)
            assert last.tokens == [8, 9]
            assert last.finish is not None
            assert last.finish.finish_reason == "length"
            with pytest.raises(StopAsyncIteration):
                await anext(generation)
            assert generation.engine_ids == ("a",)
            assert generation.strategy_version.startswith("data_parallel@")
            assert world.charges() == FREE
            assert world.metric("requests_total", model="m", strategy=generation.strategy_version, outcome="ok") == 1

    run_virtual(main())


def test_a_backlog_is_read_as_one_chunk_with_every_logprob() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate(logprobs=0)
            await world.settle()
            for token in (1, 2, 3):
                body = Tokens(ids=token.to_bytes(4, "little"), logprobs=[TokenLogprobs(-float(token))])
                engine.calls[0].part(body)
                await world.settle()
            chunk = await anext(generation)
            assert chunk.tokens == [1, 2, 3]
            assert [entry.logprob for entry in chunk.logprobs or ()] == [-1.0, -2.0, -3.0]
            await engine.tokens(4)
            assert (await anext(generation)).tokens == [4]
            generation.cancel()

    run_virtual(main())


def test_cancel_reaches_the_engine_and_gives_the_charge_back() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.tokens(5)
            generation.cancel()
            assert world.charges() == FREE
            assert generation.state is State.ENDED
            await world.settle()
            assert [error.code for error in engine.cancelled] == ["cancelled"]
            assert engine.open == []
            generation.cancel()
            with pytest.raises(Cancelled):
                await anext(generation)
            assert (
                world.metric("requests_total", model="m", strategy=generation.strategy_version, outcome="cancelled")
                == 1
            )

    run_virtual(main())


def test_a_reader_that_has_enough_frees_the_engine_and_counts_as_served() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.tokens(5)
            generation.suffice()
            generation.cancel()
            assert world.charges() == FREE
            await world.settle()
            assert engine.open == []
            with pytest.raises(StopAsyncIteration):
                await anext(generation)
            served = world.metric("requests_total", model="m", strategy=generation.strategy_version, outcome="ok")
            assert served == 1

    run_virtual(main())


def test_cancel_wakes_whoever_reads() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            generation = world.generate()
            reading = asyncio.create_task(read(generation))
            await world.settle()
            generation.cancel()
            with pytest.raises(Cancelled):
                await reading

    run_virtual(main())


def test_a_reader_that_is_cancelled_can_read_on() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            reading = asyncio.create_task(anext(generation))
            await world.settle()
            reading.cancel()
            await asyncio.wait([reading])
            await engine.finish(6)
            assert ids_of(await read(generation)) == [6]

    run_virtual(main())


def test_the_deadline_ends_it_wherever_it_is() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate(timeout=5.0)
            await world.settle()
            await engine.tokens(5)
            assert (await anext(generation)).tokens == [5]
            with pytest.raises(DeadlineExceeded, match="5 s"):
                await anext(generation)
            await world.settle()
            assert engine.open == []
            assert world.charges() == FREE

    run_virtual(main())


def test_a_reader_that_does_not_read_loses_the_stream() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            world.core._dispatcher.backlog = 10
            other = world.generate()
            await world.settle()
            for _ in range(3):
                await engine.tokens(*range(4), call=1)
                await engine.tokens(*range(4), call=0)
            with pytest.raises(Cancelled, match="12 tokens were waiting"):
                await anext(other)
            assert [call.done for call in engine.calls] == [False, True]
            assert ids_of([await anext(generation)]) == [0, 1, 2, 3] * 3
            generation.cancel()

    run_virtual(main())


def test_an_engine_lost_before_the_first_token_is_replaced() -> None:
    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a"), await world.add("b")
            generation = world.generate(seed=4)
            await world.settle()
            assert (len(first.calls), len(second.calls)) == (1, 0)
            await first.die()
            assert second.started().sampling.seed == 4
            assert second.started().sub_id != first.started().sub_id
            await second.finish(1, 2)
            assert ids_of(await read(generation)) == [1, 2]
            assert generation.engine_ids == ("a", "b")
            assert world.charges() == {"a": (0, 0), "b": (0, 0)}

    run_virtual(main())


def test_an_engine_lost_after_the_first_token_is_replaced_and_nothing_is_said_twice() -> None:
    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a"), await world.add("b")
            generation = world.generate(seed=7)
            await world.settle()
            first.calls[0].part(Tokens(ids=pack_tokens([10, 11]), cached=1))
            await world.settle()
            # Whether it was read by then does not matter: it was delivered.
            await first.die()
            await world.settle()
            asked = second.started()
            assert unpack_tokens(asked.prompt).tolist() == [1, 2, 3, 10, 11]
            assert (asked.prior_output, asked.sampling) == (2, first.started().sampling)
            assert world.charges()["b"] == (1, 5)
            await second.finish(12, cached=3)
            chunks = await read(generation)
            assert ids_of(chunks) == [10, 11, 12]
            assert chunks[-1].finish is not None
            # What the second found cached, the first may have computed for us.
            assert chunks[-1].finish.usage.cached_tokens == generation.cached_tokens == 1
            assert (generation.output_tokens, generation.engine_ids) == (3, ("a", "b"))
            assert world.charges() == {"a": (0, 0), "b": (0, 0)}

    run_virtual(main())


def test_what_goes_on_elsewhere_is_believed_to_be_cached_there_with_what_was_delivered() -> None:
    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a"), await world.add("b")
            prompt = list(range(1, 16))  # a token short of a page
            generation = world.generate(prompt)
            await world.settle()
            await first.tokens(90, 91)
            await first.die()
            await world.settle()
            await second.finish(92)
            await read(generation)
            link = world.core.fleet.link("b")
            assert link is not None
            names = page_names("m", pack_tokens([*prompt, 90, 91]), 16)
            assert (len(names), world.core.fleet.prefixes.depth(link, names)) == (1, 1)

    run_virtual(main())


def test_as_many_engines_may_be_lost_as_get_on() -> None:
    async def main() -> None:
        async with World() as world:
            a, b, c, d = [await world.add(name) for name in "abcd"]
            generation = world.generate()
            await world.settle()
            for number, engine in enumerate((a, b)):
                await engine.tokens(number)
                await engine.die()
                await world.settle()
            # The third is lost before it has got on: that is the error.
            assert c.started().prior_output == 2
            await c.die()
            await world.settle()
            assert d.calls == []
            assert (await anext(generation)).tokens == [0, 1]
            with pytest.raises(PeerLost):
                await anext(generation)

    run_virtual(main())


def test_who_was_not_to_be_asked_is_asked_again_once_the_request_has_got_on() -> None:
    async def main() -> None:
        async with World() as world:
            a, b = await world.add("a"), await world.add("b")
            a.refuse_with = Busy("full", retry_after=1.0)
            generation = world.generate()
            await world.settle()
            await b.tokens(1)
            a.refuse_with = None
            await b.die()
            await world.settle()
            assert a.started().prior_output == 1
            # A new incarnation of who was lost, too.
            b = await world.add("b", epoch=2)
            await a.tokens(2)
            await a.die()
            await world.settle()
            assert b.started().prior_output == 2
            await b.finish(3)
            assert ids_of(await read(generation)) == [1, 2, 3]

    run_virtual(main())


def test_what_a_client_has_part_of_is_asked_of_every_engine() -> None:
    async def main() -> None:
        async with World() as world:
            first, *full = [await world.add(name) for name in "abcd"]
            generation = world.generate()
            await world.settle()
            await first.tokens(1)
            for engine in full:
                engine.refuse_with = Busy("full", retry_after=1.0)
            await first.die()
            await world.settle()
            assert [len(engine.calls) for engine in full] == [1, 1, 1]
            assert (await anext(generation)).tokens == [1]
            with pytest.raises(PeerLost):
                await anext(generation)

    run_virtual(main())


def test_a_program_that_asks_the_same_engine_again_is_not_run_for_ever() -> None:
    async def main() -> None:
        async def stubborn(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
            async for chunk in fleet.engine("a" if request.prior_output else "b").start_generate():
                yield chunk

        async with World(strategy(stubborn).configure()) as world:
            a, b = await world.add("a"), await world.add("b")
            a.refuse_with = Busy("full", retry_after=1.0)
            generation = world.generate()
            await world.settle()
            await b.tokens(1)
            await b.die()
            assert (await anext(generation)).tokens == [1]
            with pytest.raises(Busy):
                await anext(generation)
            assert len(a.calls) == 2

    run_virtual(main())


def test_an_engine_that_ends_by_itself_is_not_asked_again() -> None:
    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a"), await world.add("b")
            generation = world.generate()
            await world.settle()
            await first.tokens(1)
            # As an engine says whose step thread has died, over a session that still stands.
            await first.fail(Draining("the engine ends: the step thread died"))
            await world.settle()
            assert (len(first.calls), second.started().prior_output) == (1, 1)
            await second.finish(2)
            assert ids_of(await read(generation)) == [1, 2]

    run_virtual(main())


def test_what_senders_computed_is_not_cached_after_a_loss() -> None:
    async def main() -> None:
        async with World(prefill_decode.configure({"min_remote": 1, "early_first": 0})) as world:
            d, p = await world.add("d", labels={"decode": "yes"}), await world.add("p", labels={"prefill": "yes"})
            d.grant_always()
            p.grant_always()
            p.answers[RemoteSend] = p.report
            generation = world.generate(prompt=range(1, 50))
            await world.settle()
            d.last(StartGenerate).part(Tokens(ids=pack_tokens([10]), cached=0))
            await world.settle()
            assert generation.cached_tokens == 0
            await d.die()
            await world.settle()
            body = p.last(StartGenerate).body
            assert isinstance(body, StartGenerate)
            assert (len(body.prompt) // 4, body.prior_output) == (50, 1)
            await p.finish(11, cached=48)
            assert ids_of(await read(generation)) == [10, 11]
            assert generation.cached_tokens == 0

    run_virtual(main())


def test_a_token_that_is_none_ends_the_request_and_hangs_nobody() -> None:
    async def main() -> None:
        async def strange(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
            yield Chunk([2**40])
            async for chunk in fleet.pick().start_generate():
                yield chunk

        async with World(strategy(strange).configure()) as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.die()
            with pytest.raises(InternalError, match="the request could not be served: OverflowError"):
                await read(generation)

    run_virtual(main())


def test_an_engine_lost_after_the_first_token_with_nobody_to_take_over_is_one_error() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.tokens(1)
            await engine.die()
            assert (await anext(generation)).tokens == [1]
            with pytest.raises(PeerLost):
                await anext(generation)
            assert world.charges() == FREE

    run_virtual(main())


def test_an_engine_lost_with_nobody_to_take_over_is_the_first_error() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.die()
            with pytest.raises(PeerLost):
                await anext(generation)
            assert world.charges() == FREE

    run_virtual(main())


@pytest.mark.parametrize("refusal", [Busy("full", retry_after=2.0), Draining("going")])
def test_an_engine_that_refuses_is_avoided_once(refusal: MicroserveError) -> None:
    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a"), await world.add("b")
            first.refuse_with = refusal
            generation = world.generate()
            await world.settle()
            await second.finish(3)
            assert ids_of(await read(generation)) == [3]
            assert len(first.calls) == 1

    run_virtual(main())


def test_all_engines_refusing_is_the_engines_error() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            engine.refuse_with = Busy("full", retry_after=2.0)
            with pytest.raises(Busy) as caught:
                await anext(world.generate())
            assert caught.value.retry_after == 2.0
            assert len(engine.calls) == 1

    run_virtual(main())


def test_a_wrong_argument_is_not_tried_again() -> None:
    async def main() -> None:
        async with World() as world:
            first, second = await world.add("a"), await world.add("b")
            first.refuse_with = InvalidRequest("no", param="prompt")
            with pytest.raises(InvalidRequest):
                await anext(world.generate())
            assert second.calls == []

    run_virtual(main())


# --- programs that are not as they should be ------------------------------------------------------------------------


def run_program(function: Any, check: Callable[[World, ScriptedEngine], Awaitable[None]], *, left: int = 0) -> None:
    async def main() -> None:
        async with World(strategy(function).configure()) as world:
            world.allow_tasks = left
            engine = await world.add("a")
            await check(world, engine)
            await world.settle()
            assert world.charges() == FREE
            assert engine.open == []

    run_virtual(main())


def expect(kind: type[MicroserveError], match: str) -> Callable[[World, ScriptedEngine], Awaitable[None]]:
    async def check(world: World, engine: ScriptedEngine) -> None:
        with pytest.raises(kind, match=match):
            await read(world.generate())

    return check


def test_a_strategy_that_yields_nothing() -> None:
    async def silent(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        fleet.pick()
        return
        yield

    run_program(silent, expect(InternalError, "'silent' ended without a last chunk"))


def test_a_strategy_that_raises() -> None:
    async def broken(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        fleet.pick().start_generate()
        yield Chunk([1])
        raise KeyError("lost")

    run_program(broken, expect(InternalError, r"'broken' failed at test_router_dispatch.py:\d+: KeyError: 'lost'"))


@pytest.mark.parametrize("param", ["end", "prompt"])
def test_what_an_engine_refuses_is_the_strategys_fault_where_the_client_said_nothing_of_it(param: str) -> None:
    async def careless(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        await fleet.pick().prep_recv(end=10**6)
        yield Chunk([1])

    async def main() -> None:
        async with World(strategy(careless).configure()) as world:
            engine = await world.add("a")
            engine.answers[PrepRecv] = lambda call: call.fail(InvalidRequest("that is wrong", param=param))
            generation = world.generate()
            if param == "prompt":
                with pytest.raises(InvalidRequest, match="that is wrong"):
                    await read(generation)
            else:
                words = r"'careless' failed at test_router_dispatch.py:\d+: InvalidRequest: that is wrong"
                with pytest.raises(InternalError, match=words):
                    await read(generation)

    run_virtual(main())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_strategy_that_exits(kind: type[BaseException]) -> None:
    async def leaving(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        raise kind(3)
        yield

    run_program(leaving, expect(InternalError, rf"'leaving' failed at test_router_dispatch.py:\d+: {kind.__name__}"))


def test_a_strategy_that_cancels_itself() -> None:
    async def confused(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        fleet.pick()
        raise asyncio.CancelledError
        yield

    run_program(confused, expect(InternalError, "'confused' was cancelled from within"))


def test_a_strategy_that_yields_something_else() -> None:
    async def odd(request: Request, fleet: Fleet) -> AsyncIterator[Any]:
        yield "text"

    run_program(odd, expect(InternalError, "'odd' yielded a str instead of a Chunk"))


def test_a_strategy_that_forgets_a_call_it_started() -> None:
    async def forgetful(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        fleet.pick().start_generate()
        async for chunk in fleet.pick().start_generate():
            yield chunk

    async def check(world: World, engine: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        assert world.charges() == {"a": (2, 6)}
        await engine.finish(1, call=1)
        assert ids_of(await read(generation)) == [1]
        await world.settle()
        assert len(engine.cancelled) == 1

    run_program(forgetful, check)


def test_a_strategy_may_go_on_after_the_last_chunk() -> None:
    done: list[bool] = []

    async def tidy(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        async for chunk in fleet.pick().start_generate():
            yield chunk
        await asyncio.sleep(1.0)
        done.append(True)

    async def check(world: World, engine: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        await engine.finish(1)
        assert ids_of(await read(generation)) == [1]
        generation.cancel()
        assert generation.state is State.RUNNING
        await world.core.wait_idle()
        assert done == [True]

    run_program(tidy, check)


def test_a_strategy_that_yields_after_the_last_chunk_harms_nobody() -> None:
    async def endless(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        async for chunk in fleet.pick().start_generate():
            yield chunk
        yield Chunk([99])

    async def check(world: World, engine: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        await engine.finish(1)
        assert ids_of(await read(generation)) == [1]

    run_program(endless, check)


def test_a_strategy_that_handles_the_loss_itself() -> None:
    async def careful(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        try:
            async for chunk in fleet.pick().start_generate():
                yield chunk
        except Busy:
            async for chunk in fleet.pick().start_generate():
                yield chunk

    async def check(world: World, engine: ScriptedEngine) -> None:
        other = await world.add("b")
        generation = world.generate()
        await world.settle()
        await engine.fail(Busy("no"))
        await other.finish(2)
        assert ids_of(await read(generation)) == [2]
        world.core.leave("b", 1)

    run_program(careful, check)


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_strategy_that_waits_for_ever_is_stopped(cancelled: bool) -> None:
    stopped: list[bool] = []

    async def waiting(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        fleet.pick().start_generate()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            stopped.append(True)
        yield Chunk([])

    async def check(world: World, engine: ScriptedEngine) -> None:
        generation = world.generate(timeout=7.0)
        await world.settle()
        if cancelled:
            generation.cancel()
        with pytest.raises(Cancelled if cancelled else DeadlineExceeded):
            await anext(generation)
        await world.settle()
        assert stopped == [True]

    run_program(waiting, check)


@pytest.fixture
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have logged does not count against the rate of what is logged now."""
    monkeypatch.setattr(dispatch, "_log", get_logger(dispatch.__name__))


@pytest.mark.usefixtures("fresh_log")
def test_a_strategy_that_does_not_let_go_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    stop: list[bool] = []

    async def stubborn(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        engine = fleet.pick()
        engine.start_generate()
        while not stop:
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                with pytest.raises(Cancelled):
                    engine.start_generate()
                with pytest.raises(Cancelled):
                    fleet.pick()
        yield Chunk([])

    async def check(world: World, engine: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        generation.cancel()
        with pytest.raises(Cancelled):
            await anext(generation)
        await world.core.wait_idle()
        await asyncio.sleep(LINGER_SECONDS + 1)
        assert "does not end after it was cancelled" in caplog.text
        stop.append(True)
        await asyncio.sleep(61.0)

    run_program(stubborn, check)


@pytest.mark.usefixtures("fresh_log")
def test_a_strategy_that_blocks_the_loop_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def slow(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        time.sleep(0.06)  # noqa: ASYNC251  (the fault that is looked for)
        async for chunk in fleet.pick().start_generate():
            yield chunk

    async def check(world: World, engine: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        await engine.finish(1)
        await read(generation)

    run_program(slow, check)
    record = next(record for record in caplog.records if record.getMessage() == "strategy blocks the event loop")
    assert record.fields["strategy"] == "slow"  # type: ignore[attr-defined]
    assert record.fields["milliseconds"] >= 60  # type: ignore[attr-defined]


# --- leases that can never be granted -------------------------------------------------------------------------------


@strategy
async def leasing(request: Request, fleet: Fleet, *, first: int = 0) -> AsyncIterator[Chunk]:
    """Receives on a, after `first` chunks from b; b sends."""
    chunks = aiter(fleet.engine("b").start_generate()) if first else None
    for _ in range(first):
        assert chunks is not None
        yield await anext(chunks)
    decode = fleet.engine("a")
    kv = await decode.prep_recv(end=-1)
    fleet.engine("b").remote_send(kv)
    async for chunk in decode.start_generate(kv):
        yield chunk


def run_leasing(
    check: Callable[[World, ScriptedEngine, ScriptedEngine], Awaitable[None]], **settings: SettingValue
) -> None:
    async def main() -> None:
        async with World(leasing.configure(settings)) as world:
            a, b = await world.add("a"), await world.add("b")
            a.answers[PrepRecv] = lambda call: call.fail(LeaseTooLarge("never", param="prompt"))
            await check(world, a, b)
            await world.settle()
            assert world.charges() == {"a": (0, 0), "b": (0, 0)}

    run_virtual(main())


def test_who_is_refused_a_lease_for_good_is_served_without_one() -> None:
    async def check(world: World, a: ScriptedEngine, b: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        assert world.log == ["a prep_recv end=-1", "a start_generate 0"]
        assert world.charges() == {"a": (1, 3), "b": (0, 0)}
        await a.finish(1, 2)
        assert ids_of(await read(generation)) == [1, 2]
        assert [record.outcome for record in generation.sub_requests] == ["lease_too_large", "ok"]

    run_leasing(check)


@pytest.mark.parametrize("lost", [False, True])
def test_without_a_lease_it_is_retried_once_like_any_other(lost: bool) -> None:
    async def check(world: World, a: ScriptedEngine, b: ScriptedEngine) -> None:
        if not lost:
            a.answers[StartGenerate] = lambda call: call.fail(Busy("full", retry_after=2.0))
        generation = world.generate()
        await world.settle()
        if lost:
            await a.die()
        assert world.log == ["a prep_recv end=-1", "a start_generate 0", "b start_generate 0"]
        await b.fail(Busy("full", retry_after=3.0))
        with pytest.raises(Busy) as caught:
            await read(generation)
        assert caught.value.retry_after == 3.0
        assert len(world.log) == 3

    run_leasing(check)


def test_a_program_that_runs_again_may_be_refused_a_lease_then() -> None:
    async def check(world: World, a: ScriptedEngine, b: ScriptedEngine) -> None:
        refuse = a.answers[PrepRecv]

        def busy_once(call: IncomingCall) -> None:
            a.answers[PrepRecv] = refuse
            call.fail(Busy("full", retry_after=2.0))

        a.answers[PrepRecv] = busy_once
        generation = world.generate()
        await world.settle()
        # `a` would not: whoever may be chosen serves it.
        assert world.log == ["a prep_recv end=-1"] * 2 + ["b start_generate 0"]
        await b.finish(5)
        assert ids_of(await read(generation)) == [5]

    run_leasing(check)


def test_a_lease_that_is_refused_after_a_token_is_done_without_from_there_on() -> None:
    async def check(world: World, a: ScriptedEngine, b: ScriptedEngine) -> None:
        generation = world.generate()
        await world.settle()
        await b.tokens(7)
        assert (await anext(generation)).tokens == [7]
        await world.settle()
        assert world.log == [
            *("b start_generate 0", "a prep_recv end=-1", "b cancel start_generate", "a start_generate 0 after=1"),
        ]
        assert a.started().prior_output == 1
        await a.finish(8)
        assert ids_of(await read(generation)) == [8]

    run_leasing(check, first=1)


# --- retries --------------------------------------------------------------------------------------------------------


def test_a_retry_runs_the_program_again_with_its_charges_given_back() -> None:
    seen: list[dict[str, tuple[int, int]]] = []

    async def main() -> None:
        async def twice(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
            seen.append(world.charges())
            async for chunk in fleet.pick().start_generate():
                yield chunk

        async with World(strategy(twice).configure()) as world:
            first, second = await world.add("a"), await world.add("b")
            generation = world.generate()
            await world.settle()
            await first.die()
            await second.finish(1)
            await read(generation)
            assert seen == [{"a": (0, 0), "b": (0, 0)}] * 2

    run_virtual(main())
