"""The bus within one process: deterministic, with the time and the faults that a test asks for.

Frames take the same way through the same session rules as over ZeroMQ, encoded and decoded; only the wire is a list.
Time stands still until `MemoryNetwork.advance` moves it, so heartbeats, silence and delays happen exactly when told to.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from microserve.runtime.bus import BusStatistics
from microserve.runtime.clock import ManualClock
from microserve.runtime.errors import ConfigError, MicroserveError, PeerLost, ProtocolError, VersionMismatch
from microserve.runtime.frames import MAX_FRAME_BYTES, pack, unpack
from microserve.runtime.ids import Peer
from microserve.runtime.log import get_logger
from microserve.runtime.messages import EngineEvent
from microserve.runtime.session import LiveSession, SessionSettings
from microserve.runtime.switchboard import Switchboard, dialling_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.bus import SessionHandler

_log = get_logger(__name__)

_QUIET_PASSES: Final = 10
"""Passes of the loop without a frame after which everything that reacts to frames is taken to have reacted."""


class MemoryNetwork:
    """Everything that the buses of one test share: the wire, the clock and the faults.

    A pair (source, target) of peers names one direction of the wire. Faults hold until they are lifted, or for so many
    frames as was said.
    """

    def __init__(self, clock: ManualClock | None = None) -> None:
        self.clock = ManualClock() if clock is None else clock
        self.buses: list[MemoryBus] = []
        self.listeners: dict[str, MemoryListener] = {}
        self.publishers: dict[str, MemoryPublisher] = {}
        self.subscriptions: list[MemorySubscription] = []
        self._ports = itertools.count(1)
        self._order = itertools.count()
        self._carried = 0
        self._flights: list[tuple[float, int, Callable[[], None]]] = []
        self._landing = False
        self._last_due: dict[tuple[Peer, Peer], float] = {}
        self._delays: dict[tuple[Peer, Peer], float] = {}
        self._drops: Counter[tuple[Peer, Peer]] = Counter()
        self._duplicates: Counter[tuple[Peer, Peer]] = Counter()
        self._cut: set[frozenset[Peer]] = set()
        self._stalled: set[tuple[Peer, Peer]] = set()

    def bus(
        self,
        me: Peer,
        *,
        heartbeat: float = 1.0,
        silence: float = 3.0,
        max_queue_bytes: int = MAX_FRAME_BYTES,
    ) -> MemoryBus:
        """A bus for one more process. Times are seconds of this network's clock."""
        bus = MemoryBus(self, me, SessionSettings(heartbeat, silence, max_queue_bytes, self.clock))
        self.buses.append(bus)
        return bus

    # --- time ---

    async def advance(self, seconds: float) -> None:
        """Lets `seconds` pass, in steps no longer than the shortest tick of a bus."""
        end = self.clock() + seconds
        await self.settle()
        while (left := end - self.clock()) > 1e-9:
            self.clock.advance(min([left, *(bus.settings.tick for bus in self.buses)]))
            self._land()
            await self.settle()
            for bus in tuple(self.buses):
                bus.tick()
            await self.settle()

    async def settle(self) -> None:
        """Runs the loop until every frame that is due has arrived and what it caused has happened."""
        quiet = 0
        while quiet < _QUIET_PASSES:
            before = self._carried
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._carried == before and not self._landing else 0

    # --- faults ---

    def drop(self, source: Peer, target: Peer, frames: int = 1) -> None:
        """Loses the next `frames` frames, silently."""
        self._drops[source, target] += frames

    def duplicate(self, source: Peer, target: Peer, frames: int = 1) -> None:
        """Delivers each of the next `frames` frames twice."""
        self._duplicates[source, target] += frames

    def delay(self, source: Peer, target: Peer, seconds: float) -> None:
        """From now on frames take `seconds`; their order is kept."""
        self._delays[source, target] = seconds

    def partition(self, a: Peer, b: Peer) -> None:
        """Nothing gets through in either direction, and nobody is told."""
        self._cut.add(frozenset((a, b)))

    def heal(self, a: Peer, b: Peer) -> None:
        """Ends a partition. What was lost stays lost."""
        self._cut.discard(frozenset((a, b)))

    def stall(self, source: Peer, target: Peer) -> None:
        """The target reads no more: the source finds no room."""
        self._stalled.add((source, target))

    def unstall(self, source: Peer, target: Peer) -> None:
        """The target reads again."""
        self._stalled.discard((source, target))
        for bus in self.buses:
            bus.flush()

    def kill(self, peer: Peer, *, silently: bool = False) -> None:
        """The process dies: it does nothing more, and its handlers hear nothing more. Others see their connections
        break at once, as TCP shows it, or (`silently`) nothing, as when a machine loses power."""
        for bus in self.buses:
            if bus.me == peer:
                bus.die(silently=silently)

    def inject(self, source: Peer, target: Peer, frame: bytes) -> None:
        """Delivers `frame` at the target's listeners as if the source had sent it: on its newest connection to each,
        or as a stranger."""
        for listener in tuple(self.listeners.values()):
            if listener.bus.me == target:
                ids = [id for id, connection in listener.connections.items() if connection.bus.me == source]
                routing_id = ids[-1] if ids else source.routing_id
                self.carry(source, target, partial(listener.switchboard.receive, routing_id, frame))

    # --- for the buses ---

    def resolve(self, endpoint: str) -> str:
        """The endpoint with a number in place of a final wildcard."""
        return f"{endpoint[:-1]}{next(self._ports)}" if endpoint.endswith("*") else endpoint

    def has_room(self, source: Peer, target: Peer) -> bool:
        return (source, target) not in self._stalled

    def carry(self, source: Peer, target: Peer, arrive: Callable[[], None]) -> None:
        """Calls `arrive` when, and as often as, the faults of this direction say."""
        self._carried += 1
        link = (source, target)
        if frozenset(link) in self._cut:
            return
        if self._drops[link] > 0:
            self._drops[link] -= 1
            return
        due = max(self.clock() + self._delays.get(link, 0.0), self._last_due.get(link, 0.0))
        self._last_due[link] = due
        heapq.heappush(self._flights, (due, next(self._order), arrive))
        if self._duplicates[link] > 0:
            self._duplicates[link] -= 1
            heapq.heappush(self._flights, (due, next(self._order), arrive))
        self._schedule()

    def _schedule(self) -> None:
        if not self._landing and self._flights and self._flights[0][0] <= self.clock():
            self._landing = True
            asyncio.get_running_loop().call_soon(self._land)

    def _land(self) -> None:
        self._landing = False
        # Only what is due now: frames sent in reaction take another turn of the loop.
        for _ in range(len(self._flights)):
            if not self._flights or self._flights[0][0] > self.clock():
                return
            heapq.heappop(self._flights)[2]()
        self._schedule()


