"""The engine's side of the bus: checks what arrives, keeps the books of open calls, answers what needs no step.

Lives on the asyncio thread. Exactly one terminal answer leaves for every call; once it has, late outputs of the call
are dropped. Leases and the prefix tree are in `kv_verbs`, sends in `sending`, other engines in `peers`.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from microserve.engine.calls import tell_failed
from microserve.engine.checks import check_budget, check_finite, check_generate, check_position
from microserve.engine.kv_verbs import KvVerb, commit_key, prepare_key
from microserve.engine.metrics import EngineMetrics
from microserve.engine.request import Request
from microserve.engine.sending import send_key
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import Busy, Cancelled, Draining, Forbidden, MicroserveError, NotFound
from microserve.runtime.log import get_logger
from microserve.runtime.messages import (
    Abort,
    Aborted,
    Claim,
    ClaimEnded,
    Commit,
    Drain,
    EngineInfo,
    Info,
    InfoReply,
    Load,
    Meet,
    Ok,
    PeerHello,
    PrepRecv,
    RemoteSend,
    Resume,
    StartGenerate,
    Stats,
    StatsReply,
    Tokens,
)
from microserve.runtime.rpc import Outgoing, RpcServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microserve.engine.calls import CallBook
    from microserve.engine.kv_verbs import KvVerbs
    from microserve.engine.outputs import Output
    from microserve.engine.peers import Peers
    from microserve.engine.sending import Sends
    from microserve.runtime.bus import Session
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import ModelInfo
    from microserve.runtime.rpc import IncomingCall

T = TypeVar("T")


class Steps(Protocol):
    """What the verbs need of the step thread (`StepLoop`)."""

    @property
    def load(self) -> Load: ...

    def submit(self, request: Request) -> None: ...

    def abort(self, request: Request) -> None: ...

    def ask(self, function: Callable[[], T], done: Callable[[T], None]) -> None: ...


_PEERS_CALL = PeerHello | Claim | ClaimEnded
"""What one engine calls on another."""


class EngineVerbs:
    """Answers calls; give `server` to `Bus.listen`, and `deliver` to the step loop.

    `check_prompt` raises for a prompt that is too long. `max_live` bounds the open generations, those in the inbox
    included. `statistics` runs in the step thread. `draw_seed` gives the seed of a request that brings none. `sinks`
    says who takes the outputs that belong to no generation. `moved` gives the fields of a load that transfers count.
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        info: Callable[[], EngineInfo],
        check_prompt: Callable[[int], None],
        statistics: Callable[[], StatsReply],
        max_live: int,
        steps: Steps,
        book: CallBook,
        sinks: dict[object, Callable[[Output], None]],
        kv: KvVerbs,
        sends: Sends,
        peers: Peers,
        moved: Callable[[], Mapping[str, int]] = dict,
        metrics: EngineMetrics | None = None,
        clock: Clock = monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.server = RpcServer(self.handle, clock=clock)
        self.server.session_lost = self._session_lost
        self.changed: Callable[[], None] = lambda: None
        """Called when the engine's state has changed, or the last generation or other sub-request has ended."""
        self._model = model
        self._info = info
        self._check_prompt = check_prompt
        self._statistics = statistics
        self._max_live = max_live
        self._steps = steps
        self._book = book
        self._sinks = sinks
        self._kv = kv
        self._sends = sends
        self._peers = peers
        self._moved = moved
        self._metrics = metrics if metrics is not None else EngineMetrics()
        self._clock = clock
        self._draw_seed = draw_seed
        self._log = get_logger(__name__)
        self._live: dict[Request, IncomingCall] = {}
        """Generations, by what their outputs name."""
        self._began: dict[Request, float] = {}
        self._by_sub_id: dict[str, Request] = {}
        self._draining = False
        book.emptied = lambda: self.changed()

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Sub-requests without a terminal answer, and sends that have one and hold pages still."""
        return len(self._live) + max(len(self._book), len(self._sends))

    @property
    def state(self) -> str:
        return "draining" if self._draining else self._steps.load.state

    def load(self) -> Load:
        """The last snapshot, with the state as it is now, and what was sent and received."""
        return msgspec.structs.replace(self._steps.load, state=self.state, **self._moved())

    def drain(self) -> None:
        """Refuse new work from now on, but for what is prepared already. Idempotent."""
        self._set_draining(True)

    def resume(self) -> None:
        """Take new work again. Idempotent."""
        self._set_draining(False)

    def end_all(self, error: MicroserveError) -> None:
        """Answers every open sub-request with `error`, and ends its work."""
        for sub_id in list(self._by_sub_id):
            self._end(sub_id, error)
        self._book.abort_all(error)

    def _set_draining(self, draining: bool) -> None:
        if draining is not self._draining:
            self._draining = draining
            self._log.info("state changed", state=self.state, live=self.live)
            self.changed()

    # --- calls -------------------------------------------------------------------------------------------------------

    def handle(self, call: IncomingCall) -> None:
        """Starts or answers one call. Raises the answer when it is an error."""
        try:
            self._handle(call)
        except MicroserveError as error:
            request, sub = getattr(call.body, "request_id", ""), getattr(call.body, "sub_id", "")
            tell_failed(type(call.body).__name__, request, sub, call.session, error)
            self._metrics.refused(type(call.body).__name__, error.code)
            raise

    def _handle(self, call: IncomingCall) -> None:
        body = call.body
        _check_role(call.session.role, body)
        match body:
            case StartGenerate():
                self._start(call, body)
            case PrepRecv():
                if not self._book.joined(call, body.sub_id, prepare_key(body)):
                    self._refuse_draining()
                    self._refuse_more()
                    self._kv.prepare(call, body)
            case RemoteSend():
                if not self._book.joined(call, body.sub_id, send_key(body)):
                    self._refuse_draining()
                    self._refuse_more()
                    self._sends.start(call, body)
            case Commit():
                if not self._book.joined(call, body.sub_id, commit_key(body)):
                    self._kv.commit(call, body)
            case Abort():
                freed = self._end(body.sub_id, Cancelled("aborted by its caller"))
                call.reply(Aborted(outcome="freed" if freed else "unknown"))
            case Info():
                call.reply(InfoReply(info=self._info(), load=self.load(), links=self._peers.links()))
            case Stats():
                self._steps.ask(self._statistics, call.reply)
            case Drain():
                self.drain()
                call.reply(Ok())
            case Resume():
                self.resume()
                call.reply(Ok())
            case PeerHello():
                call.reply(self._peers.hello(call.session, body))
            case Meet():
                self._peers.meet(body.peers)
                call.reply(Ok())
            case _ if isinstance(body, KvVerb):
                self._kv.answer(call, body)
            case _:
                raise NotFound(f"an engine has no verb {type(body).__name__}")

    def deliver(self, outputs: list[Output]) -> None:
        """Sends the outputs of one step: one message for each session."""
        answers = []
        for output in outputs:
            request = output.request
            if isinstance(request, Request) and (call := self._live.get(request)) is not None:
                body = output.body
                answers.append(Outgoing(call, body, output.final))  # type: ignore[arg-type]  # a generation's
                if type(body) is Tokens and body.cached is not None:
                    # Said with the first tokens, and never again.
                    self._metrics.first_token(self._clock() - self._began[request])
                if output.final:
                    error = body if isinstance(body, MicroserveError) else None
                    self._forget(request, error)
                    call.on_cancel = None
            elif (sink := self._sinks.get(request)) is not None:
                sink(output)
            # Else it was answered already.
        self.server.send_many(answers)
        if not self._live:
            self.changed()

    def _start(self, call: IncomingCall, body: StartGenerate) -> None:
        if body.lease is None:
            self._refuse_draining()
        prompt = check_generate(body, self._model)
        self._check_prompt(len(prompt) - body.prior_output)
        begin = check_position(body.begin, len(prompt), "begin")
        sampling = body.sampling
        now = self._clock()
        request = Request(
            prompt,
            sampling,
            seed=sampling.seed if sampling.seed is not None else self._draw_seed(),
            prior_output=body.prior_output,
            request_id=body.request_id,
            sub_id=body.sub_id,
            admit_by=check_budget(now, body.admit_by, "admit_by"),
            first_token_by=check_budget(now, body.first_token_by, "first_token_by"),
            deadline=check_finite(call.deadline, "budget"),
        )
        kv_wait = check_finite(body.kv_wait, "kv_wait")
        self._refuse_more()
        self._book.begin_stream(body.sub_id)
        self._live[request] = call
        self._began[request] = now
        self._by_sub_id[body.sub_id] = request
        call.on_cancel = lambda reason: self._cancelled(request, reason)
        if body.lease is None:
            self._steps.submit(request)
        else:
            self._kv.start(request, body.lease, begin, kv_wait)

    def _refuse_draining(self) -> None:
        if self._draining:
            raise Draining("this engine is draining")

    def _refuse_more(self) -> None:
        if self.live >= self._max_live:
            raise Busy(f"{self.live} requests are running or waiting", retry_after=1.0)

    def _cancelled(self, request: Request, reason: MicroserveError) -> None:
        if request in self._live:
            self._end(request.sub_id, reason)

    def _end(self, sub_id: str, error: MicroserveError) -> bool:
        request = self._by_sub_id.get(sub_id)
        if request is None:
            return self._book.abort(sub_id, error)
        call = self._live[request]
        self._forget(request, error)
        # Answered now; the step thread takes note in its next moment.
        call.fail(error)
        call.on_cancel = None
        self._steps.abort(request)
        if not self._live:
            self.changed()
        return True

    def _forget(self, request: Request, error: MicroserveError | None) -> None:
        call = self._live.pop(request)
        del self._by_sub_id[request.sub_id]
        outcome = "ok" if error is None else error.code
        self._metrics.call_ended("StartGenerate", outcome, self._clock() - self._began.pop(request))
        if error is not None:
            tell_failed("StartGenerate", request.request_id, request.sub_id, call.session, error)
        self._book.end_stream(request.sub_id, error)

    def _session_lost(self, session: Session) -> None:
        self._book.forget(session)
        self._kv.owner_lost(session)
        self._peers.session_lost(session)


def _check_role(role: str, body: object) -> None:
    """Raises `Forbidden` where keys are in use and this one is not for that."""
    if role == "client":
        raise Forbidden("a client's key is for routers; an engine serves routers, engines and admins")
    if role == "engine" and not isinstance(body, _PEERS_CALL):
        raise Forbidden(f"an engine's key may not call {type(body).__name__} on another engine")
