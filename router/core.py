"""The router without its doors: models, admission, generations. HTTP and the bus are thin layers over it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from microserve.router.dispatch import Dispatcher, Generation, State
from microserve.router.events import EventLog
from microserve.router.fleet import EngineFleet
from microserve.router.inspection import Inspection
from microserve.router.strategies.catalog import Catalog
from microserve.router.strategy import Request
from microserve.router.versions import Versions
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    ContextLengthExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    MicroserveError,
    ModelNotFound,
    NoEngine,
    NotFound,
    PeerLost,
)
from microserve.runtime.log import get_logger
from microserve.runtime.membership import Roster
from microserve.runtime.messages import (
    CacheEvict,
    CachePin,
    CacheUnpin,
    Claim,
    ClaimEnded,
    Drain,
    Meet,
    ModelInfo,
    PeerAddress,
    PeerHello,
    Resume,
    SamplingParams,
    StatusReply,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.router.metrics import RouterMetrics
    from microserve.router.strategy import Program
    from microserve.router.text import TextModel
    from microserve.runtime.bus import Bus
    from microserve.runtime.clock import Clock
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.config import RouterConfig
    from microserve.runtime.messages import EngineInfo, EngineVerb, Load, Requests, Strategies
    from microserve.runtime.rpc import CallStream

_MOST_RETRY_AFTER = 30.0
_SMOOTHING = 0.1
_LAST_WAIT = 1.0
_REFUSALS = 5.0
"""Seconds between events that tell of refusals of one kind."""
_MEET_AFTER = 0.05
"""Seconds after a change of the fleet until engines are told of each other."""
_MEET_BUDGET = 10.0

_DEEDS = {
    Drain: "drain",
    Resume: "resume",
    CachePin: "pin a prefix",
    CacheUnpin: "unpin a prefix",
    CacheEvict: "evict from the cache",
}
"""What operators do to engines, in words."""

_log = get_logger(__name__)


@dataclass(slots=True)
class GenerationSpec:
    """One choice to generate. `prompt` is int32 [n]; `model` "" means the only (or first) one.

    `timeout` in seconds, at most the router's own; None: the router's. `choice_of` is the id of the whole request where
    that has several choices: one version serves all of them.
    """

    request_id: str
    model: str
    prompt: TokenArray
    sampling: SamplingParams
    timeout: float | None = None
    choice_of: str = ""


class RouterCore:
    """One router. Everything runs on one event loop; `start` it there and `close` it at the end."""

    def __init__(
        self,
        config: RouterConfig,
        bus: Bus,
        program: Program | Versions,
        *,
        metrics: RouterMetrics,
        load_text: Callable[[str], TextModel],
        clock: Clock = time.monotonic,
        version: str = "",
    ) -> None:
        """`load_text` loads the text side of a model from its path; it is called in a thread.

        A `program` alone serves everything, beside the strategies that are built in.
        """
        self.config = config
        self.metrics = metrics
        self.versions = program if isinstance(program, Versions) else Versions(program, Catalog.built_in())
        """Which program serves new requests. Those in flight keep theirs."""
        self.http_url = ""
        self.draining = False
        self.events = EventLog(clock=clock)
        self.inspection = Inspection(clock)
        self.roster = Roster(silence=config.engine_silence, clock=clock)
        self.fleet = EngineFleet(bus, prepare=self._prepare, clock=clock)
        self.fleet.event = self.events.add
        self.versions.changed = lambda told: self.events.add("strategy", detail=told)
        self.versions.models = lambda: {link.info.model.name for link in self.fleet.links}
        self._me = bus.me
        self._version = version
        self._clock = clock
        self._started_at = clock()
        self._load_text = load_text
        self._texts: dict[str, TextModel] = {}
        self._text_errors: dict[str, str] = {}
        self._loading: dict[str, asyncio.Future[TextModel]] = {}
        self._dispatcher = Dispatcher(
            self.fleet,
            ended=self._ended,
            clock=clock,
            observer=metrics.gap_observer,
            sub_ended=metrics.sub_ended,
        )
        self._active: dict[Generation, None] = {}
        """In the order in which they got a place."""
        self._queue: deque[Generation] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_end = clock()
        self._end_interval = 0.0
        self._sweeping: asyncio.TimerHandle | None = None
        metrics.active, metrics.queued = lambda: len(self._active), lambda: len(self._queue)
        metrics.engines = self.fleet.snapshot
        metrics.versions = self._versions_in_use
        metrics.serving, metrics.events = self.versions.serving, lambda: self.events.counts
        metrics.version, metrics.started_at = version, time.time()
        self._meeting: asyncio.TimerHandle | None = None
        self.fleet.changed = self._fleet_changed
        metrics.bus = self._bus_statistics = bus.statistics
        self._bus_refusals = 0
        """Of which the event log has been told."""

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch for engines that fall silent, and for whom the bus refuses."""
        self.fleet.apply(self.roster.sweep())
        refused = self._bus_statistics().unauthorized
        if refused > self._bus_refusals:
            self.events.add(
                "refused", detail=f"{refused - self._bus_refusals} without a key that is let in, by the bus"
            )
            self._bus_refusals = refused
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(self.config.engine_silence / 4, self.start)

    def drain(self) -> None:
        """Refuse what is new from now on; what was accepted is finished. Idempotent."""
        self.draining = True

    def http_refused(self, reason: str) -> None:
        """A request over HTTP had no key that is let in, or not for that."""
        self.metrics.unauthorized(reason)
        self.events.add("refused", detail=f"{reason}, over HTTP", every=_REFUSALS)

    def configure(self, config: RouterConfig) -> None:
        """Another configuration is in effect; what was accepted keeps its limits."""
        self.config = config
        self._advance()

    def check_open(self) -> None:
        """Raises `Draining` when nothing new is taken."""
        if self.draining:
            raise Draining("this router finishes what it has and takes nothing new", retry_after=1.0)

    async def wait_idle(self) -> None:
        """Returns when nothing runs and nothing waits."""
        await self._idle.wait()

    async def close(self) -> None:
        """End what is left, let go of the engines. No task remains (but of a strategy that refuses to end)."""
        self.draining = True
        for timer in (self._sweeping, self._meeting):
            if timer is not None:
                timer.cancel()
        tasks = [task for generation in (*self._queue, *self._active) if (task := generation.task) is not None]
        for generation in (*self._queue, *self._active):
            generation.refuse(Draining("the router stops"))
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WAIT)
        await self.fleet.close()
        if self._loading:
            await asyncio.gather(*self._loading.values(), return_exceptions=True)

    # --- membership ------------------------------------------------------------------------------------------------

    def announce(self, info: EngineInfo, load: Load) -> None:
        """An engine says who it is. Raises `InvalidRequest` for an incarnation that is over."""
        self.fleet.apply(self.roster.announce(info, load))
        self.fleet.report(info.engine_id, load)

    def heartbeat(self, engine_id: str, epoch: int, load: Load) -> None:
        """An engine says that it lives. Raises `NotFound` when it must announce itself first."""
        self.fleet.apply(self.roster.heartbeat(engine_id, epoch, load))
        self.fleet.report(engine_id, load)

    def leave(self, engine_id: str, epoch: int) -> None:
        """An engine says goodbye."""
        self.fleet.apply(self.roster.leave(engine_id, epoch))

    def _fleet_changed(self) -> None:
        """Tells engines of each other soon, once for changes that come together."""
        if self._meeting is None and not self.draining:
            self._meeting = asyncio.get_running_loop().call_later(_MEET_AFTER, self._introduce)

    def _introduce(self) -> None:
        self._meeting = None
        links = [link for link in self.fleet.links if link.client is not None and not link.client.closed]
        for link in links:
            peers = [
                PeerAddress(engine_id=other.id, epoch=other.info.epoch, endpoint=other.info.endpoint)
                for other in links
                if other is not link and other.info.model.name == link.info.model.name
            ]
            if peers and link.client is not None:
                with contextlib.suppress(PeerLost):  # then the fleet hears of it, and this is called again
                    # Its answer says nothing that anybody waits for.
                    link.client.stream(Meet(peers=peers), budget=_MEET_BUDGET)

    # --- engines, for operators and for programs outside of the router -----------------------------------------------

    def engine_call(self, engine_id: str, body: EngineVerb, *, budget: float | None = None, by: str = "") -> CallStream:
        """Makes a call on one engine. Raises `NotFound`, `PeerLost`, or `InvalidRequest` for engines' own verbs.

        `by`: who asks. What operators do to engines is told.
        """
        if isinstance(body, PeerHello | Claim | ClaimEnded | Meet):
            raise InvalidRequest(f"{type(body).__name__} is between engines", param="body")
        link = next((link for link in self.fleet.links if link.id == engine_id), None)
        if link is None:
            known = ", ".join(sorted(link.id for link in self.fleet.links)) or "none"
            raise NotFound(f"there is no engine {engine_id!r}; there are: {known}", param="engine_id")
        if link.client is None or link.client.closed:
            raise PeerLost(f"engine {engine_id} is not connected ({link.state})")
        if (deed := _DEEDS.get(type(body))) is not None:
            who = by or "an operator"
            _log.info(
                "asked of an engine",
                every=1.0,
                burst=20,
                engine=link.id,
                engine_epoch=link.info.epoch,
                what=deed,
                by=who,
            )
            self.events.add("operator", engine=link.id, epoch=link.info.epoch, detail=f"{deed}, by {who}", every=1.0)
        return link.client.stream(body, budget=self.config.request_timeout if budget is None else budget)

    # --- models ----------------------------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        """What can be served now, by served name."""
        return self.fleet.models()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return not self.draining and any(link.pickable for link in self.fleet.links)

    def model(self, name: str) -> ModelInfo:
        """The model that requests call `name` ("": the first). Raises `ModelNotFound`, or `NoEngine` when engines that
        may serve it are known but none can be used now."""
        models = self.models()
        for model in models:
            if not name or model.name == name:
                return model
        known = {link.info.model.name for link in self.fleet.links}
        if not known or not name or name in known:
            raise NoEngine("no engine is ready to serve requests", retry_after=1.0)
        raise ModelNotFound(f"model '{name}' is not served here; there is: {', '.join(sorted(known))}", param="model")

    def text_model(self, name: str) -> TextModel:
        """The text side of a model. Raises `InvalidRequest` for one without a tokenizer, and as `model` does."""
        model = self.model(name)
        text = self._texts.get(model.path)
        if text is not None:
            return text
        reason = self._text_errors.get(model.path)
        if reason is not None:
            raise InternalError(f"the tokenizer of model '{model.name}' could not be loaded: {reason}")
        raise InvalidRequest(f"model '{model.name}' has no tokenizer: give token ids instead of text", param="prompt")

    def has_text(self, name: str) -> bool:
        """Whether `text_model` would give one. Raises as `model` does."""
        return self.model(name).path in self._texts

    async def _prepare(self, model: ModelInfo) -> None:
        path = model.path
        if not path or path in self._texts:
            return
        loading = self._loading.get(path)
        if loading is None:
            loading = asyncio.ensure_future(asyncio.to_thread(self._load_text, path))
            self._loading[path] = loading
            loading.add_done_callback(lambda done: self._loaded(path, done))
        await asyncio.wait([loading])

    def _loaded(self, path: str, done: asyncio.Future[TextModel]) -> None:
        self._loading.pop(path, None)
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._texts[path] = done.result()
            self._text_errors.pop(path, None)
        else:
            # Token ids can still be served; whoever sends text is told.
            self._text_errors[path] = error.message if isinstance(error, MicroserveError) else repr(error)
            _log.error("tokenizer cannot be loaded", path=path, error=self._text_errors[path])

    def output_budget(self, model: ModelInfo, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens may be generated: `max_tokens`, or what the context leaves when that is None.

        Raises `ContextLengthExceeded` when the prompt leaves no room, or not as much as was asked for.
        """
        context = model.max_context
        room = context - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens; the prompt has {prompt_tokens}, which "
                "leaves no room for an answer.",
                param="prompt",
            )
        if max_tokens is not None and max_tokens > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens; {prompt_tokens} in the prompt and "
                f"{max_tokens} for the answer are more.",
                param="max_tokens",
            )
        return room if max_tokens is None else max_tokens

    # --- generating ------------------------------------------------------------------------------------------------

    def generate(self, spec: GenerationSpec) -> Generation:
        """Admits one choice; it runs at once or waits for a place (then the first chunk may be a `Busy`).

        Raises before anything starts: `Draining`, `Busy` (no place to wait either), `ModelNotFound`, `NoEngine`,
        `ContextLengthExceeded`, `InvalidRequest`. `max_tokens` beyond the context is clipped to it.
        """
        try:
            return self._admit(spec)
        except MicroserveError as error:
            self.metrics.refused(error.code)
            self.events.add("refused", detail=error.code, every=_REFUSALS)
            _log.info("request refused", every=10.0, burst=5, request=spec.request_id, code=error.code, why=error)
            raise

    @property
    def full(self) -> bool:
        """Whether there is neither a place for another choice nor one to wait in."""
        return len(self._active) >= self.config.max_active and len(self._queue) >= self.config.max_queued

    def _admit(self, spec: GenerationSpec) -> Generation:
        self.check_open()
        model = self.model(spec.model)
        self._check_prompt(model, spec.prompt)
        if self.full:
            raise Busy(
                f"{len(self._active)} requests run and {len(self._queue)} wait; no more are taken",
                retry_after=self._retry_after(),
            )
        room = model.max_context - len(spec.prompt)
        sampling = spec.sampling
        if sampling.max_tokens > room:
            sampling = msgspec.structs.replace(sampling, max_tokens=room)
        candidates = self.fleet.candidates(model.name)
        request = Request(
            id=spec.request_id,
            model=model.name,
            prompt=spec.prompt,
            sampling=sampling,
            page_size=candidates[0].info.layout.page_size,
        )
        longest = self.config.request_timeout
        timeout = longest if spec.timeout is None else min(spec.timeout, longest)
        program = self.versions.choose(model.name, spec.choice_of or spec.request_id)
        generation = self._dispatcher.create(request, program, timeout=timeout)
        self._idle.clear()
        if len(self._active) >= self.config.max_active:
            self._queue.append(generation)
            asyncio.get_running_loop().call_later(self.config.queue_timeout, self._waited, generation)
        else:
            self._active[generation] = None
            generation.start()
        return generation

    def _check_prompt(self, model: ModelInfo, prompt: TokenArray) -> None:
        if not len(prompt):
            raise InvalidRequest("the prompt is empty", param="prompt")
        self.output_budget(model, len(prompt), 1)
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= model.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidRequest(f"token {wrong} is not one of the model's {model.vocab_size}", param="prompt")

    def _versions_in_use(self) -> set[str]:
        running = {generation.strategy_version for generation in (*self._active, *self._queue)}
        return self.versions.active_versions() | running

    def _waited(self, generation: Generation) -> None:
        if generation.state is State.QUEUED:
            seconds = self.config.queue_timeout
            generation.refuse(Busy(f"no place became free within {seconds:g} s", retry_after=self._retry_after()))

    def _retry_after(self) -> float:
        """Seconds until the queue has probably moved on."""
        return min(_MOST_RETRY_AFTER, max(1.0, round((len(self._queue) + 1) * self._end_interval, 1)))

    def _ended(self, generation: Generation) -> None:
        self.metrics.ended(generation)
        self.inspection.ended(generation)
        if generation in self._active:
            del self._active[generation]
            now = self._clock()
            self._end_interval += _SMOOTHING * (now - self._last_end - self._end_interval)
            self._last_end = now
        else:
            self._queue.remove(generation)
        self._advance()
        if not self._active and not self._queue:
            self._idle.set()

    def _advance(self) -> None:
        while self._queue and len(self._active) < self.config.max_active:
            following = self._queue.popleft()
            self._active[following] = None
            following.start()

    # --- view ------------------------------------------------------------------------------------------------------

    def requests(self, *, request_id: str | None = None, recent: int = 0, limit: int = 1000) -> Requests:
        """What runs and waits, and what has ended lately."""
        return self.inspection.requests(
            (*self._active, *self._queue), request_id=request_id, recent=recent, limit=limit
        )

    async def strategies(self) -> Strategies:
        """What can be chosen, what serves, what was, and what each version did. Sources are read again."""
        return msgspec.structs.replace(await self.versions.show(), figures=self.metrics.figures())

    def abort(self, request_id: str, *, by: str = "") -> str:
        """Ends a request, all choices of it. "freed", or "unknown" when none runs or waits. `by`: who asks."""
        found = [each for each in (*self._active, *self._queue) if _is_of(each.request_id, request_id)]
        for generation in found:
            generation.refuse(Cancelled("the request was ended by an operator"))
        if not found:
            return "unknown"
        self.events.add("aborted", detail=f"{request_id}, by {by or 'an operator'}")
        _log.info("request aborted", request=request_id, by=by or "an operator")
        return "freed"

    def status(self) -> StatusReply:
        """What operators see."""
        return StatusReply(
            router=self._me.name,
            epoch=self._me.epoch,
            version=self._version,
            uptime=self._clock() - self._started_at,
            engines=self.fleet.snapshot(),
            active_requests=len(self._active),
            queued_requests=len(self._queue),
            requests_total=self.metrics.requests + len(self._active) + len(self._queue),
            strategy=self.versions.summary,
            http=self.http_url,
        )


def _is_of(name: str, request_id: str) -> bool:
    """Whether a choice of this name belongs to the request: the first is called like it, the others with a number."""
    return name == request_id or (name.startswith(f"{request_id}-") and name[len(request_id) + 1 :].isdecimal())
