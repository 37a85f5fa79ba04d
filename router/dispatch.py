"""Runs strategies and owns everything that they start.

Each choice has a task for its strategy. Its sub-requests, leases and load charges are registered (see `sub_requests`),
and on every way out (end, error, cancel, client gone, deadline) they are cancelled and given back by posting, without
waiting. So a strategy needs no `try`, leaks nothing, and whoever reads the choice never waits for a strategy that does
not end.
"""

from __future__ import annotations

import asyncio
import time
import types
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from microserve.router.handles import RunFleet
from microserve.router.strategy import Chunk, Program, Request
from microserve.router.sub_requests import SubRequests
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseNotFound,
    LeaseTooLarge,
    MicroserveError,
    NoEngine,
    PeerLost,
    StaleEpoch,
    TransferFailed,
    Unavailable,
)
from microserve.runtime.ids import IdSource
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence

    from microserve.router.fleet import EngineFleet
    from microserve.router.pending import SubRecord
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import Generated

    _Start = Callable[[Request, RunFleet], AsyncGenerator[Chunk, None]]
    """What begins a run of a program."""

BLOCKED_SECONDS = 0.05
"""A strategy that keeps the loop for longer is named in a warning."""

LINGER_SECONDS = 5.0
"""A strategy that is still there so long after it was cancelled is named in a warning."""

AFTERWARDS_SECONDS = 10.0
"""What a strategy does after its last chunk (move KV ahead, say) has to be done within this."""

_LOST = (PeerLost, TransferFailed, StaleEpoch, LeaseNotFound)
"""Errors that say that an engine, or what it had prepared, is gone."""

_OF_PROGRAMS = frozenset({"begin", "end", "address", "admit_by", "wait", "kv_wait"})
"""Parameters that programs alone set: where an engine finds one wrong, no client has said it."""

_log = get_logger(__name__)


class State(Enum):
    """The life of a choice. It only moves downward."""

    QUEUED = "queued"
    """Waits for a place; nothing was started."""
    RUNNING = "running"
    """Its strategy runs."""
    ENDED = "ended"
    """Nothing of it is left at any engine. What was streamed may still wait to be read."""


