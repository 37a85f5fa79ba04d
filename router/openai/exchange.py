"""One HTTP exchange over raw ASGI: the body in, one answer or a stream of events out, and whether the client is gone.

Streaming frameworks spend more on a token than the token costs; here an event is one `send`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from microserve.router.openai.errors import Headers, error_body, error_headers
from microserve.router.openai.responses import KEEP_ALIVE
from microserve.runtime.errors import MicroserveError, TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

_JSON = (b"content-type", b"application/json")
_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client closed the connection: nobody reads an answer."""


class Exchange:
    """One request and its answer. `started`: the status line is out, and an error can only be an event."""

    __slots__ = (
        "_comment",
        "_events_sent",
        "_keep_alive",
        "_receive",
        "_seen",
        "_send",
        "_sending",
        "_timer",
        "_watcher",
        "caller",
        "gone",
        "headers",
        "request_id",
        "scope",
        "started",
        "streaming",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, keep_alive: float = 15.0) -> None:
        self.scope = scope
        self.request_id = ""
        self.caller = ""
        """The name of the API key that it came under, where keys are in use."""
        self.headers: Headers = []
        self.started = False
        self.streaming = False
        self.gone = False
        self._receive = receive
        self._send = send
        self._keep_alive = keep_alive
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
        self._sending = False
        self._events_sent = self._seen = 0

    # --- in

    def name(self, request_id: str) -> None:
        """Gives the exchange its id, which every answer carries."""
        self.request_id = request_id
        self.headers.append((b"x-request-id", request_id.encode()))

    def header(self, name: bytes) -> bytes | None:
        """The first header called `name` (lower case)."""
        for key, value in self.scope["headers"]:
            if key == name:
                found: bytes = value
                return found
        return None

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises `TooLarge` beyond `limit` bytes, `ClientGone` when it breaks off."""
        announced = self.header(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            raise self._too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise self._too_large(limit)
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self, limit: int) -> TooLarge:
        # What the client still sends is not read, so the connection cannot be used again.
        self.headers.append((b"connection", b"close"))
        return TooLarge(f"the body is larger than {limit} bytes")

    def watch(self, gone: Callable[[], None]) -> None:
        """Calls `gone` as soon as the client closes the connection. The body must have been read."""
        self._watcher = asyncio.create_task(self._watch(gone))

    async def _watch(self, gone: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        gone()

    # --- out

    async def answer(self, body: bytes, *, status: int = 200, content_type: bytes | None = None) -> None:
        """A whole answer."""
        kind = _JSON if content_type is None else (b"content-type", content_type)
        self.started = True
        headers = [kind, (b"content-length", b"%d" % len(body)), *self.headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def refuse(self, error: MicroserveError) -> None:
        """The error as an answer, or as the last event of a stream that has begun."""
        if self.streaming:
            await self.events(b"data: " + error_body(error) + b"\n\n", more=False)
        elif not self.started:
            self.headers.extend(error_headers(error))
            await self.answer(error_body(error), status=error.http_status)

    def keep_alive(self) -> None:
        """From now on, a comment goes out whenever nothing else did for a while (it starts the stream if need be)."""
        self._timer = asyncio.get_running_loop().call_later(self._keep_alive, self._tick)

    def _tick(self) -> None:
        self.keep_alive()
        if self._events_sent == self._seen and not self._sending:
            self._comment = asyncio.create_task(self._events(KEEP_ALIVE, more=True))
        self._seen = self._events_sent

    async def events(self, data: bytes, *, more: bool) -> None:
        """Sends complete events; `more` False ends the stream. Waits while the client reads slowly."""
        if self._comment is not None:
            comment, self._comment = self._comment, None
            await comment
        if not more:
            self._stop()
        self._sending = True
        try:
            await self._events(data, more=more)
        finally:
            self._sending = False

    async def _events(self, data: bytes, *, more: bool) -> None:
        self._events_sent += 1
        if not self.started:
            self.started = self.streaming = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_EVENTS, *self.headers]})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def close(self) -> None:
        """Leaves no task and no timer. Idempotent."""
        self._stop()
        if self._comment is not None:
            self._comment.cancel()
            self._comment = None
