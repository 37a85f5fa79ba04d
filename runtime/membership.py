"""Membership: engines announce themselves to routers, and routers keep a roster of who is alive.

Who is who is decided by name and epoch: of two processes with one name the one with the larger epoch is the engine,
and nothing that the other says changes anything. `Announcer` is the engine's side; `Roster`, the router's, is pure:
time and messages in, events out.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from microserve.runtime.errors import InvalidRequest, MicroserveError, NotFound
from microserve.runtime.log import get_logger
from microserve.runtime.messages import Announce, Heartbeat, Leave
from microserve.runtime.rpc import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.runtime.bus import Bus
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import EngineInfo, Load
    from microserve.runtime.rpc import RpcClient

HEARTBEAT = 1.0
"""Seconds between heartbeats."""
_FORGET = 300.0
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0
_CALL_BUDGET = 3.0
_LEAVE_BUDGET = 1.0
_MOST_GONE = 4096
"""Absent engines whose epoch is remembered; the oldest are forgotten first."""


class Change(Enum):
    """What happened to an engine."""

    JOINED = "joined"
    """It was not known, or had left."""
    RESTARTED = "restarted"
    """Its name came back with a larger epoch: what ran on the old process is gone."""
    UPDATED = "updated"
    """The same process announced other facts (an endpoint, labels)."""
    LEFT = "left"
    """It said goodbye, or was silent for so long that it is forgotten."""
    SILENT = "silent"
    """No sign of life within the limit: no new work for it."""
    BACK = "back"
    """A silent engine spoke again, in the same epoch."""


@dataclass(frozen=True, slots=True)
class RosterEvent:
    """A change, with the engine as it is after it (`LEFT`: as it last was)."""

    change: Change
    info: EngineInfo
    load: Load


@dataclass(slots=True)
class Member:
    """One engine as the roster knows it. `last_seen` is on the roster's clock, in seconds."""

    info: EngineInfo
    load: Load
    last_seen: float
    silent: bool = False


class Roster:
    """The engines that announced themselves to this router. Pure: no sockets, no tasks, no clock of its own.

    `silence`: seconds without a sign of life after which an engine counts as silent. `forget`: seconds after which a
    silent engine is dropped as if it had left (None: five minutes, or as long as it may be silent).
    """

    def __init__(self, *, silence: float, clock: Clock, forget: float | None = None) -> None:
        self._clock = clock
        self.limit(silence=silence, forget=forget)
        self._members: dict[str, Member] = {}
        self._least: dict[str, int] = {}

    def limit(self, *, silence: float, forget: float | None = None) -> None:
        """Other limits from now on."""
        forget = max(_FORGET, silence) if forget is None else forget
        if not 0 < silence <= forget:
            raise ValueError(f"silence ({silence} s) must be positive and at most forget ({forget} s)")
        self._silence = silence
        self._forget = forget

    def announce(self, info: EngineInfo, load: Load) -> list[RosterEvent]:
        """An engine says who it is. Raises `InvalidRequest` when a newer process has its name, or it has left."""
        known = self._members.get(info.engine_id)
        newest = known.info.epoch if known is not None else 0
        least = max(newest, self._least.get(info.engine_id, 0))
        if info.epoch < least:
            raise InvalidRequest(
                f"engine {info.engine_id!r}: epoch {info.epoch} is over; at least {least} is expected", param="epoch"
            )
        now = self._clock()
        self._members[info.engine_id] = Member(info, load, now)
        if known is None:
            return [RosterEvent(Change.JOINED, info, load)]
        if info.epoch > newest:
            return [RosterEvent(Change.RESTARTED, info, load)]
        events = [RosterEvent(Change.BACK, info, load)] if known.silent else []
        if known.info != info:
            events.append(RosterEvent(Change.UPDATED, info, load))
        return events

    def heartbeat(self, engine_id: str, epoch: int, load: Load) -> list[RosterEvent]:
        """A sign of life with the load. Raises `NotFound` for a process that must announce itself (again) first."""
        member = self._members.get(engine_id)
        if member is None or member.info.epoch != epoch:
            raise NotFound(f"engine {engine_id!r} in epoch {epoch} is not known here; announce it", param="engine_id")
        member.load = load
        member.last_seen = self._clock()
        if not member.silent:
            return []
        member.silent = False
        return [RosterEvent(Change.BACK, member.info, load)]

    def leave(self, engine_id: str, epoch: int) -> list[RosterEvent]:
        """An engine says goodbye. Idempotent; a message of an older epoch changes nothing."""
        member = self._members.get(engine_id)
        if member is None or member.info.epoch != epoch:
            return []
        del self._members[engine_id]
        # A late announcement of the process that left must not bring it back.
        self._expect(engine_id, epoch + 1)
        return [RosterEvent(Change.LEFT, member.info, member.load)]

    def suspect(self, engine_id: str, epoch: int) -> list[RosterEvent]:
        """Count an engine as silent at once (its session broke); its next heartbeat brings it back."""
        member = self._members.get(engine_id)
        if member is None or member.info.epoch != epoch or member.silent:
            return []
        member.silent = True
        return [RosterEvent(Change.SILENT, member.info, member.load)]

    def sweep(self) -> list[RosterEvent]:
        """Apply the passing of time: who fell silent, and who has been silent for too long."""
        now = self._clock()
        events = []
        for engine_id, member in list(self._members.items()):
            quiet = now - member.last_seen
            if quiet >= self._forget:
                del self._members[engine_id]
                self._expect(engine_id, member.info.epoch)
                events.append(RosterEvent(Change.LEFT, member.info, member.load))
            elif quiet >= self._silence and not member.silent:
                member.silent = True
                events.append(RosterEvent(Change.SILENT, member.info, member.load))
        return events

    def _expect(self, engine_id: str, epoch: int) -> None:
        """From now on nothing older than `epoch` may join by that name."""
        self._least.pop(engine_id, None)
        self._least[engine_id] = epoch
        if len(self._least) > _MOST_GONE:
            del self._least[next(iter(self._least))]

    def next_sweep(self) -> float | None:
        """Seconds until `sweep` can change something; None: never, as things are."""
        now = self._clock()
        due = [
            member.last_seen + (self._forget if member.silent else self._silence) - now
            for member in self._members.values()
        ]
        return max(0.0, min(due)) if due else None

    def get(self, engine_id: str) -> Member | None:
        return self._members.get(engine_id)

    def members(self) -> list[Member]:
        """Every engine that has not left, in the order of their names; silent ones too."""
        return [self._members[name] for name in sorted(self._members)]


