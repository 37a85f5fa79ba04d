"""Calls: exactly one terminal answer, budgets, cancellation, streams, and what a lost session does to both sides."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import pytest
from tests.bus_support import ENGINE, ROUTER, Recorder, Signal, World, no_leaks

from microserve.runtime.clock import ManualClock
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MicroserveError,
    PeerLost,
    ProtocolError,
    TooLarge,
)
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import (
    MAX_MESSAGE_BYTES,
    Batch,
    CacheMatched,
    Call,
    Cancel,
    EngineCall,
    ErrorInfo,
    Failure,
    Generated,
    Info,
    Ok,
    Part,
    PrepRecv,
    Reply,
    Resume,
    SamplingParams,
    StartGenerate,
    Stats,
    StatsReply,
    Tokenized,
    Tokens,
    Usage,
)
from microserve.runtime.rpc import CallStream, IncomingCall, Outgoing, RpcClient, RpcServer, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GENERATE = StartGenerate(request_id="r", sub_id="s", prompt=b"\1\0\0\0")
GENERATED = Generated(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield


def tokens(*values: int) -> Tokens:
    return Tokens(ids=bytes(values))


class Rig:
    """A server whose calls are kept for the test to answer, and a client, over the memory bus."""

    def __init__(self, handler: Callable[[IncomingCall], None] | None = None) -> None:
        self.network = MemoryNetwork()
        self.clock = ManualClock()
        self.calls: list[IncomingCall] = []
        self.server = RpcServer(handler or self.calls.append, clock=self.clock)
        self.engine = self.network.bus(ENGINE)
        self.router = self.network.bus(ROUTER)

    async def __aenter__(self) -> Self:
        await self.engine.listen("memory://engine", self.server)
        self.client = await connect(self.router, "memory://engine")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.router.close()
        await self.engine.close()
        assert self.server.open_calls == 0
        assert self.client.open_calls == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def call(self, *, budget: float | None = None) -> asyncio.Task[object]:
        """A call that has arrived at the server, as the last of `calls`."""
        task = asyncio.ensure_future(self.client.call(Stats(), budget=budget))
        await self.network.settle()
        return task

    async def stream(self, *, budget: float | None = None) -> tuple[CallStream, IncomingCall]:
        stream = self.client.stream(GENERATE, budget=budget)
        await self.network.settle()
        return stream, self.calls[-1]


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "tcp", "ipc", "inproc"])
def test_calls_and_streams_over_every_bus(kind: str) -> None:
    def handle(call: IncomingCall) -> None:
        if isinstance(call.body, StartGenerate):
            for value in range(100):
                call.part(tokens(value))
            call.reply(GENERATED)
        elif isinstance(call.body, Stats):
            call.reply(StatsReply(values={"x": 1.5}))
        else:
            raise Busy("full", retry_after=2.5)

    async def main() -> None:
        async with World(kind) as world:
            server = RpcServer(handle)
            listener = await world.bus(ENGINE).listen(world.endpoint(), server)
            client = await connect(world.bus(ROUTER), listener.endpoint)
            assert (
                await asyncio.gather(*(client.call(Stats()) for _ in range(50))) == [StatsReply(values={"x": 1.5})] * 50
            )
            stream = client.stream(GENERATE)
            assert [body async for body in stream] == [tokens(value) for value in range(100)]
            assert stream.reply == GENERATED
            with pytest.raises(Busy, match="full") as caught:
                await client.call(Info())
            assert caught.value.retry_after == 2.5
            assert server.open_calls == client.open_calls == 0

    asyncio.run(main())


def test_only_the_first_terminal_counts() -> None:
    async def main() -> None:
        async with Rig() as rig:
            pending = await rig.call()
            (call,) = rig.calls
            assert rig.server.open_calls == 1
            call.reply(Ok())
            assert call.done
            call.reply(StatsReply(values={}))
            call.fail(Busy("late"))
            call.part(tokens(1))
            rig.server.send_many([Outgoing(call, Ok(), True), Outgoing(call, Busy("late"), False)])
            assert await pending == Ok()
            assert rig.engine.statistics().sent == 2, "the welcome and one reply"

    asyncio.run(main())


def test_a_verb_that_fails_answers_its_own_call_only(caplog: pytest.LogCaptureFixture) -> None:
    def handle(call: IncomingCall) -> None:
        if isinstance(call.body, Info):
            raise KeyError("a bug")
        if isinstance(call.body, Stats):
            raise InvalidRequest("no such thing", param="prompt")
        call.reply(Ok())

    async def main() -> None:
        async with Rig(handle) as rig:
            with pytest.raises(InternalError, match="Info failed"):
                await rig.client.call(Info())
            with pytest.raises(InvalidRequest, match="no such thing") as caught:
                await rig.client.call(Stats())
            assert caught.value.param == "prompt"
            assert await rig.client.call(Resume()) == Ok()

    asyncio.run(main())
    assert caplog.messages == ["verb failed"]
    assert "a bug" in caplog.text


def test_an_answer_too_large_to_travel_becomes_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Rig() as rig:
            huge = Tokenized(ids=bytes(MAX_MESSAGE_BYTES))
            first, second = await rig.call(), await rig.call()
            stream, _ = await rig.stream()
            cancelled: list[MicroserveError] = []
            rig.calls[2].on_cancel = cancelled.append
            rig.calls[0].reply(huge)
            rig.server.send_many([Outgoing(rig.calls[1], Ok(), True), Outgoing(rig.calls[2], huge, False)])
            with pytest.raises(InternalError, match="cannot travel"):
                await first
            assert await second == Ok()
            with pytest.raises(InternalError, match="cannot travel"):
                await anext(stream)
            assert len(cancelled) == 1, "whoever works for the stream is told to stop"
            with pytest.raises(TooLarge):
                await rig.client.call(StartGenerate(request_id="r", sub_id="s", prompt=huge.ids))

    asyncio.run(main())
    assert "an answer cannot travel" in caplog.messages


def test_an_answer_without_an_encoding_becomes_a_failure() -> None:
    async def main() -> None:
        async with Rig() as rig:
            call = await rig.call()
            rig.calls[0].reply(CacheMatched(tokens=2**64))
            with pytest.raises(InternalError, match="cannot travel"):
                await call

    asyncio.run(main())


def test_an_argument_that_cannot_travel_is_the_callers_mistake() -> None:
    async def main() -> None:
        async with Rig() as rig:
            too_much = PrepRecv(request_id="r", sub_id="s", prompt=b"", end=10**30)
            on_engine = EngineCall(engine_id="e", body=too_much)
            half = PrepRecv(request_id="r", sub_id="\ud800", prompt=b"")
            sampling = StartGenerate(request_id="r", sub_id="s", prompt=b"", sampling=SamplingParams(top_k=2**64))
            for body, param in ((too_much, "end"), (on_engine, "end"), (half, "sub_id"), (sampling, "sampling.top_k")):
                with pytest.raises(InvalidRequest) as caught:
                    await rig.client.call(body)
                assert caught.value.param == param
                with pytest.raises(InvalidRequest):
                    rig.client.stream(body)
            with pytest.raises(TypeError):
                await rig.client.call(PrepRecv(request_id="r", sub_id="s", prompt=b"", end=object()))  # type: ignore[arg-type]
            await rig.network.settle()
            assert rig.calls == []
            assert rig.client.open_calls == 0
            answered = await rig.call()
            rig.calls[0].reply(Ok())
            assert await answered == Ok(), "the session counts on"

    asyncio.run(main())


# --- streams -------------------------------------------------------------------------------------------------------


def test_send_many_is_one_message_per_session_in_order() -> None:
    async def main() -> None:
        async with Rig() as rig:
            other = rig.network.bus(ROUTER.__class__("router", "other", 1))
            second = await connect(other, "memory://engine")
            streams = [rig.client.stream(GENERATE), rig.client.stream(GENERATE), second.stream(GENERATE)]
            await rig.network.settle()
            a, b, c = rig.calls
            before = rig.engine.statistics().sent
            rig.server.send_many(
                [
                    Outgoing(a, tokens(1), False),
                    Outgoing(c, tokens(7), False),
                    Outgoing(b, tokens(2), False),
                    Outgoing(a, tokens(3), False),
                    Outgoing(a, GENERATED, True),
                    Outgoing(b, Busy("preempted"), False),
                ]
            )
            assert rig.engine.statistics().sent == before + 2
            assert [body async for body in streams[0]] == [tokens(1), tokens(3)]
            assert streams[0].reply == GENERATED
            assert await anext(streams[1]) == tokens(2)
            with pytest.raises(Busy, match="preempted"):
                await anext(streams[1])
            assert await anext(streams[2]) == tokens(7)
            assert b.done, "an error is final by itself"
            c.reply(GENERATED)
            await other.close()

    asyncio.run(main())


def test_take_merges_the_backlog_without_waiting() -> None:
    async def main() -> None:
        async with Rig() as rig:
            stream, call = await rig.stream()
            assert stream.take() == []
            for value in range(5):
                call.part(tokens(value))
            await rig.network.settle()
            assert await anext(stream) == tokens(0)
            assert stream.take() == [tokens(value) for value in range(1, 5)]
            assert not stream.ended
            call.part(tokens(9))
            call.reply(GENERATED)
            await rig.network.settle()
            assert stream.ended
            assert stream.take() == [tokens(9)]
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert stream.reply == GENERATED

    asyncio.run(main())


def test_a_stream_has_no_reply_before_its_end_and_one_consumer() -> None:
    async def main() -> None:
        async with Rig() as rig:
            stream, call = await rig.stream()
            with pytest.raises(ProtocolError, match="no reply"):
                _ = stream.reply
            waiting = asyncio.ensure_future(anext(stream))
            await rig.network.settle()
            with pytest.raises(RuntimeError, match="one consumer"):
                await anext(stream)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            call.part(tokens(1))
            assert await anext(stream) == tokens(1), "a consumer that stopped waiting may come back"
            call.reply(GENERATED)
            await rig.network.settle()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["reply", "fail", "cancel", "lost"])
def test_the_end_of_a_stream_is_told_once(way: str) -> None:
    async def main() -> None:
        async with Rig() as rig:
            stream, call = await rig.stream()
            ends: list[tuple[bool, str | None]] = []
            stream.on_end = lambda: ends.append((stream.ended, stream.error.code if stream.error else None))
            call.part(tokens(1))
            await rig.network.settle()
            assert ends == []
            if way == "reply":
                call.reply(GENERATED)
            elif way == "fail":
                call.fail(InvalidRequest("no"))
            elif way == "cancel":
                stream.cancel()
            else:
                rig.client.close("test")
            await rig.network.settle()
            stream.cancel()
            codes = {"reply": None, "fail": "invalid_request", "cancel": "cancelled", "lost": "peer_lost"}
            assert ends == [(True, codes[way])]

    asyncio.run(main())


# --- cancelling ----------------------------------------------------------------------------------------------------


def test_a_cancelled_stream_ends_here_at_once_and_there_once() -> None:
    async def main() -> None:
        async with Rig() as rig:
            stream, call = await rig.stream()
            reasons: list[MicroserveError] = []
            call.on_cancel = reasons.append
            call.part(tokens(1))
            await rig.network.settle()
            stream.cancel()
            stream.cancel()
            assert stream.ended
            assert rig.client.open_calls == 0
            with pytest.raises(Cancelled):
                await anext(stream)
            await rig.network.settle()
            assert [type(reason) for reason in reasons] == [Cancelled]
            assert not call.done, "the callee still owes a terminal answer"
            rig.client.session.send(Cancel(id=call.id))
            await rig.network.settle()
            assert len(reasons) == 1
            call.part(tokens(2))
            call.fail(Cancelled("stopped"))
            await rig.network.settle()
            assert rig.server.open_calls == 0
            rig.client.session.send(Cancel(id=call.id))
            await rig.network.settle()

    asyncio.run(main())


def test_a_cancel_that_nobody_handles_is_answered_at_once() -> None:
    async def main() -> None:
        async with Rig() as rig:
            stream, call = await rig.stream()
            stream.cancel()
            await rig.network.settle()
            assert call.done

    asyncio.run(main())


def test_a_cancel_handler_that_fails_still_gives_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    def explode(_reason: MicroserveError) -> None:
        raise RuntimeError("a bug")

    async def main() -> None:
        async with Rig() as rig:
            stream, call = await rig.stream()
            call.on_cancel = explode
            stream.cancel()
            await rig.network.settle()
            assert call.done

    asyncio.run(main())
    assert caplog.messages == ["cancelling failed"]


def test_cancelling_the_task_of_a_call_cancels_the_call() -> None:
    async def main() -> None:
        async with Rig() as rig:
            pending = await rig.call()
            reasons: list[MicroserveError] = []
            rig.calls[0].on_cancel = reasons.append
            pending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pending
            await rig.network.settle()
            assert len(reasons) == 1
            rig.calls[0].reply(Ok())
            await rig.network.settle()

    asyncio.run(main())


# --- budgets -------------------------------------------------------------------------------------------------------


def test_a_budget_becomes_a_deadline_on_arrival() -> None:
    async def main() -> None:
        async with Rig() as rig:
            _stream, call = await rig.stream(budget=90.0)
            assert call.deadline == rig.clock() + 90.0
            call.reply(GENERATED)
            _stream, call = await rig.stream()
            assert call.deadline is None
            call.reply(GENERATED)
            await rig.network.settle()

    asyncio.run(main())


def test_a_budget_that_runs_out_raises_and_cancels() -> None:
    async def main() -> None:
        async with Rig() as rig:
            reasons: list[MicroserveError] = []
            signal = Signal()

            def cancelled(reason: MicroserveError) -> None:
                reasons.append(reason)
                signal.set()

            pending = await rig.call(budget=0.05)
            stream, call = await rig.stream(budget=0.05)
            for each in rig.calls:
                each.on_cancel = cancelled
            call.part(tokens(1))
            assert await anext(stream) == tokens(1)
            with pytest.raises(DeadlineExceeded):
                await pending
            with pytest.raises(DeadlineExceeded):
                await anext(stream)
            await signal.until(lambda: len(reasons) == 2)
            for each in rig.calls:
                each.fail(Cancelled("stopped"))
            await rig.network.settle()
            with pytest.raises(DeadlineExceeded, match="no time was left"):
                await rig.client.call(Stats(), budget=0.0)
            with pytest.raises(DeadlineExceeded, match="no time was left"):
                rig.client.stream(GENERATE, budget=-1.0)

    asyncio.run(main())


# --- lost sessions -------------------------------------------------------------------------------------------------


def test_a_lost_session_ends_every_call_on_both_sides() -> None:
    async def main() -> None:
        async with Rig() as rig:
            lost: list[MicroserveError] = []
            rig.client.on_lost = lost.append
            pending = await rig.call()
            stream, call = await rig.stream()
            reasons: list[MicroserveError] = []
            for each in rig.calls:
                each.on_cancel = reasons.append
            call.part(tokens(1))
            await rig.network.settle()
            rig.network.partition(ENGINE, ROUTER)
            await rig.network.advance(4)
            with pytest.raises(PeerLost, match="nothing heard"):
                await pending
            assert await anext(stream) == tokens(1), "what had arrived is not lost"
            with pytest.raises(PeerLost, match="nothing heard"):
                await anext(stream)
            assert [type(reason) for reason in reasons] == [PeerLost, PeerLost]
            assert all(each.done for each in rig.calls)
            assert rig.server.open_calls == 0
            call.reply(GENERATED)
            rig.server.send_many([Outgoing(call, GENERATED, True)])
            assert len(lost) == 1
            assert rig.client.closed
            with pytest.raises(PeerLost, match="nothing heard"):
                await rig.client.call(Stats())
            with pytest.raises(PeerLost):
                rig.client.stream(GENERATE)
            rig.client.close()

    asyncio.run(main())


def test_a_client_without_a_session_is_closed() -> None:
    async def main() -> None:
        client = RpcClient()
        assert client.closed
        client.close()
        with pytest.raises(PeerLost, match="never opened"):
            await client.call(Stats())

    asyncio.run(main())


def test_closing_the_client_fails_its_calls() -> None:
    async def main() -> None:
        async with Rig() as rig:
            pending = await rig.call()
            rig.client.close("leaving")
            with pytest.raises(PeerLost, match="leaving"):
                await pending
            await rig.network.settle()
            assert rig.calls[0].done

    asyncio.run(main())


# --- nonsense ------------------------------------------------------------------------------------------------------


def test_messages_that_make_no_sense_to_a_server_get_a_typed_failure() -> None:
    async def main() -> None:
        async with Rig() as rig:
            here = Recorder()
            raw = await rig.network.bus(ROUTER.__class__("router", "raw", 1)).dial("memory://engine", here)
            raw.send(Call(id=1, body=Stats()))
            raw.send(Call(id=1, body=Stats()))
            raw.send(Part(id=1, body=Ok()))
            raw.send(Reply(id=1, body=Ok()))
            raw.send(Batch(items=[]))
            raw.send(Failure(id=None, error=ErrorInfo("busy", "x")))
            raw.send(Cancel(id=77))
            await rig.network.settle()
            assert len(rig.calls) == 1
            rig.calls[0].reply(Ok())
            await rig.network.settle()
            codes = [(m.id, m.error.code) for m in here.messages if isinstance(m, Failure)]
            assert codes == [(None, "invalid_request")] + [(None, "protocol_error")] * 3
            assert here.messages[-1] == Reply(id=1, body=Ok())
            raw.close()
            await rig.network.settle()

    asyncio.run(main())


def test_messages_that_make_no_sense_to_a_client() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        there = Recorder()
        engine, router = network.bus(ENGINE), network.bus(ROUTER)
        await engine.listen("memory://engine", there)
        client = await connect(router, "memory://engine")
        pending = asyncio.ensure_future(client.call(Stats()))
        await network.settle()
        session = there.session
        session.send(Reply(id=99, body=Ok()))
        session.send(Part(id=1, body=Ok()))
        session.send(Part(id=99, body=Ok()))
        session.send(Cancel(id=1))
        session.send(Call(id=5, body=Stats()))
        await network.settle()
        assert not pending.done()
        (failure,) = [m for m in there.messages if isinstance(m, Failure)]
        assert (failure.id, failure.error.code) == (5, "invalid_request")
        # Some call could not be read, and nobody knows which: none may wait for ever.
        session.send(Failure(id=None, error=ErrorInfo("protocol_error", "what?")))
        with pytest.raises(PeerLost, match="what"):
            await pending
        await network.settle()
        assert len(there.losses) == 1
        await router.close()
        await engine.close()

    asyncio.run(main())
