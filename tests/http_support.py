"""A router core that does as it is told, and a client that speaks ASGI to the application, both without sockets."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from tests import tokenizer_zoo as zoo

from microserve.router.chat_template import ChatTemplate
from microserve.router.http import make_app
from microserve.router.metrics import RouterMetrics
from microserve.router.strategies.catalog import Catalog
from microserve.router.strategies.data_parallel import data_parallel
from microserve.router.strategy import Chunk
from microserve.router.text import TextModel
from microserve.router.versions import Versions
from microserve.runtime.config import RouterConfig
from microserve.runtime.errors import Cancelled, ContextLengthExceeded, MicroserveError, ModelNotFound, NoEngine
from microserve.runtime.messages import Generated, ModelInfo, Strategies, TokenLogprobs, Usage

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from starlette.applications import Starlette

    from microserve.router.core import GenerationSpec
    from microserve.router.http_auth import HttpAuth

CONTEXT = 200
LIMIT = 60.0
"""Seconds, virtual where time is, after which a request counts as one that never ends."""


@functools.cache
def text_model() -> TextModel:
    return TextModel(zoo.byte_level(), template=ChatTemplate(zoo.CHAT_TEMPLATE, {}, where="test"), name="demo")


def ids(text: str) -> list[int]:
    return [int(token) for token in text_model().encode(text)]


class FakeGeneration:
    """A choice whose chunks the test puts in; an error ends it."""

    strategy_version = "test@1"
    engine_ids = ("e0",)

    def __init__(self, spec: GenerationSpec) -> None:
        self.spec = spec
        self.request_id = spec.request_id
        self.cancelled = asyncio.Event()
        self.steps: asyncio.Queue[Chunk | MicroserveError | Exception] = asyncio.Queue()
        self.count = 0
        self.cached = 1

    def say(self, text: str, *, finish: str | None = None, stop_token: int | None = None) -> None:
        """The tokens of `text`, each with a log probability when those were asked for."""
        tokens = ids(text) if text else []
        self.count += len(tokens)
        logprobs = None
        if self.spec.sampling.logprobs is not None:
            logprobs = [TokenLogprobs(-0.5, [token, 7], [-0.5, float("-inf")]) for token in tokens]
        done = None
        if finish is not None:
            usage = Usage(prompt_tokens=len(self.spec.prompt), completion_tokens=self.count, cached_tokens=self.cached)
            done = Generated(finish_reason=finish, usage=usage, stop_token=stop_token)
        self.steps.put_nowait(Chunk(tokens, logprobs, done))

    def fail(self, error: Exception) -> None:
        self.steps.put_nowait(error)

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> Chunk:
        step = await self.steps.get()
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self) -> None:
        if not self.cancelled.is_set():
            self.cancelled.set()
            self.steps.put_nowait(Cancelled("cancelled"))

    def suffice(self) -> None:
        self.cancel()


@dataclass
class FakeCore:
    """Serves one model, "demo". `answers`: what choice after choice says at once, or the error that refuses it."""

    answers: list[str | MicroserveError | None] = field(default_factory=list)
    config: RouterConfig = field(default_factory=RouterConfig)
    draining: bool = False
    ready: bool = True
    full: bool = False
    generations: list[FakeGeneration] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    metrics: RouterMetrics = field(default_factory=lambda: RouterMetrics(CollectorRegistry()))
    versions: Versions = field(default_factory=lambda: Versions(data_parallel.configure(), Catalog.built_in()))

    async def strategies(self) -> Strategies:
        return await self.versions.show()

    def models(self) -> list[ModelInfo]:
        size = text_model().vocab_size
        info = ModelInfo(name="demo", revision="r", architecture="fake", vocab_size=size, max_context=CONTEXT)
        return [info] if self.ready else []

    def model(self, name: str) -> ModelInfo:
        if not self.ready:
            raise NoEngine("no engine is ready", retry_after=2.5)
        if name not in ("", "demo"):
            raise ModelNotFound(f"model '{name}' is not served", param="model")
        return self.models()[0]

    def text_model(self, name: str) -> TextModel:
        self.model(name)
        return text_model()

    def output_budget(self, model: ModelInfo, prompt_tokens: int, max_tokens: int | None) -> int:
        room = model.max_context - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded("the prompt is too long", param="prompt")
        if max_tokens is not None and max_tokens > room:
            raise ContextLengthExceeded("too much is asked for", param="max_tokens")
        return room if max_tokens is None else max_tokens

    def generate(self, spec: GenerationSpec) -> FakeGeneration:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, MicroserveError):
            raise answer
        generation = FakeGeneration(spec)
        self.generations.append(generation)
        self.started.set()
        if answer is not None:
            generation.say(answer, finish="stop")
        return generation

    def app(self, *, keep_alive: float = 15.0, auth: HttpAuth | None = None) -> Starlette:
        return make_app(self, keep_alive=keep_alive, auth=auth)  # type: ignore[arg-type]


class Call:
    """One request to an ASGI application, as it goes."""

    def __init__(
        self, app: Starlette, method: str, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.outbox: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"host", b"test"), (b"content-length", b"%d" % len(body)), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            self.body += message["body"]
            self.complete = not message.get("more_body", False)
            if self.complete:
                self._inbox.put_nowait({"type": "http.disconnect"})
        self.outbox.put_nowait(message)

    def hang_up(self) -> None:
        """The client closes the connection."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def next(self) -> bytes:
        """The next part of the body."""
        while (message := await self.outbox.get())["type"] != "http.response.body":
            pass
        part: bytes = message["body"]
        return part

    async def finish(self) -> Call:
        # Not `await self.task`: whoever gives up waiting there cancels the task, as a revocation does. And a stream
        # that nobody ends goes on for ever.
        await asyncio.wait({self.task}, timeout=LIMIT)
        assert self.task.done(), f"it goes on after {LIMIT:g} s"
        self.task.result()
        return self

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json()["error"]
        return found

    def events(self) -> list[Any]:
        """The stream's events: objects, and "[DONE]" as text."""
        return events_of(self.body)


def events_of(data: bytes) -> list[Any]:
    """Decodes `data: …` events; comments are left out."""
    assert not data or data.endswith(b"\n\n")
    found = []
    for event in data.decode().split("\n\n"):
        if event.startswith("data: "):
            text = event.removeprefix("data: ")
            found.append(text if text == "[DONE]" else json.loads(text))
    return found


def post(app: Starlette, path: str, content: Any, headers: Sequence[tuple[bytes, bytes]] = ()) -> Call:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Call(app, "POST", path, body, headers)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hello", **fields}
