"""Calls over a session: correlation, budgets, cancellation, streams. Every call ends in exactly one terminal answer.

The side that dialled usually calls (`RpcClient`), the side that listens answers (`RpcServer`).
Streamed answers are the hot path: one token costs a list entry in a `Batch`, a dictionary look-up and a `deque.append`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from microserve.runtime.arguments import UNENCODABLE, unencodable
from microserve.runtime.clock import monotonic
from microserve.runtime.codec import from_info, to_info
from microserve.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MicroserveError,
    PeerLost,
    ProtocolError,
    TooLarge,
)
from microserve.runtime.log import get_logger
from microserve.runtime.messages import Batch, Call, Cancel, EngineCall, Failure, Part, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from microserve.runtime.bus import Bus, Session
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import EngineVerb, ReplyBody, RouterVerb, RpcMessage

    Answer = Part | Reply | Failure

_log = get_logger(__name__)


# --- answering -----------------------------------------------------------------------------------------------------


class IncomingCall:
    """A call that we answer: any number of `part`s, then one `reply` or `fail`. What comes later is dropped."""

    __slots__ = ("_server", "body", "deadline", "done", "id", "on_cancel", "session")

    def __init__(
        self, server: RpcServer, session: Session, id: int, body: EngineVerb | RouterVerb, deadline: float | None
    ) -> None:
        self._server = server
        self.session = session
        self.id = id
        self.body = body
        self.deadline = deadline
        """When the caller's budget ends, on the server's clock; None: never."""
        self.done = False
        """Whether nothing can be answered any more: answered, or the session is lost."""
        self.on_cancel: Callable[[MicroserveError], None] | None = None
        """Called at most once, and never after an answer: the caller cancelled (then an answer is still due),
        or the session is lost (then `done` is set). Without it a cancelled call is answered at once."""

    def part(self, body: ReplyBody) -> None:
        """Sends one piece of the answer."""
        if not self.done:
            self._server.send(self.session, Part(id=self.id, body=body))

    def reply(self, body: ReplyBody) -> None:
        """Sends the terminal answer."""
        if not self.done:
            self._server.finish(self)
            self._server.send(self.session, Reply(id=self.id, body=body))

    def fail(self, error: MicroserveError) -> None:
        """Sends `error` as the terminal answer."""
        if not self.done:
            self._server.finish(self)
            self._server.send(self.session, Failure(id=self.id, error=to_info(error)))


class Outgoing(NamedTuple):
    """One answer for `RpcServer.send_many`. An error is final by itself."""

    call: IncomingCall
    body: ReplyBody | MicroserveError
    final: bool


class RpcServer:
    """Answers the calls of every session that it is given. A `bus.SessionHandler`."""

    def __init__(self, handler: Callable[[IncomingCall], None], *, clock: Clock = monotonic) -> None:
        """`handler` starts the work of a call and returns; it may answer at once or later.

        A `MicroserveError` that it raises is the call's answer; any other exception is logged and answered
        as an `InternalError`.
        """
        self._handler = handler
        self._clock = clock
        self._calls: dict[Session, dict[int, IncomingCall]] = {}
        self.session_lost: Callable[[Session], None] = lambda session: None
        """Called when a session has ended, after its open calls were cancelled."""

    @property
    def open_calls(self) -> int:
        """Calls that have no terminal answer yet."""
        return sum(map(len, self._calls.values()))

    def opened(self, session: Session) -> None:
        self._calls[session] = {}

    def received(self, session: Session, message: RpcMessage) -> None:
        if type(message) is Call:
            self._start(session, message)
        elif type(message) is Cancel:
            call = self._calls[session].get(message.id)
            if call is not None:
                self._cancel(call, Cancelled("the caller cancelled the call"))
        elif type(message) is Failure:
            _log.warning("peer could not read us", every=1.0, peer=session.peer, why=message.error.message)
        else:
            error = ProtocolError(f"{type(message).__name__.lower()} without a call")
            self.send(session, Failure(id=None, error=to_info(error)))

    def lost(self, session: Session, error: MicroserveError) -> None:
        for call in self._calls.pop(session, {}).values():
            call.done = True
            self._cancel(call, error)
        self.session_lost(session)

    def _start(self, session: Session, message: Call) -> None:
        calls = self._calls[session]
        if message.id in calls:
            # Without an id: the call that has this id is still open and will get its own answer.
            error = InvalidRequest(f"call {message.id} is open already", param="id")
            self.send(session, Failure(id=None, error=to_info(error)))
            return
        deadline = None if message.budget is None else self._clock() + message.budget
        call = IncomingCall(self, session, message.id, message.body, deadline)
        calls[message.id] = call
        try:
            self._handler(call)
        except MicroserveError as failure:
            call.fail(failure)
        except Exception:  # a verb's bug is the answer of this call, and nobody else's concern
            _log.exception("verb failed", every=1.0, verb=type(message.body).__name__, peer=session.peer)
            call.fail(InternalError(f"{type(message.body).__name__} failed; the log of this process says more"))

    def _cancel(self, call: IncomingCall, reason: MicroserveError) -> None:
        on_cancel, call.on_cancel = call.on_cancel, _cancelled_already
        if on_cancel is None:
            call.fail(reason)
            return
        try:
            on_cancel(reason)
        except Exception:  # as above; the caller still gets its terminal answer
            _log.exception("cancelling failed", every=1.0, verb=type(call.body).__name__, peer=call.session.peer)
            call.fail(InternalError("cancelling failed; the log of this process says more"))

    def finish(self, call: IncomingCall) -> None:
        """`call` is about to get its terminal answer."""
        call.done = True
        calls = self._calls.get(call.session)
        if calls is not None:
            calls.pop(call.id, None)

    def send(self, session: Session, message: RpcMessage) -> None:
        """Sends an answer; one that cannot travel becomes a `Failure`, and one to a lost session is dropped."""
        try:
            session.send(message)
        except PeerLost as error:
            _log.debug("answer dropped", peer=session.peer, why=error.message)
        except (TooLarge, TypeError, *UNENCODABLE) as error:
            # Ours to answer for: the caller asked for nothing that large, or a verb built a body that has no encoding.
            _log.error("an answer cannot travel", every=1.0, peer=session.peer, why=error)
            self._send_failures(session, message, f"the answer cannot travel: {error}")

    def _send_failures(self, session: Session, message: RpcMessage, why: str) -> None:
        if isinstance(message, Batch):
            for item in message.items:
                self.send(session, item)
        elif isinstance(message, Part | Reply):
            call = self._calls.get(session, {}).get(message.id)
            if call is not None:
                self._cancel(call, InternalError(why))
                call.fail(InternalError(why))
            elif isinstance(message, Reply):
                self.send(session, Failure(id=message.id, error=to_info(InternalError(why))))

    def send_many(self, items: Iterable[Outgoing]) -> None:
        """Sends many answers: one message per session, in the order given. What belongs to a done call is dropped."""
        by_session: dict[Session, list[Answer]] = {}
        for call, body, final in items:
            if call.done:
                continue
            answer: Answer
            if isinstance(body, MicroserveError):
                self.finish(call)
                answer = Failure(id=call.id, error=to_info(body))
            elif final:
                self.finish(call)
                answer = Reply(id=call.id, body=body)
            else:
                answer = Part(id=call.id, body=body)
            answers = by_session.get(call.session)
            if answers is None:
                by_session[call.session] = [answer]
            else:
                answers.append(answer)
        for session, answers in by_session.items():
            self.send(session, answers[0] if len(answers) == 1 else Batch(items=answers))


def _cancelled_already(_reason: MicroserveError) -> None:
    """Stands in `IncomingCall.on_cancel` once that was called: a second cancel changes nothing."""


# --- calling -------------------------------------------------------------------------------------------------------


class CallStream:
    """The answer of a streamed call, as it arrives: `async for body in stream`, then `stream.reply`."""

    __slots__ = ("_client", "_ended", "_error", "_parts", "_reply", "_timer", "_waiter", "id", "on_end")

    def __init__(self, client: RpcClient, id: int) -> None:
        self.id = id
        self.on_end: Callable[[], None] | None = None
        """Called once when the terminal answer is here, unless that was before it was set (see `ended`)."""
        self._client = client
        self._parts: deque[ReplyBody] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._error: MicroserveError | None = None
        self._reply: ReplyBody | None = None

    def __aiter__(self) -> CallStream:
        return self

    async def __anext__(self) -> ReplyBody:
        """The next body. After the last one: `StopAsyncIteration`, or the error that ended the call."""
        while not self._parts:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("a stream has one consumer")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._parts.popleft()

    @property
    def reply(self) -> ReplyBody:
        """The terminal body. Raises `ProtocolError` while the stream has not ended well."""
        if self._reply is None:
            raise ProtocolError("the call has no reply (yet)")
        return self._reply

    @property
    def ended(self) -> bool:
        """Whether the terminal answer is here; bodies may still wait to be taken."""
        return self._ended

    @property
    def error(self) -> MicroserveError | None:
        """What ended the call, unless it ended well or has not."""
        return self._error

    def take(self) -> list[ReplyBody]:
        """Everything that has arrived and was not iterated yet, in order; does not wait."""
        bodies = list(self._parts)
        self._parts.clear()
        return bodies

    def cancel(self) -> None:
        """The answer is not wanted any more: drops what has not been taken, tells the callee, and ends the stream
        with `Cancelled`. Idempotent; does not wait; no effect on a stream that has ended."""
        if not self._ended:
            self._client.abandon(self.id)
            self._parts.clear()
            self.end(None, Cancelled("the call was cancelled here"))

    # --- for the client ---

    def add(self, body: ReplyBody) -> None:
        self._parts.append(body)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def expire_in(self, budget: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(budget, self._expire, budget)

    def _expire(self, budget: float) -> None:
        self._client.abandon(self.id)
        self.end(None, DeadlineExceeded(f"no complete answer within {budget:g} s"))

    def end(self, reply: ReplyBody | None, error: MicroserveError | None) -> None:
        self._ended = True
        self._reply = reply
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.on_end is not None:
            self.on_end()


class RpcClient:
    """Makes calls on one session. A `bus.SessionHandler`: give it to `Bus.dial`, or use `connect`."""

    def __init__(self) -> None:
        self.session: Session
        """Set when the session opens."""
        self.on_lost: Callable[[MicroserveError], None] | None = None
        """Called once when the session has ended, after every open call has failed."""
        self._calls: dict[int, asyncio.Future[ReplyBody] | CallStream] = {}
        self._ids = itertools.count(1)

    @property
    def closed(self) -> bool:
        """Whether the session has ended (or never began)."""
        return not hasattr(self, "session") or self.session.closed

    @property
    def open_calls(self) -> int:
        """Calls without a terminal answer."""
        return len(self._calls)

    async def call(self, body: EngineVerb | RouterVerb, *, budget: float | None = None) -> ReplyBody:
        """The terminal answer (pieces are ignored). Raises the callee's error, `PeerLost`, `DeadlineExceeded` after
        `budget` seconds, `InvalidRequest` for a value that cannot travel, or `TooLarge`. Cancelling the task cancels
        the call."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[ReplyBody] = loop.create_future()
        id = self._start(waiter, body, budget)
        timer = None if budget is None else loop.call_later(budget, self._expire, id, budget)
        try:
            return await waiter
        finally:
            if timer is not None:
                timer.cancel()
            if id in self._calls:
                # Only when the task was cancelled: an answer would have removed it.
                self.abandon(id)

    def stream(self, body: EngineVerb | RouterVerb, *, budget: float | None = None) -> CallStream:
        """Sends the call at once and returns its answer as a stream. Raises `PeerLost`, `InvalidRequest`, `TooLarge` or
        (no budget left) `DeadlineExceeded` when it cannot be sent. Iterate it to its end, or `cancel` it."""
        stream = CallStream(self, next(self._ids))
        self._start(stream, body, budget, stream.id)
        if budget is not None:
            stream.expire_in(budget)
        return stream

    def close(self, reason: str = "") -> None:
        """Ends the session; open calls fail with `PeerLost`. Idempotent."""
        if not self.closed:
            self.session.close(reason)

    def _start(
        self,
        entry: asyncio.Future[ReplyBody] | CallStream,
        body: EngineVerb | RouterVerb,
        budget: float | None,
        id: int | None = None,
    ) -> int:
        if budget is not None and budget <= 0:
            raise DeadlineExceeded("no time was left for the call")
        if not hasattr(self, "session"):
            raise PeerLost("the session was never opened")
        id = next(self._ids) if id is None else id
        # Registered first: when sending ends the session, `lost` finds the call and nobody waits for ever.
        self._calls[id] = entry
        try:
            self.session.send(Call(id=id, body=body, budget=budget))
        except UNENCODABLE as error:
            self._calls.pop(id, None)
            found = unencodable(body.body if isinstance(body, EngineCall) else body)
            if found is None:
                raise
            # The caller built it, so it is an argument that is wrong; which one is looked for only now.
            raise found.refusal() from error
        except BaseException:
            self._calls.pop(id, None)
            raise
        return id

    def abandon(self, id: int) -> None:
        """Forgets a call and tells the callee; late answers are dropped."""
        if self._calls.pop(id, None) is not None and not self.session.closed:
            try:
                self.session.send(Cancel(id=id))
            except PeerLost as error:
                _log.debug("cancel not sent", why=error.message)

    def _expire(self, id: int, budget: float) -> None:
        entry = self._calls.get(id)
        self.abandon(id)
        if entry is not None:
            _end(entry, None, DeadlineExceeded(f"no answer within {budget:g} s"))

    def opened(self, session: Session) -> None:
        self.session = session

    def received(self, session: Session, message: RpcMessage) -> None:
        kind = type(message)
        if kind is Batch:
            for item in message.items:  # type: ignore[union-attr]
                self._answer(session, item)
        elif kind is Call:
            error = InvalidRequest("this side of the session takes no calls")
            session.send(Failure(id=message.id, error=to_info(error)))  # type: ignore[union-attr]
        elif kind is not Cancel:
            self._answer(session, message)  # type: ignore[arg-type]

    def _answer(self, session: Session, answer: Answer) -> None:
        if type(answer) is Part:
            entry = self._calls.get(answer.id)
            if type(entry) is CallStream:
                entry.add(answer.body)
        elif type(answer) is Reply:
            ended = self._calls.pop(answer.id, None)
            if ended is not None:
                _end(ended, answer.body, None)
        elif type(answer) is Failure:
            error = from_info(answer.error)
            if answer.id is None:
                # Which call was meant is unknown, so no call of this session can be trusted to end.
                self.close(f"you could not read us: {error.message}")
                return
            failed = self._calls.pop(answer.id, None)
            if failed is not None:
                _end(failed, None, error)

    def lost(self, session: Session, error: MicroserveError) -> None:
        calls, self._calls = self._calls, {}
        for entry in calls.values():
            _end(entry, None, error)
        if self.on_lost is not None:
            self.on_lost(error)


def _end(entry: asyncio.Future[ReplyBody] | CallStream, reply: ReplyBody | None, error: MicroserveError | None) -> None:
    if isinstance(entry, CallStream):
        entry.end(reply, error)
    elif not entry.done():
        if error is not None:
            entry.set_exception(error)
        elif reply is not None:
            entry.set_result(reply)


async def connect(bus: Bus, endpoint: str, *, timeout: float = 5.0) -> RpcClient:
    """A client with an open session to whoever listens at `endpoint`. Raises `PeerLost` or `VersionMismatch`."""
    client = RpcClient()
    await bus.dial(endpoint, client, timeout=timeout)
    return client
