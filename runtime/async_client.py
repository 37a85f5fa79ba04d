"""The Python client of a router, over the bus, for code with an event loop.

    async with AsyncClient() as client:
        completion = await client.generate("The capital of France is", max_tokens=8)
        async for delta in client.stream_chat([{"role": "user", "content": "Hello"}]):
            print(delta.text, end="")

Leaving a stream's loop cancels the request, and the engine's work with it. `Client`, in `client`, is the same without
`await`. Errors are the classes of `microserve.runtime.errors`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import msgspec

from microserve.runtime.arguments import objection
from microserve.runtime.async_engine import AsyncEngine
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import InvalidRequest, PeerLost, ProtocolError
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    Aborted,
    AbortRequest,
    ChatMessage,
    Detokenize,
    Detokenized,
    Events,
    Finished,
    Generate,
    ListEvents,
    ListModels,
    ListRequests,
    ListStrategies,
    Models,
    Requests,
    RollbackStrategy,
    SamplingParams,
    SetStrategy,
    Status,
    StatusReply,
    Strategies,
    StrategySet,
    TextChunk,
    Tokenize,
    Tokenized,
)
from microserve.runtime.rpc import connect

if TYPE_CHECKING:
    from types import TracebackType

    from microserve.runtime.bus import Bus
    from microserve.runtime.messages import ModelInfo, RouterVerb, SettingValue, TokenLogprobs, Usage
    from microserve.runtime.rpc import CallStream, RpcClient

DEFAULT_ENDPOINT = "tcp://127.0.0.1:7700"
Prompt = str | Sequence[int]
ChatInput = Sequence[ChatMessage | Mapping[str, str]]
R = TypeVar("R")


class Options(TypedDict, total=False):
    """What every generating call accepts: which model, when to stop, and the fields of `SamplingParams`."""

    model: str
    stop: str | Sequence[str]
    request_id: str
    timeout: float
    """Seconds for the whole request; `DeadlineExceeded` when they are over."""
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    logprobs: int | None
    ignore_eos: bool
    min_tokens: int
    stop_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer: what arrived since the last one.

    `text` never ends within a character; `token_ids` may run ahead of it. `logprobs` has an entry for each token id,
    where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `finish_reason` is "stop" (end of turn, stop string or stop token) or "length"."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: str
    usage: Usage
    request_id: str
    strategy: str
    """The version of the strategy that served it."""
    engine: str
    """The engine that decoded it."""


class AsyncStream:
    """A streamed answer: an async iterator of `Delta`. The request starts with the first step of the iteration.

    Leaving the loop cancels it when nothing else holds the stream; `aclose()`, or `async with`, does in any case.
    After the last delta, `completion` holds the whole answer.
    """

    def __init__(self, client: AsyncClient, request: Generate) -> None:
        self._client = client
        self._request = request
        self._call: CallStream | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._deltas: list[Delta] = []
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended. Before that, raises `InvalidRequest`."""
        if self._completion is None:
            raise InvalidRequest("the stream has not ended; iterate to its end first")
        return self._completion

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        if self._closed:
            raise StopAsyncIteration
        if self._call is None:
            self._loop = asyncio.get_running_loop()
            rpc = await self._client.connect()
            self._call = rpc.stream(self._request, budget=self._request.timeout)
        try:
            bodies = [await anext(self._call), *self._call.take()]
        except StopAsyncIteration:
            self._closed = True
            self._completion = self._finished(self._call.reply)
            raise
        except asyncio.CancelledError:
            self._cancel()
            raise
        except BaseException:
            self._closed = True
            raise
        delta = _merge(bodies)
        self._deltas.append(delta)
        return delta

    async def aclose(self) -> None:
        """Cancel the request where it still runs. Idempotent."""
        self._cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    def __del__(self) -> None:
        if self._closed or self._call is None or self._loop is None or self._loop.is_closed():
            return
        # The collector may run in any thread; a session belongs to its loop.
        self._loop.call_soon_threadsafe(self._call.cancel)

    def _cancel(self) -> None:
        if not self._closed:
            self._closed = True
            if self._call is not None:
                self._call.cancel()

    def _finished(self, reply: object) -> Completion:
        end = _expect(reply, Finished)
        logprobs = [entry for delta in self._deltas for entry in delta.logprobs or ()]
        return Completion(
            text="".join(delta.text for delta in self._deltas),
            token_ids=tuple(token for delta in self._deltas for token in delta.token_ids),
            logprobs=tuple(logprobs) if self._request.sampling.logprobs is not None else None,
            finish_reason=end.finish_reason,
            usage=end.usage,
            request_id=end.request_id,
            strategy=end.strategy,
            engine=end.engine,
        )


