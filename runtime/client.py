"""The Python client of a router: `Client` here, without `await`; `AsyncClient` and the results in `async_client`.

    with Client() as client:
        print(client.generate("The capital of France is", max_tokens=8).text)
        for delta in client.stream_chat([{"role": "user", "content": "Hello"}]):
            print(delta.text, end="")

Leaving a stream's loop cancels the request, and the engine's work with it.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from microserve.runtime.async_client import DEFAULT_ENDPOINT, AsyncClient, AsyncStream, Completion, Delta, Options
from microserve.runtime.errors import PeerLost

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from types import TracebackType

    from microserve.runtime.async_client import ChatInput, Prompt
    from microserve.runtime.async_engine import AsyncEngine
    from microserve.runtime.bus import Bus
    from microserve.runtime.messages import (
        Events,
        ModelInfo,
        Requests,
        SettingValue,
        StatusReply,
        Strategies,
        StrategySet,
    )

__all__ = [
    "DEFAULT_ENDPOINT",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Delta",
    "Engine",
    "Options",
    "Stream",
]

T = TypeVar("T")


class Stream:
    """A streamed answer: an iterator of `Delta`.

    Leaving the loop cancels the request when nothing else holds the stream; `close()`, or `with`, does in any case.
    After the last delta, `completion` holds the whole answer.
    """

    def __init__(self, client: Client, stream: AsyncStream) -> None:
        self._client = client
        self._stream = stream

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended. Before that, raises `InvalidRequest`."""
        return self._stream.completion

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        delta = self._client.run(_next(self._stream))
        if delta is None:
            raise StopIteration
        return delta

    def close(self) -> None:
        """Cancel the request where it still runs. Idempotent."""
        self._client.run(self._stream.aclose())

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A client of one router for code without an event loop. Safe to use from several threads.

    Owns a thread: use it as a context manager, or call `close`. See `AsyncClient` for what the calls do.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout: float = 5.0,
        key_file: str | os.PathLike[str] | None = None,
        bus: Callable[[], Bus] | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="microserve-client", daemon=True)
        self._thread.start()

        async def make() -> AsyncClient:
            opened = None if bus is None else bus()
            return AsyncClient(endpoint, connect_timeout=connect_timeout, key_file=key_file, bus=opened)

        self._client = self.run(make())

    def __enter__(self) -> Client:
        try:
            self.run(self._client.connect())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session and the thread; requests that still run are cancelled. Idempotent."""
        if self._loop.is_closed():
            return
        self.run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a prompt: text, or token ids. Returns when the answer is complete."""
        return self.run(self._client.generate(prompt, **options))

    def chat(self, messages: ChatInput, **options: Unpack[Options]) -> Completion:
        """The model's next message in a conversation, through its own chat template."""
        return self.run(self._client.chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """`generate`, streamed."""
        return Stream(self, self._client.stream(prompt, **options))

    def stream_chat(self, messages: ChatInput, **options: Unpack[Options]) -> Stream:
        """`chat`, streamed."""
        return Stream(self, self._client.stream_chat(messages, **options))

    def models(self) -> list[ModelInfo]:
        """The models that live engines serve."""
        return self.run(self._client.models())

    def status(self) -> StatusReply:
        """The router, and the engines as it sees them."""
        return self.run(self._client.status())

    def tokenize(self, text: str, *, model: str = "", add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        return self.run(self._client.tokenize(text, model=model, add_special_tokens=add_special_tokens))

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        return self.run(self._client.detokenize(token_ids, model=model))

    def engine(self, engine_id: str) -> Engine:
        """One engine's verbs. Nothing is sent yet."""
        return Engine(self, self._client.engine(engine_id))

    def strategies(self) -> Strategies:
        """What can be chosen, what serves, what was."""
        return self.run(self._client.strategies())

    def set_strategy(
        self,
        name: str,
        settings: Mapping[str, SettingValue] | None = None,
        *,
        model: str = "",
        share: float = 1.0,
        dry_run: bool = False,
    ) -> StrategySet:
        """Serves `share` of the next requests of `model` ("": every model) by another strategy."""
        return self.run(self._client.set_strategy(name, settings, model=model, share=share, dry_run=dry_run))

    def rollback_strategy(self, *, model: str = "", number: int | None = None) -> StrategySet:
        """Back to what served before the last change, or before change `number`."""
        return self.run(self._client.rollback_strategy(model=model, number=number))

    def requests(self, *, request_id: str | None = None, recent: int = 0, limit: int = 1000) -> Requests:
        """What runs and waits at the router, with its sub-requests, and the last `recent` (at most 256) that ended."""
        return self.run(self._client.requests(request_id=request_id, recent=recent, limit=limit))

    def abort(self, request_id: str) -> str:
        """Ends a request, whoever sent it: "freed", or "unknown" when there is none (any more)."""
        return self.run(self._client.abort(request_id))

    def events(self, *, after: int = 0, limit: int = 200) -> Events:
        """What happened in the fleet since event number `after`, oldest first."""
        return self.run(self._client.events(after=after, limit=limit))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's loop and wait for it. Ctrl-C while waiting cancels it."""
        if self._loop.is_closed():
            work.close()
            raise PeerLost("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _shut(self) -> None:
        await self._client.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class Engine:
    """One engine's verbs without `await`: every method of `AsyncEngine` but the streaming `start_generate`."""

    def __init__(self, client: Client, engine: AsyncEngine) -> None:
        self._client = client
        self._engine = engine

    @property
    def id(self) -> str:
        return self._engine.id

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._engine, name)
        if name.startswith("_") or not inspect.iscoroutinefunction(method):
            raise AttributeError(f"an engine has no blocking {name!r}")
        return lambda *given, **options: self._client.run(method(*given, **options))


async def _next(stream: AsyncStream) -> Delta | None:
    return await anext(stream, None)