class _Connection:
    """One dialled session and both of its ends' channels."""

    def __init__(self, bus: MemoryBus, listener: MemoryListener) -> None:
        self.bus = bus
        self.listener = listener
        self.network = bus.network
        bus.dials += 1
        self.routing_id = dialling_id(bus.me, bus.dials)
        self.session: LiveSession
        self.give_up_at = 0.0

    # The dialling side's channel.

    def transmit(self, frame: bytes) -> bool:
        if not self.network.has_room(self.bus.me, self.listener.bus.me):
            return False
        if not self.bus.dead:
            self.network.carry(self.bus.me, self.listener.bus.me, lambda: self.listener.arrived(self, frame))
        return True

    def release(self, session: LiveSession) -> None:
        self.bus.connections.discard(self)
        if not self.bus.dead:
            self.network.carry(self.bus.me, self.listener.bus.me, lambda: self.listener.hung_up(self))

    # What happens to the dialling side.

    def arrived(self, frame: bytes) -> None:
        if not self.bus.dead:
            self.session.receive(frame)

    def broke(self) -> None:
        if not self.bus.dead:
            self.session.end(PeerLost(f"the connection to {self.session.peer} broke"))


class _ListenerChannel:
    """The listening side's channel to one routing id."""

    __slots__ = ("_listener", "_routing_id")

    def __init__(self, listener: MemoryListener, routing_id: bytes) -> None:
        self._listener = listener
        self._routing_id = routing_id

    def transmit(self, frame: bytes) -> bool:
        listener = self._listener
        connection = listener.connections.get(self._routing_id)
        if connection is None or listener.closed:
            raise PeerLost("the connection is gone")
        source, target = listener.bus.me, connection.bus.me
        if not listener.bus.network.has_room(source, target):
            return False
        if not listener.bus.dead:
            listener.bus.network.carry(source, target, lambda: connection.arrived(frame))
        return True

    def release(self, session: LiveSession) -> None:
        """Nothing is held per session."""


