"""What the next step computes: continuous batching over a paged prefix cache. Pure: no torch, no sockets, no clock.

The caller alternates `schedule` and `complete`, one to one and in order; with an executor of depth 2, `schedule` of
step n + 1 comes before `complete` of step n. Tokens, endings and errors gather in `take_outputs`.

A step holds one token of every decoding request, then chunks of prompts. Every decoding request gets its token in
every step, because `Limits` makes the token budget larger than the number of requests. When a decoding request finds
no page, the one that arrived last is preempted: its complete pages go to the prefix tree, and it recomputes later
what has been evicted by then.

With a step in flight its tokens are not known yet. So a request may end one step after its last slice was launched:
the extra token is dropped, and its pages stay its own until no launched step names them.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.engine.admission import Admission
from microserve.engine.growth import Growth
from microserve.engine.holdings import Holdings
from microserve.engine.limits import Limits
from microserve.engine.outputs import Output
from microserve.engine.plan import SequenceStart, Slice, StepPlan
from microserve.engine.request import FINAL, Request, State
from microserve.engine.roster import Roster
from microserve.engine.send_requests import SendRequests
from microserve.engine.sharing import share
from microserve.engine.waiting import Budget, Pace
from microserve.kv.pages import IntegrityError
from microserve.runtime.errors import Busy, ContextLengthExceeded, DeadlineExceeded, InternalError, MicroserveError
from microserve.runtime.messages import Generated, Load, Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.plan import Sampled, StepResult
    from microserve.kv.cache import KvCache

MAX_DEPTH = 2
"""Launched, uncompleted steps: a slice without tokens refers to the one step before it."""


@dataclass(slots=True)
class _Flight:
    """A launched step: its plan, the requests that decode in it, and those that prefill, both in the plan's order."""

    plan: StepPlan
    decoding: list[Request]
    prefilling: list[Request]


