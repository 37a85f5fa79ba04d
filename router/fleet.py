"""The router's view of the engines: who is there, a session to each, our charges on each, and who is least loaded."""

from __future__ import annotations

import asyncio
import functools
import itertools
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from microserve.router.link import EngineLink
from microserve.router.prefix_index import PrefixIndex
from microserve.runtime.clock import Clock, monotonic
from microserve.runtime.errors import InternalError, MicroserveError, NoEngine, PeerLost
from microserve.runtime.log import get_logger
from microserve.runtime.membership import Change
from microserve.runtime.messages import EngineInfo, FleetEngine, Load, ModelInfo
from microserve.runtime.rpc import RpcClient, connect

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from microserve.runtime.bus import Bus, Subscription
    from microserve.runtime.membership import RosterEvent
    from microserve.runtime.messages import EngineEvent

Prepare = Callable[[ModelInfo], Awaitable[None]]


class Event(Protocol):
    """Something that happened: `events.EventLog.add`."""

    def __call__(self, kind: str, *, engine: str = "", epoch: int = 0, detail: str = "") -> None: ...


_TOLD_BY_ENGINES = ("state", "peer", "lease_expired", "quarantined", "push_failed")
"""Kinds of events that engines publish, and operators should see."""

_NOTHING: Mapping[EngineLink, int] = types.MappingProxyType({})
_FIRST_DELAY, _LAST_DELAY = 0.05, 2.0
_LAST_WORDS = 3.0
"""Seconds that the session with an engine that said goodbye is kept for answers that are still on their way."""

_log = get_logger(__name__)