class MemoryListener:
    """Implements `bus.Listener`."""

    def __init__(self, bus: MemoryBus, endpoint: str, handler: SessionHandler) -> None:
        self.bus = bus
        self.endpoint = bus.network.resolve(endpoint)
        if self.endpoint in bus.network.listeners:
            raise ConfigError(f"cannot listen at {self.endpoint!r}: somebody does already")
        self.closed = False
        self.connections: dict[bytes, _Connection] = {}
        self.switchboard = Switchboard(
            bus.me, handler, lambda routing_id: _ListenerChannel(self, routing_id), bus.settings, bus.counters
        )
        bus.network.listeners[self.endpoint] = self

    def arrived(self, connection: _Connection, frame: bytes) -> None:
        if self._has(connection):
            self.switchboard.receive(connection.routing_id, frame)

    def hung_up(self, connection: _Connection) -> None:
        if self._has(connection):
            del self.connections[connection.routing_id]
            self.switchboard.probe()

    def _has(self, connection: _Connection) -> bool:
        return not self.closed and not self.bus.dead and connection.routing_id in self.connections

    def drop_all(self, *, silently: bool = False) -> None:
        """Nobody listens here any more."""
        self.closed = True
        if self.bus.network.listeners.get(self.endpoint) is self:
            del self.bus.network.listeners[self.endpoint]
        for connection in self.connections.values():
            if not silently:
                self.bus.network.carry(self.bus.me, connection.bus.me, connection.broke)
        self.connections.clear()

    def close(self) -> None:
        if self in self.bus.listeners:
            self.bus.listeners.discard(self)
            self.switchboard.close("the listener closes")
            self.drop_all(silently=self.bus.dead)


class MemoryPublisher:
    """Implements `bus.Publisher`."""

    def __init__(self, bus: MemoryBus, endpoint: str) -> None:
        self._bus = bus
        self.endpoint = bus.network.resolve(endpoint)
        if self.endpoint in bus.network.publishers:
            raise ConfigError(f"cannot publish at {self.endpoint!r}: somebody does already")
        bus.network.publishers[self.endpoint] = self

    def publish(self, event: EngineEvent) -> None:
        if self._bus.dead:
            return
        frame = pack(event, event.seq)
        self._bus.counters.sent += 1
        network = self._bus.network
        for subscription in tuple(network.subscriptions):
            if subscription.endpoint == self.endpoint and network.has_room(self._bus.me, subscription.bus.me):
                network.carry(self._bus.me, subscription.bus.me, partial(subscription.arrived, frame))

    def close(self) -> None:
        if self._bus.network.publishers.get(self.endpoint) is self:
            del self._bus.network.publishers[self.endpoint]
        self._bus.publishers.discard(self)


class MemorySubscription:
    """Implements `bus.Subscription`."""

    def __init__(self, bus: MemoryBus, endpoint: str, receive: Callable[[EngineEvent], None]) -> None:
        self.bus = bus
        self.endpoint = endpoint
        self._receive = receive
        bus.network.subscriptions.append(self)

    def arrived(self, frame: bytes) -> None:
        if self not in self.bus.network.subscriptions:
            return
        try:
            _seq, event = unpack(frame)
            if not isinstance(event, EngineEvent):
                raise ProtocolError(f"{type(event).__name__.lower()} is no event")
        except VersionMismatch:
            self.bus.counters.unknown_version += 1
            return
        except ProtocolError:
            self.bus.counters.malformed += 1
            return
        self.bus.counters.received += 1
        try:
            self._receive(event)
        except Exception:  # a receiver's bug must not take the bus down
            _log.exception("receiver of events failed", engine=event.engine_id)

    def close(self) -> None:
        if self in self.bus.network.subscriptions:
            self.bus.network.subscriptions.remove(self)