class Scheduler:
    """Owns every request between `submit` and its terminal output, and every page that they hold."""

    def __init__(self, cache: KvCache, limits: Limits, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.cache = cache
        self.limits = limits
        self._eos = eos_token_ids
        self._page_size = cache.page_size
        self._ids = itertools.count(1)
        self.admitted: Callable[[float], None] = lambda seconds: None
        """Told of every generation's first step: how long after its arrival."""
        self._counts: Counter[str] = Counter()
        self._roster = Roster()
        self._holdings = Holdings(cache, self._roster)
        self._admission = Admission(self._roster, self._holdings, limits, self._counts)
        self._growth = Growth(self._roster, self._holdings, self._counts)
        self._sends = SendRequests(self._roster, self._holdings, self._counts, self.tell)
        self._flights: deque[_Flight] = deque()
        self._outputs: list[Output] = []
        self._steps = 0
        self._pace = Pace()

    # --- requests --------------------------------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        """Most tokens, prompt and output together, that one request can have: the model's limit, or the pool's."""
        # The last token is never an input, so it needs no place in the pool.
        return min(self.limits.max_context, self.cache.total_pages * self._page_size + 1)

    @property
    def running(self) -> int:
        """Requests that steps compute for, sends included."""
        return self._roster.running

    @property
    def short(self) -> bool:
        """Whether somebody in line waits for pages: until it has them, no lease and no send takes any."""
        return self._admission.short

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._roster.waiting)

    @property
    def in_flight(self) -> int:
        """Steps scheduled and not completed."""
        return len(self._flights)

    @property
    def idle(self) -> bool:
        """No request is live and no step is in flight."""
        return not self._roster.live and not self._flights

    def check_prompt(self, length: int) -> None:
        """Raises `ContextLengthExceeded` when a prompt of `length` tokens can never be served. Safe from any thread.

        Output that was generated elsewhere is no part of it: whoever has all that fits ends with "length".
        """
        if length + 1 > self.max_context:
            raise ContextLengthExceeded(
                f"the prompt has {length} tokens; at most {self.max_context - 1} fit beside one token of output",
                param="prompt",
            )

    def retry_after(self) -> float:
        """Seconds until a place is likely: the recent pace of endings times the line."""
        return min(30.0, max(0.1, self._pace.seconds * (self._roster.waiting.new + 1)))

    def submit(self, request: Request, now: float) -> None:
        """Takes a new request. Raises `ContextLengthExceeded` or `Busy`, which change nothing."""
        self.check_prompt(request.prompt_length)
        if len(self._roster.waiting) >= self.limits.max_waiting + max(0, self._admission.places()):
            raise Busy(f"{self._roster.waiting.new} requests wait already", retry_after=self.retry_after())
        if self._enter(request, now):
            self._roster.waiting.add(request)

    def _enter(self, request: Request, now: float) -> bool:
        """Makes it one of ours. False: it has ended already."""
        request.id = next(self._ids)
        request.entered = now
        sampling = request.sampling
        request.stops = frozenset(sampling.stop_token_ids + (() if sampling.ignore_eos else self._eos))
        request.end = min(request.prompt_length + sampling.max_tokens, self.max_context)
        self._roster.live[request.id] = request
        if request.known >= request.end and not request.sends:
            # All the output that was asked for was generated elsewhere.
            self._finish(request, "length", now)
            return False
        self._roster.deadlines.watch(request)
        return True

    # --- KV that comes from other engines ----------------------------------------------------------------------------

    def receive(self, request: Request, now: float) -> None:
        """Takes a request whose `kv` is on its way; `received` or `not_received` follows, unless it ends before.

        Raises `ContextLengthExceeded`, which changes nothing.
        """
        self.check_prompt(request.prompt_length)
        request.admit_by = None  # its pages are there: it is admitted as soon as its KV is
        if self._enter(request, now):
            request.move(State.RECEIVING)
            self._roster.receiving[request.id] = request

    def received(self, request: Request) -> None:
        """Its KV has arrived: it is next in line."""
        del self._roster.receiving[request.id]
        request.move(State.WAITING)
        self._roster.waiting.add(request)

    def not_received(self, request: Request) -> None:
        """Its KV will not come: it computes what the prefix tree does not have, in pages of its own."""
        request.kv = None
        self.received(request)

    # --- KV that goes to other engines -------------------------------------------------------------------------------

    def submit_send(self, request: Request, now: float) -> None:
        """Takes a send: KV of all of `request`'s prompt is computed where the prefix tree does not have it.

        Its pages are told as they become `Ready`, and kept until `finish_send`. Nobody waits while holding pages that
        another waits for, so without room it raises `Busy` at once. Raises `ContextLengthExceeded`, too.
        """
        self.check_prompt(request.known)
        if self._roster.sends >= self.limits.max_running:
            raise Busy(f"{self._roster.sends} sends are under way", retry_after=self.retry_after())
        if missing := self._sends.hold(request, short=self.short):
            raise Busy(f"{missing} pages are needed and not free", retry_after=self.retry_after())
        self._enter(request, now)
        self._sends.begin(request, self._steps)

    def stop_send(self, request: Request) -> None:
        """Computes no more of a send; its pages are kept until `finish_send`. No effect after the end."""
        self._sends.stop(request)

    def finish_send(self, request: Request) -> None:
        """The transfer has ended: the send lets go of its pages. No effect after the end."""
        if not request.final:
            self._end(request, State.FINISHED)

    def refuse(self, request: Request, error: MicroserveError) -> None:
        """Ends a request that `submit` did not take."""
        self._fail(request, error)

    def abort(self, request: Request) -> bool:
        """Ends `request` without an output; pages come back when no launched step names them. Whether it was alive."""
        if request.final:
            return False
        if request.sends:
            self.stop_send(request)
        else:
            self._end(request, State.ABORTED)
        return True

    def tell(self, output: Output) -> None:
        """Adds to the outputs what another part of the step thread has to tell."""
        self._outputs.append(output)

    def take_outputs(self) -> list[Output]:
        """What there is to tell since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_deadline(self) -> float | None:
        """When `schedule` should be called even if nothing else happens."""
        return self._roster.deadlines.next()

    # --- a step ----------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to compute until a step completes or a request arrives."""
        if len(self._flights) >= MAX_DEPTH:
            raise InternalError(f"{len(self._flights)} steps are in flight already")
        self._expire(now)
        fed = self._growth.feed(lambda request: self._finish(request, "length", now))
        slices: list[Slice] = []
        decoding: list[Request] = []
        # Positional arguments and local names: this loop is half the cost of a step.
        add, name = slices.append, decoding.append
        for request in self._roster.decoding.values():
            start = request.scheduled
            following = start + 1
            if following >= request.end or start == request.page_capacity:
                continue  # Its last token is in flight, or it waits for a page.
            tokens = request.history[start:following] if start < request.known else None
            add(Slice(request.id, tokens, start, request.pages, True, following - request.prompt_length))
            request.scheduled = following
            request.in_flight += 1
            name(request)
        budget = self.limits.step_tokens - len(slices)
        if fed:
            # Whoever is admitted takes pages that a starved decode waits for.
            self._admission.admit(budget, self._steps)
        prefilled = self._counts["prefilled"]
        prefilling, started = self._plan_prefills(slices, budget, now)
        if not slices:
            return None
        self._steps += 1
        step, forgotten = self._holdings.begin_step()
        plan = StepPlan(step, tuple(slices), tuple(started), forgotten, self._counts["prefilled"] - prefilled)
        self._flights.append(_Flight(plan, decoding, prefilling))
        return plan

    def complete(self, result: StepResult, now: float) -> None:
        """Takes the result of the oldest step in flight."""
        flight = self._flights[0]
        slices = flight.plan.slices
        wanted = len(flight.decoding) + sum(part.sample for part in slices[len(flight.decoding) :])
        if result.step != flight.plan.step or len(result.sampled) != wanted:
            self.fail(flight.plan.step, InternalError(f"the executor answered step {flight.plan.step} with another"))
            return
        self._flights.popleft()
        self._holdings.retire(flight.plan.step)
        self._counts["generated"] += wanted
        send, decode = self._outputs.append, State.DECODE
        for request, sampled in zip(flight.decoding, result.sampled, strict=False):
            request.in_flight -= 1
            state, token, known = request.state, sampled.token, request.known
            if (
                state is decode
                and token not in request.stops
                and known + 1 != request.end
                and known < request.room
                and sampled.sequence == request.id
                and sampled.logprobs is None
                and sampled.error is None
            ):
                # `_deliver` for nearly every token, without its calls: this loop is the other half.
                request.computed += 1
                request.history[known] = token
                request.known = known + 1
                send(Output(request, Tokens(ids=token.to_bytes(4, "little")), False))
            elif state in FINAL:
                self._counts["generated"] -= 1
                self._holdings.settle(request)
            else:
                request.computed += 1
                self._deliver(request, sampled, now)
        samples = iter(result.sampled[len(flight.decoding) :])
        for request, part in zip(flight.prefilling, slices[len(flight.decoding) :], strict=True):
            request.in_flight -= 1
            if request.state in FINAL:
                if part.sample:
                    next(samples)
                    self._counts["generated"] -= 1
                self._holdings.settle(request)
                continue
            sample = next(samples) if part.sample else None
            if request.sends:
                self._sends.advance(request, part.start + part.length)
                continue
            request.computed = part.start + part.length
            if request.computed >= request.insert_at and (sample is None or sample.error is None):
                self._holdings.insert(request)
            if sample is not None:
                self._deliver(request, sample, now)
            if request.state is State.PREEMPTED:
                self._holdings.settle(request)

    def fail(self, step: int, error: MicroserveError) -> None:
        """The executor could not compute `step`: its requests fail with `error`, and what it wrote is not kept."""
        flight = next(flight for flight in self._flights if flight.plan.step == step)
        self._flights.remove(flight)
        self._holdings.retire(step)
        self._holdings.forget_again(flight.plan.forgotten)
        for request in itertools.chain(flight.decoding, flight.prefilling):
            request.in_flight -= 1
            if request.final:
                self._holdings.settle(request)
            else:
                self._fail(request, error)

    def _deliver(self, request: Request, sampled: Sampled, now: float) -> None:
        token = sampled.token
        known = request.known
        if sampled.sequence != request.id:
            self._fail(request, InternalError(f"the executor sampled {sampled.sequence} in place of {request.id}"))
        elif sampled.error is not None:
            request.computed = 0  # what it wrote may be no numbers either: nobody is to reuse it
            self._fail(request, InternalError(sampled.error))
        elif token in request.stops and known >= request.min_known:
            self._finish(request, "stop", now, stop_token=token)
        else:
            cached = None if request.generated else request.cached
            request.append(token)
            ids = token.to_bytes(4, "little")
            logprobs = None if sampled.logprobs is None else [sampled.logprobs]
            self._outputs.append(Output(request, Tokens(ids=ids, logprobs=logprobs, cached=cached), False))
            if known + 1 == request.end:
                self._finish(request, "length", now)
            elif request.state is State.PREEMPTED:
                self._holdings.settle(request)

    # --- prefill ---------------------------------------------------------------------------------------------------

    def _plan_prefills(self, slices: list[Slice], budget: int, now: float) -> tuple[list[Request], list[SequenceStart]]:
        prefilling: list[Request] = []
        started: list[SequenceStart] = []
        shares = share(self._roster.prefilling.values(), budget, self._steps, self.limits.prefill_chunk)
        for identity, tokens in shares.items():
            request = self._roster.prefilling[identity]
            start = request.scheduled
            end = start + tokens
            last = end == request.known
            sample = last and not request.sends
            part = request.history[start:end]
            pages = request.pages[: -(-end // self._page_size)]
            slices.append(Slice(identity, part, start, pages, sample, end - request.prompt_length if sample else 0))
            if not request.introduced:
                request.introduced = True
                if request.entered is not None and not request.sends:
                    self.admitted(now - request.entered)
                request.entered = None
                history = request.history[: request.known]
                prompt, sampling, seed = request.prompt_length, request.sampling, request.seed
                started.append(SequenceStart(identity, history, prompt, sampling, seed, self._eos))
            request.scheduled = end
            request.in_flight += 1
            request.progressed = self._steps
            prefilling.append(request)
            self._counts["prefilled"] += tokens
            if sample:
                request.move(State.DECODE)
                self._roster.decoding[identity] = self._roster.prefilling.pop(identity)
            elif last:
                self._roster.keep(request)
        return prefilling, started

    # --- endings ---------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for request, budget in self._roster.deadlines.expired(now):
            if request.final:
                continue
            if budget is Budget.WHOLE:
                self._fail(request, DeadlineExceeded("the request's time is over", param=budget.value))
            elif budget is Budget.ADMIT and request.state is State.WAITING:
                self._fail(request, Busy("no room in time", param=budget.value, retry_after=self.retry_after()))
            elif budget is Budget.FIRST_TOKEN and request.generated == 0 and not request.sends:
                self._fail(request, DeadlineExceeded("no first token in time", param=budget.value))

    def _finish(self, request: Request, reason: str, now: float, *, stop_token: int | None = None) -> None:
        """The normal end. The token that stopped it is counted, and not part of the output."""
        completion = request.known - request.prompt_length + (stop_token is not None)
        prompt, cached = request.prompt_length, request.cached or 0
        body = Generated(
            finish_reason=reason,
            usage=Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached),
            stop_token=stop_token,
            received_tokens=request.received,
            recomputed_tokens=request.recomputed,
        )
        self._outputs.append(Output(request, body, True))
        self._counts["finished"] += 1
        self._pace.ended(now)
        self._end(request, State.FINISHED)

    def _fail(self, request: Request, error: MicroserveError) -> None:
        if request.sends:
            if not request.stopped:
                # Its pages may be on the wire: whoever sends them is told, and ends it.
                self._outputs.append(Output(request, error, True))
                self._counts["failed"] += 1
                self.stop_send(request)
            return
        self._outputs.append(Output(request, error, True))
        self._counts["failed"] += 1
        self._end(request, State.FAILED)

    def _end(self, request: Request, state: State) -> None:
        self._roster.leave(request)
        self._admission.ended(request)
        request.move(state)
        request.waits_for = None
        if request.kv is not None:
            kv, request.kv = request.kv, None
            kv.drop()
        self._holdings.settle(request)

    # --- what is seen from outside -----------------------------------------------------------------------------------

    def load(self) -> Load:
        """A snapshot. Walks the line, so not for every step."""
        return self._roster.load(self.cache.statistics(), self._counts, self._steps)

    def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        names = ("finished", "failed", "generated", "prefilled", "hit", "lookup", "preemptions")
        values: dict[str, float] = {f"scheduler_{name}": float(self._counts[name]) for name in names}
        values["scheduler_steps"] = float(self._steps)
        values["scheduler_live"] = float(len(self._roster.live))
        values["scheduler_in_flight"] = float(len(self._flights))
        return values

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raises `IntegrityError` when a page has two owners or none, or a request is not where its state says."""
        self._roster.check_integrity()
        self._holdings.check_integrity(deep=deep)
        for request in self._roster.live.values() if deep else ():
            named = sum(request in [*flight.decoding, *flight.prefilling] for flight in self._flights)
            if named != request.in_flight:
                raise IntegrityError(f"request {request.id}: {named} steps name it, and it counts {request.in_flight}")


__all__ = ["MAX_DEPTH", "Limits", "Scheduler"]