class Generation:
    """One choice: an async iterator of `Chunk` that ends after the one with `finish`, or raises a `MicroserveError`.

    Chunks that arrive while nobody reads are merged into one; a reader that stays more than `backlog` tokens behind
    loses the choice. Whoever reads must `cancel` when it stops early (calling it later again is harmless).
    """

    __slots__ = (
        "_backlog",
        "_cached",
        "_clock",
        "_complete",
        "_dispatcher",
        "_error",
        "_held",
        "_loop",
        "_merged",
        "_output",
        "_program",
        "_started",
        "_task",
        "_timer",
        "_waiter",
        "created_at",
        "deadline",
        "ended_at",
        "finish",
        "first_token_at",
        "last_token_at",
        "observe_gap",
        "request",
        "started_at",
        "state",
    )

    def __init__(self, dispatcher: Dispatcher, request: Request, program: Program, timeout: float) -> None:
        self.request = request
        self.state = State.QUEUED
        self.created_at = dispatcher.clock()
        self.deadline = self.created_at + timeout
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.ended_at: float | None = None
        self.finish: Generated | None = None
        self.observe_gap: Callable[[float], None] = dispatcher.observer(request.model, program.version)
        self._clock = dispatcher.clock
        self._dispatcher = dispatcher
        self._program = program
        self._backlog = dispatcher.backlog
        self._loop = dispatcher.loop
        self._started = SubRequests(
            request,
            pack_tokens(request.prompt),
            fleet=dispatcher.fleet,
            clock=dispatcher.clock,
            deadline=self.deadline,
            sub_ids=dispatcher.sub_ids,
            told=dispatcher.sub_ended,
        )
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._held: Chunk | None = None
        self._merged = False
        self._complete = False
        self._error: MicroserveError | None = None
        self._output: list[int] = []
        """Tokens that were delivered."""
        self._cached: int | None = None
        """What the first engine had cached of the prompt, once it is lost."""
        self._timer = self._loop.call_later(timeout, self._expire, timeout)

    # --- for whoever reads -----------------------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        return self.request.id

    @property
    def strategy_version(self) -> str:
        """The version that serves this choice, whatever is changed meanwhile."""
        return self._program.version

    @property
    def engine_ids(self) -> tuple[str, ...]:
        """The engines that were asked to generate, in order; the last one decodes."""
        return tuple(self._started.generating)

    @property
    def engine_epochs(self) -> tuple[int, ...]:
        """Which incarnations of `engine_ids` those were; of one that was asked by two, the later."""
        return tuple(self._started.epochs[each] for each in self._started.generating)

    @property
    def sub_requests(self) -> Sequence[SubRecord]:
        """What was asked of engines for it, in order, as far as it is remembered."""
        return self._started.records

    @property
    def output_tokens(self) -> int:
        """How many were delivered."""
        return len(self._output)

    @property
    def completion_tokens(self) -> int:
        """As in `usage`: the token that stopped it is one of them."""
        return len(self._output) + (self.finish is not None and self.finish.stop_token is not None)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody computed for it, as far as that is known before its end."""
        if self._cached is not None:
            return self._cached
        return self._started.cached_so_far if self.finish is None else self.finish.usage.cached_tokens

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The strategy's task, once it runs."""
        return self._task

    @property
    def error(self) -> MicroserveError | None:
        """Why it ended, unless it ended well or has not."""
        return self._error

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Chunk:
        while self._held is None:
            if self._error is not None:
                raise self._error
            if self._complete:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("a generation has one reader")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk, self._held = self._held, None
        self._merged = False
        return chunk

    def cancel(self) -> None:
        """Nobody wants the rest: its work at the engines is freed within a step. No effect after the end."""
        if not self._complete and self.state is not State.ENDED:
            self._held = None
            # Its caller has gone or said so, or may not have it any more: whoever ended it knows.
            self._end(Cancelled("nobody waits for the answer any more"))

    def suffice(self) -> None:
        """The reader has all it asked for (a stop string): ends like `cancel`, and counts as served."""
        if not self._complete and self.state is not State.ENDED:
            self._held = None
            self._complete = True
            self._end(None)

    # --- for the dispatcher ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the strategy from now on."""
        self.state = State.RUNNING
        self.started_at = self._dispatcher.clock()
        self._task = self._loop.create_task(self._run(), name=f"strategy {self.request.id}")

    def refuse(self, error: MicroserveError) -> None:
        """End it with `error`, from whatever state it is in."""
        self._end(error)

    def _expire(self, timeout: float) -> None:
        self._end(DeadlineExceeded(f"the request was not complete within {timeout:g} s"))

    def _end(self, error: MicroserveError | None) -> None:
        """The one way out. Sub-requests first, so that engines stop; then leases, charges; then whoever reads."""
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        if not self._complete:
            self._error = error
        self.ended_at = self._dispatcher.clock()
        self._started.close()
        self._timer.cancel()
        self._wake()
        task = self._task
        if task is not None and not task.done() and task is not asyncio.current_task(self._loop):
            task.cancel()
            self._loop.call_later(LINGER_SECONDS, self._lingers, task)
        self._dispatcher.ended(self)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _lingers(self, task: asyncio.Task[None]) -> None:
        if not task.done():
            _log.warning(
                "strategy does not end after it was cancelled", every=5.0, strategy=self._name, request=self.request.id
            )

    @property
    def _name(self) -> str:
        return self._program.strategy.name

    # --- the strategy's task ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            error = await self._attempts()
        except Exception as bug:  # ours, or tokens that are none: nobody must wait for an end that never comes
            _log.exception("request failed", every=1.0, request=self.request.id)
            error = InternalError(f"the request could not be served: {bug!r}")
        except asyncio.CancelledError:
            # Usually the choice has ended, and this is how its strategy is told. Else the strategy cancelled itself.
            self._end(InternalError(f"strategy '{self._name}' was cancelled from within"))
            raise
        self._end(error)

    async def _attempts(self) -> MicroserveError | None:
        """Runs the program, and again when an engine was lost: from the beginning, or from what was delivered on.

        The error that is left."""
        start: _Start = self._program.start
        lost: MicroserveError | None = None
        delivered, avoided = 0, set[str]()
        while (error := await self._attempt(start)) is not None and not self._over:
            another = bool(self._started.avoid - avoided)
            if len(self._output) > delivered:
                # It got on meanwhile: the next loss is another one, and who would not before may now, or lives again.
                lost, delivered = None, len(self._output)
                self._started.avoid -= avoided
            avoided = set(self._started.avoid)
            if isinstance(error, LeaseTooLarge) and start != self._without_lease:
                # Nothing is wrong with the request: a strategy that moves KV must not fail what another one serves.
                start = self._without_lease
                _log.info("request is served without a lease", every=1.0, request=self.request.id, error=error.message)
            elif self._may_retry(error, lost, another):
                # Where engines live, and not where it was refused.
                lost = lost or error
                _log.info(
                    "request starts again" if not delivered else "request goes on elsewhere",
                    every=1.0,
                    request=self.request.id,
                    output_tokens=delivered,
                    error=error.message,
                )
            else:
                break
            if delivered and self._cached is None:
                self._cached = self._started.cached_so_far
            self._started.let_go()
            if delivered:
                self._started.go_on(self.request.after(self._output))
        return lost if isinstance(error, NoEngine) and lost is not None else error

    @property
    def _over(self) -> bool:
        """Whether nothing more is to be delivered."""
        return self.state is State.ENDED or self._complete

    def _may_retry(self, error: MicroserveError, lost: MicroserveError | None, another: bool) -> bool:
        """Whether the program runs again after `error`; `lost` is what it has run again for already, since it last got
        on. What a client has part of is worth asking every engine that there is: as long as it was `another` one."""
        if isinstance(error, Unavailable):
            return bool(self._started.avoid) and (lost is None or (bool(self._output) and another))
        return lost is None and isinstance(error, _LOST)

    async def _without_lease(self, request: Request, fleet: RunFleet) -> AsyncGenerator[Chunk, None]:
        """In place of a program that was refused a lease: all on the engine that was to receive, or on another."""
        started = self._started
        wanted = started.too_large
        if wanted is not None and wanted.id in fleet.engines and wanted.id not in started.avoid:
            engine = fleet.engine(wanted.id)
        else:
            engine = fleet.pick(prefix=True)
        async for chunk in engine.start_generate():
            yield chunk

    async def _attempt(self, start: _Start) -> MicroserveError | None:
        """Runs a program once. The error that it ended with."""
        stream = start(self._started.request, RunFleet(self._started))
        try:
            await self._follow(stream)
            if self._complete or self.state is State.ENDED:
                return None
            return InternalError(f"strategy '{self._name}' ended without a last chunk, one with `finish`")
        except MicroserveError as error:
            if isinstance(error, InvalidRequest) and error.param in _OF_PROGRAMS:
                return self._mistake(error)
            return error
        except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            return self._mistake(error)
        finally:
            await self._close(stream)

    def _mistake(self, error: BaseException) -> InternalError:
        """A user's program may raise anything; it ends this request alone, and is not the client's."""
        _log.exception("strategy failed", every=1.0, strategy=self._name, request=self.request.id)
        return InternalError(
            f"strategy '{self._name}' failed{self._program.where(error)}: {type(error).__name__}: {error}"
        )

    async def _close(self, stream: AsyncGenerator[Chunk, None]) -> None:
        try:
            await stream.aclose()
        except Exception:  # its `finally` clauses are a user's program too
            _log.exception("strategy failed while it was closed", every=1.0, strategy=self._name)

    @types.coroutine
    def _follow(self, stream: AsyncGenerator[Chunk, None]) -> Generator[Any, Any, None]:
        """Takes the strategy's chunks until it ends. Driven by hand, so that each stretch without an await is timed."""
        clock = self._dispatcher.stopwatch
        while self.state is not State.ENDED:
            step = stream.__anext__()
            thrown: BaseException | None = None
            while True:
                began = clock()
                try:
                    awaited = step.send(None) if thrown is None else step.throw(thrown)
                except StopIteration as result:
                    self._deliver(result.value)
                    break
                except StopAsyncIteration:
                    return
                finally:
                    if clock() - began > BLOCKED_SECONDS:
                        self._blocked(clock() - began)
                thrown = None
                try:
                    yield awaited
                except BaseException as error:  # whatever it is, the strategy is where it belongs
                    thrown = error

    def _blocked(self, seconds: float) -> None:
        _log.warning(
            "strategy blocks the event loop",
            every=5.0,
            strategy=self._name,
            milliseconds=round(seconds * 1000),
            request=self.request.id,
        )

    def _deliver(self, chunk: Chunk) -> None:
        """Hands a chunk to whoever reads. The hot path: once per token of every stream."""
        if type(chunk) is not Chunk:
            raise InternalError(f"strategy '{self._name}' yielded a {type(chunk).__name__} instead of a Chunk")
        if self.state is State.ENDED:
            return
        if self._complete:
            raise InternalError(f"strategy '{self._name}' yielded a chunk after the last one")
        if chunk.tokens:
            now = self._clock()
            if self.first_token_at is None:
                self.first_token_at = now
            else:
                self.observe_gap(now - self.last_token_at)
            self.last_token_at = now
            self._output += chunk.tokens
        elif chunk.finish is None:
            return
        if chunk.finish is not None:
            self._complete = True
            if self._cached is not None:
                chunk.finish = _with_cached(chunk.finish, self._cached)
            self.finish = chunk.finish
            self._timer.cancel()
            left = min(AFTERWARDS_SECONDS, max(0.0, self.deadline - self._clock()))
            self._timer = self._loop.call_later(left, self._expire, left)
        if self._held is None:
            self._held = chunk
        elif not self._merge(chunk):
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _merge(self, chunk: Chunk) -> bool:
        held = self._held
        if held is None or not self._merged:
            # The strategy may still hold on to what it yielded: what is merged into is ours.
            held = Chunk(list(held.tokens), list(held.logprobs or ())) if held is not None else Chunk([], [])
            self._held, self._merged = held, True
        held.tokens += chunk.tokens
        if chunk.logprobs is not None and held.logprobs is not None:
            held.logprobs += chunk.logprobs
        held.finish = chunk.finish
        if len(held.tokens) > self._backlog and not self._complete:
            self._held = None
            self._end(Cancelled(f"the stream was not read: {len(held.tokens)} tokens were waiting"))
            return False
        return True


