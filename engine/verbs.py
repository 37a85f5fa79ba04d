"""The engine's side of the bus: checks what arrives, keeps the books of open calls, answers what needs no step.

Lives on the asyncio thread. Exactly one terminal answer leaves for every call; once it has, late outputs of the call
are dropped.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from microserve.engine.request import Request
from microserve.runtime.clock import monotonic
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import Busy, Cancelled, Draining, InvalidRequest, MicroserveError, NotFound
from microserve.runtime.log import get_logger
from microserve.runtime.messages import (
    Abort,
    Aborted,
    Drain,
    EngineInfo,
    Info,
    InfoReply,
    Load,
    Ok,
    Resume,
    SamplingParams,
    StartGenerate,
    Stats,
    StatsReply,
)
from microserve.runtime.rpc import Outgoing, RpcServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.plan import TokenArray
    from microserve.engine.scheduler import Output
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


class EngineVerbs:
    """Answers calls; give `server` to `Bus.listen`, and `deliver` to the step loop.

    `check_prompt` raises for a prompt that is too long. `max_live` bounds the open generations, those in the inbox
    included. `statistics` runs in the step thread. `draw_seed` gives the seed of a request that brings none.
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        info: Callable[[], EngineInfo],
        check_prompt: Callable[[int], None],
        statistics: Callable[[], StatsReply],
        max_live: int,
        clock: Clock = monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.server = RpcServer(self.handle, clock=clock)
        self.steps: Steps
        """Set before the first call can arrive."""
        self.changed: Callable[[], None] = lambda: None
        """Called when the engine's state has changed, or the last generation has ended."""
        self._model = model
        self._info = info
        self._check_prompt = check_prompt
        self._statistics = statistics
        self._max_live = max_live
        self._clock = clock
        self._draw_seed = draw_seed
        self._log = get_logger(__name__)
        self._live: dict[str, tuple[IncomingCall, Request]] = {}
        self._draining = False

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Generations without a terminal answer."""
        return len(self._live)

    @property
    def state(self) -> str:
        return "draining" if self._draining else "ready"

    def load(self) -> Load:
        """The last snapshot, with the state as it is now."""
        return msgspec.structs.replace(self.steps.load, state=self.state)

    def drain(self) -> None:
        """Refuse new generations from now on. Idempotent."""
        self._set_draining(True)

    def resume(self) -> None:
        """Take new generations again. Idempotent."""
        self._set_draining(False)

    def end_all(self, error: MicroserveError) -> None:
        """Answers every open generation with `error`, and aborts it."""
        for sub_id in list(self._live):
            self._end(sub_id, error)

    def _set_draining(self, draining: bool) -> None:
        if draining is not self._draining:
            self._draining = draining
            self._log.info("state changed", state=self.state, live=self.live)
            self.changed()

    # --- calls -------------------------------------------------------------------------------------------------------

    def handle(self, call: IncomingCall) -> None:
        """Starts or answers one call. Raises the answer when it is an error."""
        body = call.body
        match body:
            case StartGenerate():
                self._start(call, body)
            case Abort():
                freed = self._end(body.sub_id, Cancelled("aborted by its caller"))
                call.reply(Aborted(outcome="freed" if freed else "unknown"))
            case Info():
                call.reply(InfoReply(info=self._info(), load=self.load()))
            case Stats():
                self.steps.ask(self._statistics, call.reply)
            case Drain():
                self.drain()
                call.reply(Ok())
            case Resume():
                self.resume()
                call.reply(Ok())
            case _:
                raise NotFound(f"an engine has no verb {type(body).__name__}")

    def deliver(self, outputs: list[Output]) -> None:
        """Sends the outputs of one step: one message for each session."""
        answers = []
        for output in outputs:
            request = output.request
            entry = self._live.get(request.sub_id)
            # Answered already, and another call may have its id by now.
            if entry is None or entry[1] is not request:
                continue
            answers.append(Outgoing(entry[0], output.body, output.final))
            if output.final:
                del self._live[request.sub_id]
                entry[0].on_cancel = None
        self.server.send_many(answers)
        if not self._live:
            self.changed()

    def _start(self, call: IncomingCall, body: StartGenerate) -> None:
        if self._draining:
            raise Draining("this engine is draining")
        if not body.sub_id:
            raise InvalidRequest("sub_id must not be empty", param="sub_id")
        if body.sub_id in self._live:
            raise InvalidRequest(f"sub-request {body.sub_id!r} is running already", param="sub_id")
        prompt = check_generate(body, self._model)
        self._check_prompt(len(prompt))
        if len(self._live) >= self._max_live:
            raise Busy(f"{len(self._live)} requests are running or waiting", retry_after=1.0)
        sampling = body.sampling
        now = self._clock()
        request = Request(
            prompt,
            sampling,
            seed=sampling.seed if sampling.seed is not None else self._draw_seed(),
            prior_output=body.prior_output,
            request_id=body.request_id,
            sub_id=body.sub_id,
            admit_by=_instant(now, body.admit_by, "admit_by"),
            first_token_by=_instant(now, body.first_token_by, "first_token_by"),
            deadline=_finite(call.deadline, "budget"),
        )
        self._live[body.sub_id] = (call, request)
        call.on_cancel = lambda reason: self._cancelled(request, reason)
        self.steps.submit(request)

    def _cancelled(self, request: Request, reason: MicroserveError) -> None:
        entry = self._live.get(request.sub_id)
        if entry is not None and entry[1] is request:
            self._end(request.sub_id, reason)

    def _end(self, sub_id: str, error: MicroserveError) -> bool:
        entry = self._live.pop(sub_id, None)
        if entry is None:
            return False
        call, request = entry
        # Answered now; the step thread takes note when its step is over.
        call.fail(error)
        call.on_cancel = None
        self.steps.abort(request)
        if not self._live:
            self.changed()
        return True


def check_generate(body: StartGenerate, model: ModelInfo) -> TokenArray:
    """The prompt, int32 [n]. Raises `InvalidRequest` that names the argument; what msgspec has checked is not checked
    again.
    """
    prompt = unpack_tokens(body.prompt)
    if not len(prompt):
        raise InvalidRequest("the prompt is empty", param="prompt")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"token id {wrong} is not in the vocabulary (0 to {model.vocab_size - 1})", param="prompt")
    if not 0 <= body.begin <= len(prompt):
        raise InvalidRequest(f"begin must lie between 0 and {len(prompt)}, not {body.begin}", param="begin")
    if body.prior_output > len(prompt):
        raise InvalidRequest(
            f"prior_output is {body.prior_output}, but the prompt has {len(prompt)} tokens", param="prior_output"
        )
    _check_sampling(body.sampling, model.vocab_size)
    return prompt


def _check_sampling(sampling: SamplingParams, vocabulary: int) -> None:
    for token in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(f"token id {token} is not in the vocabulary", param="logit_bias")
    for token in sampling.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(f"token id {token} is not in the vocabulary", param="stop_token_ids")
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({sampling.min_tokens}) exceeds max_tokens ({sampling.max_tokens})", param="min_tokens"
        )


def _finite(value: float | None, name: str) -> float | None:
    # The wire's limits keep NaN out, and infinity only where they have an upper end.
    if value is not None and not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number", param=name)
    return value


def _instant(now: float, budget: float | None, name: str) -> float | None:
    finite = _finite(budget, name)
    return None if finite is None else now + finite