class EngineFleet:
    """Every engine that the roster knows, by id. All of it runs on the event loop.

    `prepare` is awaited once per engine before it can be picked (to load its model's tokenizer); `changed` is called
    whenever the set of engines, or what can be picked, may have changed.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        prepare: Prepare | None = None,
        clock: Clock = monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bus = bus
        self._prepare = prepare
        self._clock = clock
        self._pause = pause
        self._links: dict[str, EngineLink] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._order = itertools.count(1)
        self.prefixes: PrefixIndex[EngineLink] = PrefixIndex()
        """What we believe that engines have cached, by incarnation."""
        self.changed: Callable[[], None] = lambda: None
        self.event: Event = lambda kind, **facts: None
        """Told what operators should see."""

    # --- membership ------------------------------------------------------------------------------------------------

    def apply(self, events: Iterable[RosterEvent]) -> None:
        """Follow the roster."""
        for event in events:
            info, load, change = event.info, event.load, event.change
            link = self._links.get(info.engine_id)
            _log.info("engine " + change.value, engine=info.engine_id, engine_epoch=info.epoch, model=info.model.name)
            self.event(change.value, engine=info.engine_id, epoch=info.epoch, detail=info.model.name)
            if change is Change.LEFT:
                self.leave(info.engine_id)
            elif change is Change.SILENT:
                self.silence(info.engine_id)
            elif change in (Change.JOINED, Change.RESTARTED) or link is None or link.info.endpoint != info.endpoint:
                self.join(info, load)
            else:
                link.info = info
                self.report(info.engine_id, load)

    def join(self, info: EngineInfo, load: Load) -> None:
        """A new engine, or a new incarnation of a known one; it can be picked once we have a session with it."""
        self._drop(info.engine_id, "a new incarnation took its place")
        link = EngineLink(info, load, self._clock())
        self._links[info.engine_id] = link
        others = {each.info.model.revision for each in self._links.values() if each.info.model.name == info.model.name}
        if len(others) > 1:
            _log.warning(
                "engines serve different weights under one name: requests go to those that are more",
                engine=info.engine_id,
                engine_epoch=info.epoch,
                model=info.model.name,
                revision=info.model.revision,
                revisions=sorted(others),
            )
        link.task = asyncio.get_running_loop().create_task(self._keep(link), name=f"engine {info.engine_id}")
        self.changed()

    def report(self, engine_id: str, load: Load) -> None:
        """An engine is alive and says how loaded it is."""
        link = self._links.get(engine_id)
        if link is not None:
            other = link.silent or link.load.state != load.state
            link.silent = False
            link.report(load, self._clock())
            if other:
                self.changed()

    def silence(self, engine_id: str) -> None:
        """An engine has not been heard of for too long: nothing new goes there."""
        link = self._links.get(engine_id)
        if link is not None:
            link.silent = True
            self.changed()

    def leave(self, engine_id: str) -> None:
        """An engine is gone for good: nothing new goes there.

        It says goodbye to a router over the session that it dialled, and answers over the one that we dialled; nothing
        orders the two. So where calls are open, the session is kept until the engine ends it, or for a moment.
        """
        link = self._links.get(engine_id)
        if link is not None and link.task is not None and link.client is not None and link.client.open_calls:
            timer = asyncio.get_running_loop().call_later(_LAST_WORDS, link.client.close, "it left")
            link.task.add_done_callback(lambda _: timer.cancel())
            self._let_go(link, link.task)
        else:
            self._drop(engine_id, "it left")
        self.changed()

    def _drop(self, engine_id: str, reason: str) -> None:
        """Ends the session at once, and the calls that are open on it."""
        link = self._links.get(engine_id)
        if link is None or link.task is None:
            return
        self._let_go(link, link.task)
        link.task.cancel()
        if link.client is not None:
            link.client.close(reason)

    def _let_go(self, link: EngineLink, task: asyncio.Task[None]) -> None:
        del self._links[link.id]
        self.prefixes.forget(link)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # --- sessions --------------------------------------------------------------------------------------------------

    async def _keep(self, link: EngineLink) -> None:
        """Keeps a session with one engine for as long as it is in the fleet."""
        if self._prepare is not None:
            await self._prepare(link.info.model)
        link.prepared = True
        delay, failed = _FIRST_DELAY, 0
        while True:
            try:
                client = await self._dial(link.info)
            except MicroserveError as error:
                epoch, failed = link.info.epoch, failed + 1
                # The first time, the second, the fourth …: one that is dead for good must not bury the rest of the log.
                if failed.bit_count() == 1:
                    _log.warning(
                        "engine cannot be reached",
                        every=5.0,
                        engine=link.id,
                        engine_epoch=epoch,
                        attempts=failed,
                        error=error.message,
                    )
                await self._pause(delay)
                delay = min(delay * 2, _LAST_DELAY)
                continue
            delay, failed = _FIRST_DELAY, 0
            lost: asyncio.Future[MicroserveError] = asyncio.get_running_loop().create_future()
            client.on_lost = functools.partial(_settle, lost)
            if client.closed:
                continue
            link.client = client
            self.event("connected", engine=link.id, epoch=link.info.epoch, detail=link.info.endpoint)
            at = link.info.endpoint
            _log.info("engine connected", engine=link.id, engine_epoch=link.info.epoch, endpoint=at)
            self.changed()
            subscription = await self._subscribe(link)
            try:
                reason = await lost
            finally:
                link.client = None
                client.close("the router lets go of this engine")
                if subscription is not None:
                    subscription.close()
            if self._links.get(link.id) is not link:
                return
            self.event("lost", engine=link.id, epoch=link.info.epoch, detail=reason.message)
            _log.warning("engine session lost", engine=link.id, engine_epoch=link.info.epoch, error=reason.message)
            self.changed()

    async def _subscribe(self, link: EngineLink) -> Subscription | None:
        """Listens to what the engine tells everybody. Without it, it serves all the same."""
        if not link.info.events_endpoint:
            return None
        try:
            return await self._bus.subscribe(link.info.events_endpoint, functools.partial(self._heard, link))
        except MicroserveError as error:
            _log.warning("events of an engine cannot be followed", every=60.0, engine=link.id, error=error.message)
            return None

    def _heard(self, link: EngineLink, event: EngineEvent) -> None:
        if event.kind in _TOLD_BY_ENGINES and (event.engine_id, event.epoch) == (link.id, link.info.epoch):
            detail = event.detail or event.load.state
            self.event(event.kind, engine=event.engine_id, epoch=event.epoch, detail=detail)

    async def _dial(self, info: EngineInfo) -> RpcClient:
        client = await connect(self._bus, info.endpoint)
        peer = client.session.peer
        if (peer.name, peer.epoch) != (info.engine_id, info.epoch):
            client.close("another process than was announced")
            raise PeerLost(f"{info.endpoint} is {peer}, not engine {info.engine_id} of epoch {info.epoch:x}")
        return client

    # --- choice ----------------------------------------------------------------------------------------------------

    def candidates(self, model: str) -> list[EngineLink]:
        """The engines that can be picked for `model` now. They have one revision of it: see `_of_one_revision`."""
        return _of_one_revision(
            [link for link in self._links.values() if link.info.model.name == model and link.pickable]
        )

    def link(self, engine_id: str) -> EngineLink | None:
        """An engine by its id."""
        return self._links.get(engine_id)

    def pick(
        self,
        model: str,
        label: str | None = None,
        *,
        avoid: Collection[str] = (),
        exclude: Collection[str] = (),
        cached: Mapping[EngineLink, int] = _NOTHING,
    ) -> EngineLink:
        """The engine of `model` outside `avoid` with the least work before it; among equals the one picked longest ago.

        With `cached`, prompt tokens that need not be computed by engine, those are taken off the work: what counts is
        `work + prompt - cached`, all of it in prompt tokens, and the prompt is the same everywhere.

        Others than `exclude` are preferred, then those that carry `label`, then those that are not degraded; each only
        where there are any. Raises `NoEngine`.
        """
        found = [link for link in self.candidates(model) if link.info.engine_id not in avoid]
        if exclude:
            found = [link for link in found if link.info.engine_id not in exclude] or found
        if label is not None:
            found = [link for link in found if link.carries(label)] or found
        best: EngineLink | None = None
        best_key = (False, 0.0, 0)
        for link in found:
            key = (link.load.state != "ready", link.work - cached.get(link, 0), link.picked)
            if best is None or key < best_key:
                best, best_key = link, key
        if best is None:
            raise NoEngine(f"no engine is there that could serve '{model}' now", retry_after=1.0)
        best.picked = next(self._order)
        return best

    # --- view ------------------------------------------------------------------------------------------------------

    @property
    def links(self) -> list[EngineLink]:
        return list(self._links.values())

    def models(self) -> list[ModelInfo]:
        """What can be served now, by served name, in the order in which the engines joined.

        Engines that serve one name may differ in context: the shortest counts, as any of them may be picked.
        """
        found: dict[str, list[EngineLink]] = {}
        for link in self._links.values():
            if link.pickable:
                found.setdefault(link.info.model.name, []).append(link)
        each = (_of_one_revision(links) for links in found.values())
        return [min((link.info.model for link in links), key=lambda model: model.max_context) for links in each]

    def snapshot(self) -> list[FleetEngine]:
        """Every engine, with its load and our charges."""
        now = self._clock()
        return [
            FleetEngine(
                info=link.info,
                load=link.load,
                state=link.state,
                charged=link.charged_requests,
                last_seen=max(0.0, now - link.seen),
                round_trip=link.client.session.round_trip if link.client is not None else None,
            )
            for link in self._links.values()
        ]

    def check_integrity(self) -> None:
        """Raises `InternalError` when a charge was given back twice, or outlived the request that it stood for."""
        for link in self._links.values():
            requests, tokens = link.charged_requests, link.charged_tokens
            if requests < 0 or tokens < 0 or (tokens and not requests):
                raise InternalError(f"engine {link.id} is charged with {requests} requests and {tokens} tokens")

    async def close(self) -> None:
        """Lets go of every engine; returns when no task is left."""
        for engine_id in list(self._links):
            self._drop(engine_id, "the router stops")
        for task in self._leaving:
            task.cancel()
        if self._leaving:
            await asyncio.gather(*self._leaving, return_exceptions=True)


def _settle(lost: asyncio.Future[MicroserveError], error: MicroserveError) -> None:
    if not lost.done():
        lost.set_result(error)


def _of_one_revision(links: list[EngineLink]) -> list[EngineLink]:
    """Those of the revision that most of them have; of as many, that of the engine that joined first.

    One name must not stand for two models at once: a request's answer would depend on who is idle, and KV of one
    engine means nothing to the other. In a rolling change of weights the name changes hands once.
    """
    if len({link.info.model.revision for link in links}) <= 1:
        return links
    counts = Counter(link.info.model.revision for link in links)
    most = max(counts, key=counts.__getitem__)
    return [link for link in links if link.info.model.revision == most]
