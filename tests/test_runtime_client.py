"""The client against a router that a test scripts, over both buses: results, errors, cancellation, reconnection."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from microserve.runtime.client import AsyncClient, Client, Completion, Delta
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MicroserveError,
    PeerLost,
    ProtocolError,
)
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    ChatMessage,
    Detokenize,
    Detokenized,
    Finished,
    Generate,
    ListModels,
    ModelInfo,
    Models,
    Ok,
    SamplingParams,
    Status,
    StatusReply,
    TextChunk,
    Tokenize,
    Tokenized,
    TokenLogprobs,
    Usage,
)
from microserve.runtime.rpc import IncomingCall, RpcServer
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

MODEL = ModelInfo(name="m", revision="r", architecture="fake", vocab_size=10, max_context=100)
USAGE = Usage(prompt_tokens=3, completion_tokens=4)
STATUS = StatusReply(
    router="r",
    epoch=1,
    version="0",
    uptime=1.0,
    engines=[],
    active_requests=0,
    queued_requests=0,
    requests_total=0,
    strategy="data_parallel",
)


def finished(call: IncomingCall) -> None:
    call.reply(Finished(finish_reason="stop", usage=USAGE, request_id="q1", strategy="dp@1", engine="e"))


class Router:
    """Answers what a router would; keeps what it was asked. `script` answers `Generate`."""

    def __init__(self) -> None:
        self.calls: list[IncomingCall] = []
        self.cancelled: list[MicroserveError] = []
        self.cancel_seen = threading.Event()
        self.script: Callable[[IncomingCall], None] = self.echo

    @property
    def request(self) -> Generate:
        body = self.calls[-1].body
        assert isinstance(body, Generate)
        return body

    def echo(self, call: IncomingCall) -> None:
        call.part(TextChunk(text="Hel", ids=pack_tokens([1, 2])))
        call.part(TextChunk(text="lo", ids=pack_tokens([3])))
        call.part(TextChunk(text="", ids=pack_tokens([4])))
        finished(call)

    def endless(self, call: IncomingCall) -> None:
        def cancelled(error: MicroserveError) -> None:
            self.cancelled.append(error)
            call.fail(Cancelled("as you wish"))
            self.cancel_seen.set()

        call.on_cancel = cancelled
        call.part(TextChunk(text="a", ids=pack_tokens([1])))

    def __call__(self, call: IncomingCall) -> None:
        self.calls.append(call)
        body = call.body
        if isinstance(body, Generate):
            self.script(call)
        elif isinstance(body, ListModels):
            call.reply(Models(models=[MODEL]))
        elif isinstance(body, Status):
            call.reply(STATUS)
        elif isinstance(body, Tokenize):
            call.reply(Tokenized(ids=pack_tokens([ord(letter) for letter in body.text])))
        elif isinstance(body, Detokenize):
            call.reply(Detokenized(text="".join(map(chr, unpack_tokens(body.ids)))))


@asynccontextmanager
async def scene() -> AsyncIterator[tuple[AsyncClient, Router]]:
    router = Router()
    bus = ZmqBus(Peer("router", "r", 1))
    try:
        listener = await bus.listen("tcp://127.0.0.1:*", RpcServer(router))
        async with AsyncClient(listener.endpoint) as client:
            yield client, router
    finally:
        await bus.close()


def run(scenario: Callable[[AsyncClient, Router], Awaitable[None]]) -> None:
    async def main() -> None:
        async with scene() as (client, router):
            await scenario(client, router)

    asyncio.run(main())


@contextmanager
def sync_scene() -> Iterator[tuple[Client, Router]]:
    """A router in a thread of its own, and a sync client of it."""
    router = Router()
    started: Future[tuple[str, asyncio.AbstractEventLoop]] = Future()
    over = asyncio.Event()

    async def serve() -> None:
        bus = ZmqBus(Peer("router", "r", 1))
        listener = await bus.listen("tcp://127.0.0.1:*", RpcServer(router))
        started.set_result((listener.endpoint, asyncio.get_running_loop()))
        await over.wait()
        await bus.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    endpoint, loop = started.result(10)
    try:
        with Client(endpoint) as client:
            yield client, router
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


# --- results -------------------------------------------------------------------------------------------------------


def test_generate_returns_the_whole_answer() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        completion = await client.generate(
            "Say hello", max_tokens=4, temperature=0.0, stop="END", model="m", request_id="q1"
        )
        assert completion == Completion("Hello", (1, 2, 3, 4), None, "stop", USAGE, "q1", "dp@1", "e")
        assert router.request == Generate(
            text="Say hello",
            model="m",
            stop=("END",),
            request_id="q1",
            sampling=SamplingParams(max_tokens=4, temperature=0.0),
        )

    run(scenario)


def test_prompts_may_be_token_ids() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        await client.generate([5, 6, 7], stop_token_ids=[9], stop=["a", "b"])
        assert router.request.prompt == pack_tokens([5, 6, 7])
        assert router.request.text is None
        assert router.request.sampling.stop_token_ids == (9,)
        assert router.request.stop == ("a", "b")

    run(scenario)


def test_chat_takes_mappings_and_messages() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        hello = ChatMessage("user", "Hello")
        completion = await client.chat([{"role": "system", "content": "Be kind"}, hello])
        assert completion.text == "Hello"
        assert router.request.messages == [ChatMessage("system", "Be kind"), hello]

    run(scenario)


def test_a_stream_yields_deltas_and_then_holds_the_completion() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        async with client.stream("x") as stream:
            deltas = [delta async for delta in stream]
        assert "".join(delta.text for delta in deltas) == "Hello"
        assert [token for delta in deltas for token in delta.token_ids] == [1, 2, 3, 4]
        assert stream.completion.text == "Hello"
        assert stream.completion.usage == USAGE
        assert [delta async for delta in stream] == []

    run(scenario)


def test_a_slow_reader_gets_its_backlog_in_one_delta() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        router.script = router.endless
        stream = client.stream("x")
        assert await anext(stream) == Delta("a", (1,))
        router.calls[0].part(TextChunk(text="b", ids=pack_tokens([2])))
        router.calls[0].part(TextChunk(text="c", ids=pack_tokens([3])))
        finished(router.calls[0])
        # A round trip behind them: everything has arrived when it is answered.
        await client.models()
        assert await anext(stream) == Delta("bc", (2, 3))
        assert [delta async for delta in stream] == []
        assert stream.completion.text == "abc"

    run(scenario)


def test_logprobs_are_passed_on() -> None:
    entry = TokenLogprobs(-0.5, [1], [-0.5])

    def script(call: IncomingCall) -> None:
        call.part(TextChunk(text="a", ids=pack_tokens([1]), logprobs=[entry]))
        finished(call)

    async def scenario(client: AsyncClient, router: Router) -> None:
        router.script = script
        assert (await client.generate("x", logprobs=1)).logprobs == (entry,)
        assert (await client.generate("x")).logprobs is None

    run(scenario)


def test_asking() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        assert await client.models() == [MODEL]
        assert await client.status() == STATUS
        assert await client.tokenize("AB") == [65, 66]
        assert await client.detokenize([67, 68]) == "CD"

    run(scenario)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_option_is_refused_by_name_before_anything_is_sent(options: dict[str, Any], param: str) -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        with pytest.raises(InvalidRequest, match=param) as caught:
            await client.generate("x", **options)
        assert caught.value.param == param
        assert router.calls == []

    run(scenario)


def test_other_wrong_arguments() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        with pytest.raises(TypeError, match="unknown option 'temprature'"):
            await client.generate("x", temprature=1.0)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest, match="content"):
            await client.chat([{"role": "user"}])
        with pytest.raises(InvalidRequest):
            await client.generate("x", stop=["a"] * 17)
        with pytest.raises(InvalidRequest):
            await client.generate([-1])
        assert router.calls == []

    run(scenario)


def test_the_routers_error_is_raised_as_its_own_class() -> None:
    def script(call: IncomingCall) -> None:
        call.part(TextChunk(text="a"))
        call.fail(Busy("full", retry_after=2.0))

    async def scenario(client: AsyncClient, router: Router) -> None:
        router.script = script
        with pytest.raises(Busy, match="full") as caught:
            await client.generate("x")
        assert caught.value.retry_after == 2.0
        stream = client.stream("x")
        assert await anext(stream) == Delta("a", ())
        with pytest.raises(Busy):
            await anext(stream)
        with pytest.raises(InvalidRequest, match="has not ended"):
            _ = stream.completion

    run(scenario)


def test_an_answer_of_another_kind_is_a_protocol_error() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        router.script = lambda call: call.reply(Ok())
        with pytest.raises(ProtocolError, match="answered with Ok"):
            await client.generate("x")

    run(scenario)


def test_the_timeout_is_the_calls_budget() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        router.script = router.endless
        with pytest.raises(DeadlineExceeded):
            await client.generate("x", timeout=0.05)
        assert router.calls[0].deadline is not None
        await client.models()
        assert len(router.cancelled) == 1

    run(scenario)


def test_no_router() -> None:
    async def scenario() -> None:
        client = AsyncClient("tcp://127.0.0.1:1", connect_timeout=0.1)
        try:
            with pytest.raises(PeerLost, match=r"no router answers at tcp://127\.0\.0\.1:1"):
                await client.models()
        finally:
            await client.close()

    asyncio.run(scenario())


def test_entering_without_a_router_leaves_nothing_open() -> None:
    async def main() -> None:
        with pytest.raises(PeerLost, match="no router answers"):
            async with AsyncClient("tcp://127.0.0.1:1", connect_timeout=0.1):
                pass

    asyncio.run(main())


def test_a_closed_client_says_so() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        await client.close()
        await client.close()
        with pytest.raises(PeerLost, match="the client is closed"):
            await client.models()

    run(scenario)


def test_a_lost_router_is_dialled_again() -> None:
    async def scenario() -> None:
        router, bus = Router(), ZmqBus(Peer("router", "r", 1))
        router.script = router.endless
        listener = await bus.listen("tcp://127.0.0.1:*", RpcServer(router))
        async with AsyncClient(listener.endpoint) as client:
            stream = client.stream("x")
            await anext(stream)
            await bus.close()
            with pytest.raises(PeerLost):
                await anext(stream)
            again = ZmqBus(Peer("router", "r", 2))
            await again.listen(listener.endpoint, RpcServer(router))
            assert await client.models() == [MODEL]
            await again.close()

    asyncio.run(scenario())


# --- cancellation --------------------------------------------------------------------------------------------------


async def leave_by_break(client: AsyncClient) -> None:
    async for _ in client.stream("x"):
        break


async def leave_by_error(client: AsyncClient) -> None:
    async def consume() -> None:
        async with client.stream("x") as stream:
            async for _ in stream:
                raise KeyError

    with pytest.raises(KeyError):
        await consume()


async def leave_by_aclose(client: AsyncClient) -> None:
    stream = client.stream("x")
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert [delta async for delta in stream] == []


async def leave_by_task(client: AsyncClient) -> None:
    started = asyncio.Event()
    # Held here, so that it is the cancelled task that cancels, and not the collector.
    stream = client.stream("x")

    async def consume() -> None:
        async for _ in stream:
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [delta async for delta in stream] == []
    await client.models()


async def leave_generate(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.generate("x"), 0.05)


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, leave_by_aclose, leave_by_task, leave_generate])
def test_leaving_cancels(leave: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        router.script = router.endless
        await leave(client)
        # The cancel was sent before this call, and is handled before it.
        await client.models()
        assert [type(error) for error in router.cancelled] == [Cancelled]

    run(scenario)


def test_a_finished_stream_cancels_nothing() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        async for _ in client.stream("x"):
            pass
        gc.collect()
        await client.models()
        assert router.cancelled == []

    run(scenario)


def test_concurrent_calls_share_one_session() -> None:
    async def scenario(client: AsyncClient, router: Router) -> None:
        completions = await asyncio.gather(*(client.generate("x") for _ in range(50)))
        assert [completion.text for completion in completions] == ["Hello"] * 50
        assert len({id(call.session) for call in router.calls}) == 1

    run(scenario)


# --- without await -------------------------------------------------------------------------------------------------


def test_the_sync_client_answers_the_same() -> None:
    with sync_scene() as (client, router):
        assert client.generate("x", max_tokens=3) == Completion(
            "Hello", (1, 2, 3, 4), None, "stop", USAGE, "q1", "dp@1", "e"
        )
        assert client.chat([{"role": "user", "content": "x"}]).text == "Hello"
        assert client.models() == [MODEL]
        assert client.status() == STATUS
        assert client.detokenize(client.tokenize("hi")) == "hi"
        stream = client.stream_chat([{"role": "user", "content": "x"}])
        assert "".join(delta.text for delta in stream) == "Hello"
        assert stream.completion.finish_reason == "stop"
        router.script = lambda call: call.fail(Busy("full"))
        with pytest.raises(Busy):
            client.generate("x")


def test_breaking_out_of_a_sync_stream_cancels() -> None:
    with sync_scene() as (client, router):
        router.script = router.endless
        for _ in client.stream("x"):
            break
        assert router.cancel_seen.wait(10)


def test_closing_a_sync_stream_cancels() -> None:
    with sync_scene() as (client, router):
        router.script = router.endless
        with client.stream("x") as stream:
            next(stream)
        assert router.cancel_seen.wait(10)
        assert list(stream) == []


def test_the_sync_client_leaves_no_thread_when_there_is_no_router() -> None:
    before = threading.active_count()
    with pytest.raises(PeerLost, match="no router answers"), Client("tcp://127.0.0.1:1", connect_timeout=0.1):
        pass
    assert threading.active_count() == before


def test_a_closed_sync_client_says_so() -> None:
    with sync_scene() as (client, _):
        client.close()
        client.close()
        with pytest.raises(PeerLost, match="closed"):
            client.models()


def test_the_router_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSERVE_ROUTER", "tcp://127.0.0.1:1")
    with pytest.raises(PeerLost, match=r"at tcp://127\.0\.0\.1:1$"), Client(connect_timeout=0.1):
        pass
    with pytest.raises(PeerLost, match=r"at tcp://127\.0\.0\.1:2$"), Client("tcp://127.0.0.1:2", connect_timeout=0.1):
        pass
