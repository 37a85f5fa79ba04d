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

import enum
import itertools
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from microserve.engine.outputs import Computed, Output, Ready
from microserve.engine.plan import SequenceStart, Slice, StepPlan
from microserve.engine.request import ADMITTED, FINAL, HOLDING, NEVER, Request, State
from microserve.engine.sharing import share
from microserve.engine.waiting import Budget, Deadlines, WaitingLine
from microserve.kv.pages import IntegrityError, PageState
from microserve.runtime.errors import (
    Busy,
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    MicroserveError,
)
from microserve.runtime.messages import Generated, Load, Tokens, Usage

if TYPE_CHECKING:
    from microserve.engine.plan import Sampled, StepResult
    from microserve.kv.cache import KvCache

MAX_DEPTH = 2
"""Launched, uncompleted steps: a slice without tokens refers to the one step before it."""

_FEW_PREFILLS = 8
"""Prompts that are admitted though the budget is spoken for, so that a short one is not behind every long one."""
_LOOKAHEAD = 16
"""Requests that wait for another's prefix and may be passed, per step."""
_RETRY_STEPS = 16
"""Steps after which a request that found no pages looks again, even if no page came back."""
_FIRST_PACE = 0.05
"""Seconds between endings, until there is a measurement."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on. `prefill_chunk` bounds one request's share of a step; None leaves it to the budget."""

    max_running: int
    max_waiting: int
    step_tokens: int
    max_context: int
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.step_tokens <= self.max_running:
            raise ConfigError(
                f"step_tokens ({self.step_tokens}) must be larger than max_running ({self.max_running}): "
                "every running request gets a token in every step, and prompts need the rest"
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk must be at least 1, not {self.prefill_chunk}")


@dataclass(slots=True)
class _Flight:
    """A launched step: its plan, the requests that decode in it, and those that prefill, both in the plan's order."""

    plan: StepPlan
    decoding: list[Request]
    prefilling: list[Request]


class _Admission(enum.Enum):
    ADMITTED = enum.auto()
    DEFERRED = enum.auto()
    """Another request computes its prefix right now."""
    NO_PAGES = enum.auto()


class Scheduler:
    """Owns every request between `submit` and its terminal output, and every page that they hold."""

    def __init__(self, cache: KvCache, limits: Limits, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.cache = cache
        self.limits = limits
        self._eos = eos_token_ids
        self._page_size = cache.page_size
        self._ids = itertools.count(1)
        self._live: dict[int, Request] = {}
        """Every request that is not final, or still named by a launched step."""
        self._waiting = WaitingLine()
        self._prefilling: dict[int, Request] = {}
        self._decoding: dict[int, Request] = {}
        self._receiving: dict[int, Request] = {}
        """Requests whose KV is on its way."""
        self._sending: dict[int, Request] = {}
        """Sends that compute no more and keep their pages."""
        self._sends = 0
        """Sends that are not final."""
        self._deadlines = Deadlines(self._live)
        self._flights: deque[_Flight] = deque()
        self._unretired: deque[int] = deque()
        self._done: set[int] = set()
        """Steps that are over, while an older one is not."""
        self._returning: deque[tuple[int, int]] = deque()
        """(step, pages): what was let go and comes back when that step retires."""
        self._forgotten: list[int] = []
        self._outputs: list[Output] = []
        self._builders: dict[tuple[int, bytes], Request] = {}
        """Prefilling requests, by where their uncached part begins and its first page."""
        self._blocked_at: int | None = None
        """Pages that were available when the head of the line did not fit."""
        self._blocked_steps = 0
        self._short: Request | None = None
        """The first in line that found no pages: until it has them, nothing else takes any out of turn."""
        self._steps = 0
        self._counts: Counter[str] = Counter()
        self._pace = _FIRST_PACE
        self._last_end: float | None = None

    # --- requests --------------------------------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        """Most tokens, prompt and output together, that one request can have: the model's limit, or the pool's."""
        # The last token is never an input, so it needs no place in the pool.
        return min(self.limits.max_context, self.cache.total_pages * self._page_size + 1)

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def short(self) -> bool:
        """Whether somebody in line waits for pages: until it has them, no lease and no send takes any."""
        return self._short is not None

    @property
    def in_flight(self) -> int:
        """Steps scheduled and not completed."""
        return len(self._flights)

    @property
    def idle(self) -> bool:
        """No request is live and no step is in flight."""
        return not self._live and not self._flights

    def check_prompt(self, length: int) -> None:
        """Raises `ContextLengthExceeded` when a prompt of `length` tokens can never be served. Safe from any thread."""
        if length + 1 > self.max_context:
            raise ContextLengthExceeded(
                f"the prompt has {length} tokens; at most {self.max_context - 1} fit beside one token of output",
                param="prompt",
            )

    def retry_after(self) -> float:
        """Seconds until a place is likely: the recent pace of endings times the line."""
        return min(30.0, max(0.1, self._pace * (self._waiting.new + 1)))

    def submit(self, request: Request, now: float) -> None:
        """Takes a new request. Raises `ContextLengthExceeded` or `Busy`, which change nothing."""
        self.check_prompt(request.known)
        places = max(0, self.limits.max_running - self.running)
        if len(self._waiting) >= self.limits.max_waiting + places:
            raise Busy(f"{self._waiting.new} requests wait already", retry_after=self.retry_after())
        if self._enter(request, now):
            self._waiting.add(request)

    def _enter(self, request: Request, now: float) -> bool:
        """Makes it one of ours. False: it has ended already."""
        request.id = next(self._ids)
        sampling = request.sampling
        request.stops = frozenset(sampling.stop_token_ids + (() if sampling.ignore_eos else self._eos))
        request.end = min(request.prompt_length + sampling.max_tokens, self.max_context)
        self._live[request.id] = request
        if request.known >= request.end and not request.sends:
            # All the output that was asked for was generated elsewhere.
            self._finish(request, "length", now)
            return False
        self._deadlines.watch(request)
        return True

    # --- KV that comes from other engines ----------------------------------------------------------------------------

    def receive(self, request: Request, now: float) -> None:
        """Takes a request whose `kv` is on its way; `received` or `not_received` follows, unless it ends before.

        Raises `ContextLengthExceeded`, which changes nothing.
        """
        self.check_prompt(request.known)
        request.admit_by = None  # its pages are there: it is admitted as soon as its KV is
        if self._enter(request, now):
            request.move(State.RECEIVING)
            self._receiving[request.id] = request

    def received(self, request: Request) -> None:
        """Its KV has arrived: it is next in line."""
        del self._receiving[request.id]
        request.move(State.WAITING)
        self._waiting.add(request)

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
        if self._sends >= self.limits.max_running:
            raise Busy(f"{self._sends} sends are under way", retry_after=self.retry_after())
        known, size = request.known, self._page_size
        lock = self.cache.acquire(request.history[:known])
        needed = -(-known // size) - len(lock.pages)
        room = self._short is None and self.cache.available() >= needed + self.running
        pages = self.cache.allocate(needed) if room else None
        if pages is None:
            self.cache.release(lock)
            raise Busy(f"{needed} pages are needed and not free", retry_after=self.retry_after())
        self._enter(request, now)
        self._sends += 1
        request.end = NEVER
        request.cached = lock.length
        self._counts["hit"] += lock.length
        self._counts["lookup"] += known
        request.hold(lock, pages, size, 0)
        request.insert_at = known
        request.progressed = self._steps
        if request.remaining:
            request.move(State.PREFILL)
            self._prefilling[request.id] = request
            key = (lock.length, request.history[lock.length : lock.length + size].tobytes())
            request.builds = key
            self._builders.setdefault(key, request)
        else:
            request.move(State.SENDING)
            self._sending[request.id] = request
        self._tell_ready(request)

    def stop_send(self, request: Request) -> None:
        """Computes no more of a send; its pages are kept until `finish_send`. No effect after the end."""
        if request.final or request.stopped:
            return
        request.stopped = True
        request.insert_at = NEVER
        if request.state is State.PREFILL:
            self._hold(request)

    def finish_send(self, request: Request) -> None:
        """The transfer has ended: the send lets go of its pages. No effect after the end."""
        if not request.final:
            self._end(request, State.FINISHED)

    def _hold(self, request: Request) -> None:
        """Nothing more is launched for a send."""
        self._prefilling.pop(request.id, None)
        request.move(State.SENDING)
        self._sending[request.id] = request

    def _tell_ready(self, request: Request) -> None:
        """Whole pages with complete KV enter the tree, and may be sent: from there on they are the tree's pages."""
        if request.computed > request.shared_pages * self._page_size:
            self._insert(request)
        complete = request.computed >= request.known
        until = -(-request.computed // self._page_size) if complete else request.computed // self._page_size
        first = request.ready_pages
        if until > first:
            request.ready_pages = until
            self._outputs.append(Output(request, Ready(first, request.pages[first:until].copy()), False))
        if complete:
            self._outputs.append(Output(request, Computed(request.cached or 0), False))

    def refuse(self, request: Request, error: MicroserveError) -> None:
        """Ends a request that `submit` did not take."""
        self._fail(request, error)

    def abort(self, request: Request) -> bool:
        """Ends `request` without an output; its pages come back when no launched step names them. Whether it was
        alive.
        """
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
        return self._deadlines.next()

    # --- a step ----------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to compute until a step completes or a request arrives."""
        if len(self._flights) >= MAX_DEPTH:
            raise InternalError(f"{len(self._flights)} steps are in flight already")
        self._expire(now)
        fed = self._grow(now)
        slices: list[Slice] = []
        decoding: list[Request] = []
        # Positional arguments and local names: this loop is half the cost of a step.
        add, name = slices.append, decoding.append
        for request in self._decoding.values():
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
            self._admit_waiting(budget)
        prefilling, started = self._plan_prefills(slices, budget)
        if not slices:
            return None
        self._steps += 1
        step = self.cache.begin_step()
        plan = StepPlan(step, tuple(slices), tuple(started), tuple(self._forgotten))
        self._unretired.append(step)
        self._forgotten.clear()
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
        self._retire(flight.plan.step)
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
                self._settle(request)
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
                self._settle(request)
                continue
            sample = next(samples) if part.sample else None
            if request.sends:
                # A stopped one may have lost a step before this one: what follows a gap is nobody's KV.
                if not request.stopped:
                    request.computed = part.start + part.length
                    self._tell_ready(request)
                continue
            request.computed = part.start + part.length
            if request.computed >= request.insert_at and (sample is None or sample.error is None):
                self._insert(request)
            if sample is not None:
                self._deliver(request, sample, now)
            if request.state is State.PREEMPTED:
                self._settle(request)

    def fail(self, step: int, error: MicroserveError) -> None:
        """The executor could not compute `step`: its requests fail with `error`, and what it wrote is not kept."""
        flight = next(flight for flight in self._flights if flight.plan.step == step)
        self._flights.remove(flight)
        self._retire(step)
        # The executor may not have got as far as to forget; to forget twice does no harm.
        self._forgotten.extend(flight.plan.forgotten)
        for request in itertools.chain(flight.decoding, flight.prefilling):
            request.in_flight -= 1
            if request.final:
                self._settle(request)
            else:
                self._fail(request, error)

    def _retire(self, step: int) -> None:
        """`step` touches no page any more. The cache is told in order: a step may fail while an older one runs."""
        self._done.add(step)
        while self._unretired and self._unretired[0] in self._done:
            step = self._unretired.popleft()
            self._done.discard(step)
            self.cache.retire_step(step)
            while self._returning and self._returning[0][0] <= step:
                self._returning.popleft()

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
                self._settle(request)

    # --- decoding --------------------------------------------------------------------------------------------------

    def _grow(self, now: float) -> bool:
        """A page for every decoding request whose next position needs one. False: there were not enough."""
        needy = [
            request
            for request in self._decoding.values()
            if request.scheduled == request.page_capacity and request.scheduled < request.end - 1
        ]
        if not needy:
            return True
        pages = self.cache.allocate(len(needy))
        if pages is not None:
            for request, page in zip(needy, pages.tolist(), strict=True):
                request.add_page(page, self._page_size)
            return True
        # Pages that come back when the steps in flight retire: nobody is preempted for as many.
        coming = self._pages_coming()
        for request in sorted(needy, key=lambda request: request.id):
            while request.state is State.DECODE:
                if (page_array := self.cache.allocate(1)) is not None:
                    request.add_page(int(page_array[0]), self._page_size)
                    break
                if coming > 0:
                    coming -= 1
                    break
                if self.running == 1 and not self._awaits_others():
                    if not self._flights:
                        # Nothing is left to take: it has the pool for itself, except for what is pinned.
                        self._finish(request, "length", now)
                    break
                # A send's pages may be on the wire; it ends soon.
                victim = max(
                    (
                        other
                        for other in itertools.chain(self._prefilling.values(), self._decoding.values())
                        if not other.sends
                    ),
                    key=lambda other: other.id,
                )
                held = victim.page_count
                self._preempt(victim)
                if self._flights and victim is not request:
                    coming += held
        return False

    def _pages_coming(self) -> int:
        """Pages that return when the steps in flight retire."""
        if not self._flights:
            return 0
        leaving = sum(request.page_count for request in self._live.values() if request.state not in HOLDING)
        return leaving + sum(pages for _, pages in self._returning)

    def _awaits_others(self) -> bool:
        """Whether pages are held by sends or leases, which give them back in time."""
        pages = self.cache.allocator.count
        return self._sends > 0 or pages(PageState.LEASED) + pages(PageState.QUARANTINED) > 0

    def _preempt(self, victim: Request) -> None:
        self._counts["preemptions"] += 1
        self._prefilling.pop(victim.id, None)
        self._decoding.pop(victim.id, None)
        victim.move(State.PREEMPTED)
        self._settle(victim)
        self._waiting.add(victim)

    # --- prefill ---------------------------------------------------------------------------------------------------

    def _plan_prefills(self, slices: list[Slice], budget: int) -> tuple[list[Request], list[SequenceStart]]:
        prefilling: list[Request] = []
        started: list[SequenceStart] = []
        shares = share(self._prefilling.values(), budget, self._steps, self.limits.prefill_chunk)
        for identity, tokens in shares.items():
            request = self._prefilling[identity]
            start = request.scheduled
            end = start + tokens
            last = end == request.known
            sample = last and not request.sends
            part = request.history[start:end]
            pages = request.pages[: -(-end // self._page_size)]
            slices.append(Slice(identity, part, start, pages, sample, end - request.prompt_length if sample else 0))
            if not request.introduced:
                request.introduced = True
                started.append(self._start(request))
            request.scheduled = end
            request.in_flight += 1
            request.progressed = self._steps
            prefilling.append(request)
            self._counts["prefilled"] += tokens
            if sample:
                request.move(State.DECODE)
                self._decoding[identity] = self._prefilling.pop(identity)
            elif last:
                self._hold(request)
        return prefilling, started

    def _start(self, request: Request) -> SequenceStart:
        history = request.history[: request.known]
        return SequenceStart(request.id, history, request.prompt_length, request.sampling, request.seed, self._eos)

    # --- admission -------------------------------------------------------------------------------------------------

    def _admit_waiting(self, budget: int) -> None:
        """Admits from the head of the line. Passed are those who wait for a prefix; and whoever needs pages is passed
        by those who hold theirs already: they give them back by running.
        """
        if not self._waiting:
            return
        # Sends take no places: they come out of turn, and many of them must not keep others from running.
        prefilling = [request.remaining for request in self._prefilling.values() if not request.sends]
        count, backlog = len(prefilling), sum(prefilling)
        places = self.limits.max_running - count - len(self._decoding)
        line = self._waiting.first(places + _LOOKAHEAD) if places > 0 else []
        for request in line:
            if places == 0 or (count >= _FEW_PREFILLS and backlog >= budget):
                return
            if request.kv is not None:
                admitted = self._admit_received(request)
            elif self._defers(request):
                continue
            elif request.in_flight or self._blocked() or (outcome := self._admit(request)) is _Admission.NO_PAGES:
                break
            else:
                admitted = outcome is _Admission.ADMITTED
            if admitted:
                places -= 1
                count += 1
                backlog += request.remaining
        else:
            return
        for request in self._waiting.received()[:places]:
            self._admit_received(request)

    def _blocked(self) -> bool:
        """Whether looking for pages again would be in vain: a look-up costs more, the longer the prompt."""
        if self._blocked_at is None or not self.running:
            return False
        self._blocked_steps += 1
        if self._blocked_steps < _RETRY_STEPS and self.cache.available() <= self._blocked_at:
            return True
        self._blocked_at = None
        return False

    def _admit(self, request: Request) -> _Admission:
        known, size = request.known, self._page_size
        # At least the last token is computed: its logits choose the next one.
        lock = self.cache.acquire(request.history[:known], known - 1)
        cached = lock.length
        key = (cached, request.history[cached : cached + size].tobytes())
        if (owner := self._builders.get(key)) is not None and self._defer(request, owner, cached):
            self.cache.release(lock)
            return _Admission.DEFERRED
        needed = -(-known // size) - len(lock.pages)
        # Every running request may need a page soon; without that reserve, the newcomer would be preempted at once.
        pages = self.cache.allocate(needed) if self.cache.available() >= needed + self.running else None
        if pages is None:
            self.cache.release(lock)
            self._blocked_at = self.cache.available()
            self._blocked_steps = 0
            self._short = request
            return _Admission.NO_PAGES
        self._blocked_at = self._short = None
        self._waiting.discard(request)
        request.move(State.PREFILL)
        request.hold(lock, pages, size, -(-(request.end - 1) // size))
        request.insert_at = known
        request.progressed = self._steps
        if request.cached is None:
            request.cached = min(cached, request.prompt_length)
            self._counts["hit"] += cached
            self._counts["lookup"] += known
        self._prefilling[request.id] = request
        request.builds = key
        self._builders[key] = request
        return _Admission.ADMITTED

    def _admit_received(self, request: Request) -> bool:
        """Admits a request with the KV that other engines sent. False: the pages that it needs besides are not there.

        The last token is computed in any case, and never into a page that the tree shares.
        """
        kv, known, size = request.kv, request.known, self._page_size
        if kv is None:
            raise InternalError(f"request {request.sub_id or request.id} has no received KV")
        # Only a prompt that is longer than the one that it was prepared for lacks pages.
        more = self.cache.allocate(max(0, -(-known // size) - kv.pages))
        request.kv = None
        if more is None:
            kv.keep()
            return False
        lock, pages, begin = kv.take()
        matched = lock.length
        if lock.length > known - 1:
            whole, lock = lock, self.cache.acquire(request.history[:known], known - 1)
            self.cache.release(whole)
            begin = lock.length  # the page behind it is a fresh one
        self._waiting.discard(request)
        request.move(State.PREFILL)
        owned = np.concatenate((pages, more)) if len(more) else pages
        request.hold(lock, owned, size, -(-(request.end - 1) // size))
        request.scheduled = request.computed = max(lock.length, min(begin, known - 1))
        request.insert_at = known
        request.progressed = self._steps
        request.cached = min(matched, request.prompt_length)
        self._counts["hit"] += matched
        self._counts["lookup"] += known
        self._prefilling[request.id] = request
        return True

    def _defer(self, request: Request, owner: Request, cached: int) -> bool:
        """Whether `request` should wait for `owner`, which computes at least half of what `request` needs."""
        length = min(owner.known, request.known - 1)
        differ = np.flatnonzero(owner.history[:length] != request.history[:length])
        common = int(differ[0]) if len(differ) else length
        common -= common % self._page_size
        if 2 * (common - cached) < request.known - cached:
            return False
        request.waits_for = (owner, common)
        return self._defers(request)

    def _defers(self, request: Request) -> bool:
        """Whether what `request` waits for is still on its way."""
        if request.waits_for is None:
            return False
        owner, until = request.waits_for
        if owner.state in HOLDING and owner.shared_pages * self._page_size < until and owner.insert_at != NEVER:
            owner.insert_at = min(owner.insert_at, until)
            return True
        request.waits_for = None
        return False

    # --- pages -----------------------------------------------------------------------------------------------------

    def _insert(self, request: Request) -> None:
        """Complete pages with complete KV enter the prefix tree."""
        whole = min(request.computed, request.known) // self._page_size
        if request.lock is not None and whole > request.shared_pages:
            tokens = request.history[: whole * self._page_size]
            request.share(self.cache.insert(tokens, request.pages[:whole], request.lock))
        prefilled = request.computed >= request.known or request.generated > 0 or request.state not in HOLDING
        request.insert_at = NEVER if prefilled or request.stopped else request.known
        if prefilled and request.builds is not None:
            if self._builders.get(request.builds) is request:
                del self._builders[request.builds]
            request.builds = None

    def _settle(self, request: Request) -> None:
        """Lets go of the pages of a request that no longer runs, once no launched step names them."""
        if request.in_flight or request.state is State.SENDING:
            return
        if request.lock is not None:
            self._insert(request)
            if self._unretired:
                self._returning.append((self._unretired[-1], request.page_count))
            self.cache.free(request.pages[request.shared_pages :])
            self.cache.release(request.lock)
            if request.introduced:
                self._forgotten.append(request.id)
            request.let_go()
        if request.final:
            self._live.pop(request.id, None)

    # --- endings ---------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for request, budget in self._deadlines.expired(now):
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
        usage = Usage(
            prompt_tokens=request.prompt_length, completion_tokens=completion, cached_tokens=request.cached or 0
        )
        body = Generated(
            finish_reason=reason,
            usage=usage,
            stop_token=stop_token,
            received_tokens=request.received,
            recomputed_tokens=request.recomputed,
        )
        self._outputs.append(Output(request, body, True))
        self._counts["finished"] += 1
        if self._last_end is not None:
            self._pace += 0.1 * (now - self._last_end - self._pace)
        self._last_end = now
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
        self._waiting.discard(request)
        self._prefilling.pop(request.id, None)
        self._decoding.pop(request.id, None)
        self._receiving.pop(request.id, None)
        if self._sending.pop(request.id, None) is not None or (request.sends and request.state is State.PREFILL):
            self._sends -= 1
        self._blocked_at = None
        if self._short is request:
            self._short = None
        request.move(state)
        request.waits_for = None
        if request.kv is not None:
            kv, request.kv = request.kv, None
            kv.drop()
        self._settle(request)

    # --- what is seen from outside -----------------------------------------------------------------------------------

    def load(self) -> Load:
        """A snapshot. Walks the line, so not for every step."""
        pages = self.cache.statistics()
        queued = self._waiting.tokens() + sum(request.remaining for request in self._prefilling.values())
        return Load(
            running=self.running,
            waiting=len(self._waiting) + len(self._receiving),
            queued_tokens=queued,
            free_pages=pages.free,
            owned_pages=pages.owned,
            cached_pages=pages.cached,
            leased_pages=pages.leased,
            quarantined_pages=pages.quarantined,
            total_pages=self.cache.total_pages,
            generated_tokens=self._counts["generated"],
            prefilled_tokens=self._counts["prefilled"],
            prefix_hit_tokens=self._counts["hit"],
            prefix_lookup_tokens=self._counts["lookup"],
            preemptions=self._counts["preemptions"],
            steps=self._steps,
        )

    def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        names = ("finished", "failed", "generated", "prefilled", "hit", "lookup", "preemptions")
        values: dict[str, float] = {f"scheduler_{name}": float(self._counts[name]) for name in names}
        values["scheduler_steps"] = float(self._steps)
        values["scheduler_live"] = float(len(self._live))
        values["scheduler_in_flight"] = float(len(self._flights))
        return values

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when a page has two owners or none, or a request is not where its state says."""
        self.cache.check_integrity()
        places = {
            State.PREFILL: self._prefilling,
            State.DECODE: self._decoding,
            State.RECEIVING: self._receiving,
            State.SENDING: self._sending,
        }
        owned: list[int] = []
        for request in self._live.values():
            for state, place in places.items():
                if (request.id in place) is not (request.state is state):
                    raise IntegrityError(f"request {request.id} is {request.state.value}, and not where that belongs")
            if (request in self._waiting) is not (request.state in (State.WAITING, State.PREEMPTED)):
                raise IntegrityError(f"request {request.id} is {request.state.value}, which is wrong for the line")
            named = sum(request in [*flight.decoding, *flight.prefilling] for flight in self._flights)
            if named != request.in_flight:
                raise IntegrityError(f"request {request.id}: {named} steps name it, and it counts {request.in_flight}")
            if request.final and not request.in_flight:
                raise IntegrityError(f"request {request.id} is {request.state.value} and still held")
            if request.state in ADMITTED and not request.computed <= request.scheduled <= request.page_capacity:
                raise IntegrityError(f"request {request.id} computes beyond its {request.page_capacity} positions")
            owned.extend(request.pages[request.shared_pages :].tolist())
        if self._sends != sum(request.sends and not request.final for request in self._live.values()):
            raise IntegrityError(f"{self._sends} sends are counted, and others are live")
        lost = self._prefilling.keys() | self._decoding.keys() | self._receiving.keys() | self._sending.keys()
        if lost := lost - self._live.keys():
            raise IntegrityError(f"requests {sorted(lost)} run and are not live")
        if len(set(owned)) != len(owned):
            raise IntegrityError("a page belongs to two requests")
        counted = self.cache.statistics().owned
        # With a step in flight, pages that were let go count as owned until it has retired.
        if len(owned) > counted or (len(owned) < counted and not self._unretired):
            raise IntegrityError(f"requests own {len(owned)} pages; the cache counts {counted}")