class Announcer:
    """Keeps an engine known to its routers: dials each, announces, heartbeats, and starts over when a router is lost.

    Start order does not matter: a router that is not there yet is dialled until it is. `info` and `load` are asked
    anew for every message. Lives on one event loop.
    """

    def __init__(
        self,
        bus: Bus,
        routers: Sequence[str],
        info: Callable[[], EngineInfo],
        load: Callable[[], Load],
        *,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self._bus = bus
        self._routers = tuple(dict.fromkeys(routers))
        self._info = info
        self._load = load
        self._heartbeat = heartbeat
        self._log = get_logger(__name__)
        self._tasks: list[asyncio.Task[None]] = []
        self._wakes = {endpoint: asyncio.Event() for endpoint in self._routers}
        self._announced: dict[str, RpcClient] = {}

    @property
    def announced(self) -> tuple[str, ...]:
        """Endpoints of the routers that know this engine now."""
        return tuple(self._announced)

    def start(self) -> None:
        """Begin to announce. Call once; `leave` ends it."""
        for endpoint in self._routers:
            task = asyncio.create_task(self._keep_announced(endpoint), name=f"announce {endpoint}")
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    def changed(self) -> None:
        """The engine's state or its facts changed: tell the routers now, not at the next heartbeat."""
        for wake in self._wakes.values():
            wake.set()

    async def leave(self) -> None:
        """Say goodbye to every router that knows this engine, and stop. Idempotent; takes at most a second."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.remove_done_callback(self._ended)
            task.cancel()
        clients = list(self._announced.values())
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.gather(*(self._goodbye(client) for client in clients))

    async def _goodbye(self, client: RpcClient) -> None:
        info = self._info()
        # A router that does not take the goodbye finds out by silence.
        with contextlib.suppress(MicroserveError):
            await client.call(Leave(engine_id=info.engine_id, epoch=info.epoch), budget=_LEAVE_BUDGET)
        client.session.close("leaving")

    async def _keep_announced(self, endpoint: str) -> None:
        delay = _FIRST_RETRY
        while True:
            try:
                client = await connect(self._bus, endpoint)
            except MicroserveError as error:
                self._log.warning("router does not answer", every=30.0, router=endpoint, error=error)
            else:
                try:
                    told = await self._announce(client)
                    delay = _FIRST_RETRY
                    self._announced[endpoint] = client
                    self._log.info("announced", router=endpoint)
                    await self._beat(client, self._wakes[endpoint], told)
                except MicroserveError as error:
                    self._log.warning("router lost", every=5.0, router=endpoint, error=error)
                    self._announced.pop(endpoint, None)
                    client.session.close("announcing again")
                except asyncio.CancelledError:
                    # `leave` says goodbye over sessions that are announced; any other is closed here.
                    if endpoint not in self._announced:
                        client.session.close("leaving")
                    raise
            # Spread, so that a fleet does not come back to a restarted router in one instant.
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, _LAST_RETRY)

    async def _announce(self, client: RpcClient) -> EngineInfo:
        """What the router was told."""
        info = self._info()
        await client.call(Announce(info=info, load=self._load()), budget=_CALL_BUDGET)
        return info

    async def _beat(self, client: RpcClient, wake: asyncio.Event, told: EngineInfo) -> None:
        # A lost session ends the wait: the call that follows raises, and the router is dialled again at once.
        client.on_lost = lambda error: wake.set()
        while True:
            # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes with the wake-up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat):
                    await wake.wait()
            wake.clear()
            info = self._info()
            if info is not told and info != told:
                told = await self._announce(client)
                continue
            try:
                message = Heartbeat(engine_id=info.engine_id, epoch=info.epoch, load=self._load())
                await client.call(message, budget=_CALL_BUDGET)
            except NotFound:
                told = await self._announce(client)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("announcing stopped", task=task.get_name(), error=repr(error))