class MemoryBus:
    """Implements `bus.Bus` on a `MemoryNetwork`, which makes it."""

    def __init__(self, network: MemoryNetwork, me: Peer, settings: SessionSettings) -> None:
        self.network = network
        self.me = me
        self.settings = settings
        self.counters = BusStatistics()
        self.listeners: set[MemoryListener] = set()
        self.connections: set[_Connection] = set()
        self.publishers: set[MemoryPublisher] = set()
        self.dead = False
        self.dials = 0
        self._closed = False

    async def listen(self, endpoint: str, handler: SessionHandler) -> MemoryListener:
        self._check_open()
        listener = MemoryListener(self, endpoint, handler)
        self.listeners.add(listener)
        return listener

    async def dial(self, endpoint: str, handler: SessionHandler, *, timeout: float = 5.0) -> LiveSession:
        """As `bus.Bus.dial`; but where nobody listens it fails at once, since time does not pass by itself."""
        self._check_open()
        listener = self.network.listeners.get(endpoint)
        if listener is None:
            raise PeerLost(f"nobody listens at {endpoint!r}")
        greeted: asyncio.Future[MicroserveError | None] = asyncio.get_running_loop().create_future()

        def on_greeted(error: MicroserveError | None) -> None:
            if not greeted.done():
                greeted.set_result(error)

        connection = _Connection(self, listener)
        connection.give_up_at = self.network.clock() + timeout
        unknown = Peer("listener", endpoint, 0)
        session = LiveSession(unknown, handler, connection, self.settings, self.counters, on_greeted=on_greeted)
        connection.session = session
        self.connections.add(connection)
        listener.connections[connection.routing_id] = connection
        try:
            session.greet(self.me)
            error = await greeted
        except BaseException:
            session.close("the dial was given up")
            raise
        if error is not None:
            raise error
        return session

    async def publisher(self, endpoint: str) -> MemoryPublisher:
        self._check_open()
        publisher = MemoryPublisher(self, endpoint)
        self.publishers.add(publisher)
        return publisher

    async def subscribe(self, endpoint: str, receive: Callable[[EngineEvent], None]) -> MemorySubscription:
        self._check_open()
        return MemorySubscription(self, endpoint, receive)

    def statistics(self) -> BusStatistics:
        return replace(self.counters)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for listener in tuple(self.listeners):
            listener.close()
        for connection in tuple(self.connections):
            connection.session.close("the process closes its bus")
        self._silence_events()
        self.network.buses.remove(self)

    def _check_open(self) -> None:
        if self._closed or self.dead:
            raise PeerLost("the bus is closed")

    def _silence_events(self) -> None:
        for publisher in tuple(self.publishers):
            publisher.close()
        for subscription in tuple(self.network.subscriptions):
            if subscription.bus is self:
                subscription.close()

    # --- for the network ---

    def tick(self) -> None:
        """The clock has moved."""
        if self.dead:
            return
        for listener in tuple(self.listeners):
            listener.switchboard.tick()
        for connection in tuple(self.connections):
            connection.session.tick()
            if self.network.clock() >= connection.give_up_at:
                connection.session.give_up(PeerLost(f"no answer from {connection.listener.endpoint} in time"))

    def flush(self) -> None:
        """There may be room again."""
        for listener in tuple(self.listeners):
            for session in listener.switchboard.sessions:
                session.flush()
        for connection in tuple(self.connections):
            connection.session.flush()

    def die(self, *, silently: bool) -> None:
        """See `MemoryNetwork.kill`."""
        self.dead = True
        for listener in tuple(self.listeners):
            listener.drop_all(silently=silently)
        for connection in self.connections:
            if not silently:
                listener = connection.listener
                self.network.carry(self.me, listener.bus.me, partial(listener.hung_up, connection))
        self._silence_events()