def _with_cached(finish: Generated, cached: int) -> Generated:
    """Of a choice that went on elsewhere: what the engine there had cached may have been computed for this choice."""
    return msgspec.structs.replace(finish, usage=msgspec.structs.replace(finish.usage, cached_tokens=cached))


def _no_observer(_seconds: float) -> None:
    """Used where nobody measures."""


class Dispatcher:
    """Makes generations. `ended` is called once for each, when nothing of it is left."""

    def __init__(
        self,
        fleet: EngineFleet,
        *,
        ended: Callable[[Generation], None],
        clock: Clock = time.monotonic,
        backlog: int = 4096,
        observer: Callable[[str, str], Callable[[float], None]] | None = None,
        sub_ended: Callable[[SubRecord], None] = lambda record: None,
    ) -> None:
        """`observer(model, version)` returns what is told of every gap between chunks, in seconds; `sub_ended` is told
        of every sub-request that has ended."""
        self.fleet = fleet
        self.ended = ended
        self.sub_ended = sub_ended
        self.clock = clock
        # Always the machine's own: it times code, not waiting. (The built-in itself: it is read twice a token.)
        self.stopwatch: Clock = time.monotonic
        self.backlog = backlog
        self.loop = asyncio.get_running_loop()
        self.sub_ids = IdSource("sub")
        self.observer = observer if observer is not None else lambda _model, _version: _no_observer

    def create(self, request: Request, program: Program, *, timeout: float) -> Generation:
        """A choice that has not started yet."""
        return Generation(self, request, program, timeout)