class AsyncClient:
    """A client of one router, on one event loop. Connects with the first call, and again after the router was lost.

    `endpoint` is the router's bus, not its HTTP port (default: $MICROSERVE_ROUTER, or this machine's). `key_file` says
    who we are where the bus wants keys (default: $MICROSERVE_KEY_FILE). `bus` is for tests; by default the client opens
    one over ZeroMQ.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout: float = 5.0,
        key_file: str | os.PathLike[str] | None = None,
        bus: Bus | None = None,
    ) -> None:
        self._endpoint = endpoint or os.environ.get("MICROSERVE_ROUTER") or DEFAULT_ENDPOINT
        self._key_file = key_file if key_file is not None else os.environ.get("MICROSERVE_KEY_FILE")
        self._connect_timeout = connect_timeout
        self._bus = bus
        self._owns_bus = bus is None
        self._rpc: RpcClient | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.connect()
        except BaseException:
            # `__aexit__` is not called then.
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> RpcClient:
        """The session to the router, opened if need be. Raises `PeerLost` when no router answers in time."""
        async with self._connecting:
            if self._closed:
                raise PeerLost("the client is closed")
            if self._rpc is not None and not self._rpc.closed:
                return self._rpc
            if self._bus is None:
                # Imported here: the client's types are of use without a bus.
                from microserve.runtime.keys import BusSecurity
                from microserve.runtime.zmq_bus import ZmqBus

                security = BusSecurity.load(Path(self._key_file)) if self._key_file else None
                me = Peer("client", f"{os.getpid()}-{os.urandom(4).hex()}", new_epoch())
                self._bus = ZmqBus(me, security=security)
            try:
                self._rpc = await connect(self._bus, self._endpoint, timeout=self._connect_timeout)
            except PeerLost as error:
                raise PeerLost(f"no router answers at {self._endpoint}") from error
            return self._rpc

    async def close(self) -> None:
        """End the session; requests that still run are cancelled. Idempotent."""
        self._closed = True
        if self._rpc is not None:
            self._rpc.session.close("client closed")
        if self._owns_bus and self._bus is not None:
            bus, self._bus = self._bus, None
            await bus.close()

    # --- generating ---

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a prompt: text, or token ids. Returns when the answer is complete."""
        return await _completed(self.stream(prompt, **options))

    async def chat(self, messages: ChatInput, **options: Unpack[Options]) -> Completion:
        """The model's next message in a conversation, through its own chat template."""
        return await _completed(self.stream_chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """`generate`, streamed."""
        return AsyncStream(self, generate_request(prompt, None, dict(options)))

    def stream_chat(self, messages: ChatInput, **options: Unpack[Options]) -> AsyncStream:
        """`chat`, streamed."""
        return AsyncStream(self, generate_request(None, messages, dict(options)))

    # --- asking ---

    async def models(self) -> list[ModelInfo]:
        """The models that live engines serve."""
        return _expect(await self._ask(ListModels()), Models).models

    async def status(self) -> StatusReply:
        """The router, and the engines as it sees them."""
        return _expect(await self._ask(Status()), StatusReply)

    async def tokenize(self, text: str, *, model: str = "", add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        request = Tokenize(text=text, model=model, add_special_tokens=add_special_tokens)
        return [int(token) for token in unpack_tokens(_expect(await self._ask(request), Tokenized).ids)]

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = Detokenize(ids=pack_tokens(list(token_ids)), model=model)
        return _expect(await self._ask(request), Detokenized).text

    # --- operating ---

    def engine(self, engine_id: str) -> AsyncEngine:
        """One engine's verbs: `await client.engine("a").prep_recv(prompt)`. Nothing is sent yet."""
        return AsyncEngine(self, engine_id)

    async def strategies(self) -> Strategies:
        """What can be chosen, what serves, what was."""
        return _expect(await self._ask(ListStrategies()), Strategies)

    async def set_strategy(
        self,
        name: str,
        settings: Mapping[str, SettingValue] | None = None,
        *,
        model: str = "",
        share: float = 1.0,
        dry_run: bool = False,
    ) -> StrategySet:
        """Serves `share` of the next requests of `model` ("": every model) by another strategy."""
        body = SetStrategy(name=name, settings=dict(settings or {}), model=model, share=share, dry_run=dry_run)
        return _expect(await self._ask(body), StrategySet)

    async def rollback_strategy(self, *, model: str = "", number: int | None = None) -> StrategySet:
        """Back to what served before the last change, or before change `number`."""
        return _expect(await self._ask(RollbackStrategy(model=model, number=number)), StrategySet)

    async def requests(self, *, request_id: str | None = None, recent: int = 0, limit: int = 1000) -> Requests:
        """What runs and waits at the router, with its sub-requests, and the last `recent` (at most 256) that ended."""
        body = ListRequests(request_id=request_id, recent=recent, limit=limit)
        return _expect(await self._ask(body), Requests)

    async def abort(self, request_id: str) -> str:
        """Ends a request, whoever sent it: "freed", or "unknown" when there is none (any more)."""
        return _expect(await self._ask(AbortRequest(request_id=request_id)), Aborted).outcome

    async def events(self, *, after: int = 0, limit: int = 200) -> Events:
        """What happened in the fleet since event number `after`, oldest first."""
        return _expect(await self._ask(ListEvents(after=after, limit=limit)), Events)

    async def _ask(self, body: RouterVerb) -> object:
        rpc = await self.connect()
        return await rpc.call(body, budget=30.0)


def generate_request(prompt: Prompt | None, messages: ChatInput | None, options: dict[str, Any]) -> Generate:
    """The message for a prompt or a conversation. Raises `InvalidRequest` that names the argument."""
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(known)}")
    stop = options.pop("stop", ())
    common = {name: options.pop(name) for name in ("model", "request_id", "timeout") if name in options}
    if "stop_token_ids" in options:
        options["stop_token_ids"] = list(options["stop_token_ids"])
    for name, value in options.items():
        try:
            msgspec.convert({name: value}, SamplingParams)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{name}: {value!r}: {objection(error).what}", param=name) from error
    request = Generate(
        text=prompt if isinstance(prompt, str) else None,
        prompt=pack_tokens(list(prompt)) if prompt is not None and not isinstance(prompt, str) else None,
        messages=None if messages is None else [_message(message) for message in messages],
        sampling=msgspec.convert(options, SamplingParams),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **common,
    )
    try:
        # What the router would refuse to decode is better told here, by name.
        return msgspec.convert(msgspec.to_builtins(request, builtin_types=(bytes,)), Generate)
    except msgspec.ValidationError as error:
        raise objection(error).refusal() from error


def _message(message: ChatMessage | Mapping[str, str]) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    try:
        return msgspec.convert(dict(message), ChatMessage)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"messages: {message!r}: {error}", param="messages") from error


def _merge(bodies: Sequence[object]) -> Delta:
    chunks = [_expect(body, TextChunk) for body in bodies]
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    return Delta(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(int(token) for chunk in chunks for token in unpack_tokens(chunk.ids)),
        logprobs=tuple(logprobs) if any(chunk.logprobs is not None for chunk in chunks) else None,
    )


async def _completed(stream: AsyncStream) -> Completion:
    async with stream:
        async for _ in stream:
            pass
        return stream.completion


def _expect(body: object, kind: type[R]) -> R:
    if not isinstance(body, kind):
        raise ProtocolError(f"the router answered with {type(body).__name__}, not {kind.__name__}")
    return body
