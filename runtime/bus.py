"""The bus as the rest of the system sees it: sessions between processes, and events from one to many.

Everything here runs on one asyncio loop per process; nothing is thread-safe. `zmq_bus` is the implementation that
processes use, `memory_bus` the deterministic one for tests; `session` holds the rules that both share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.ids import Peer
    from microserve.runtime.messages import EngineEvent, RpcMessage


@dataclass(slots=True)
class BusStatistics:
    """What a bus has counted since it was made; `sessions` is how many are open now."""

    sent: int = 0
    received: int = 0
    """Frames that were accepted. Every frame that came in is counted here or in exactly one of the next four."""
    malformed: int = 0
    """Frames that were not a message of ours, or made no sense where they stood."""
    unknown_version: int = 0
    """Frames, and hellos, of another version of the protocol."""
    sequence_gaps: int = 0
    """Frames lost or repeated on an open session; each ended its session."""
    strays: int = 0
    """Frames of a sender that has no session; it is told so."""
    oversized: int = 0
    """Messages too large to travel, refused where they were to be sent."""
    overflows: int = 0
    """Sessions ended because the peer read too slowly."""
    unauthorized: int = 0
    """Peers that were refused for their keys, and frames that came under another key than their session's."""
    sessions: int = 0


class Session(Protocol):
    """A conversation with one incarnation of one peer. It ends once, for both sides, and is never resumed."""

    peer: Peer
    """The other side."""

    round_trip: float | None
    """Seconds from the last answered ping to its answer; None until then."""

    role: str
    """What the peer's key is for ("engine", "router", "client", "admin"); empty where keys are not in use."""

    user: str
    """The peer's public key; empty where keys are not in use."""

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        ...

    def send(self, message: RpcMessage) -> None:
        """Queues `message`; never blocks.

        Raises `PeerLost` when the session is closed, or ends now because its outbound queue is full (`lost` has then
        been called); `TooLarge` for a message that may not travel, which changes nothing.
        """
        ...

    def close(self, reason: str = "") -> None:
        """Says goodbye and ends the session. Idempotent."""
        ...


class SessionHandler(Protocol):
    """Whoever owns sessions. All of it is called on the loop; an exception is logged and harms nobody else."""

    def opened(self, session: Session) -> None:
        """A session has begun."""
        ...

    def received(self, session: Session, message: RpcMessage) -> None:
        """The peer sent `message`."""
        ...

    def lost(self, session: Session, error: MicroserveError) -> None:
        """The session has ended, whatever ended it. Called exactly once per opened session."""
        ...


class Listener(Protocol):
    """A place where sessions are accepted."""

    endpoint: str
    """Where others can dial; a wildcard port is resolved."""

    def close(self) -> None:
        """Ends every session that was accepted here and frees the endpoint. Idempotent."""
        ...


class Publisher(Protocol):
    """A source of events. Slow subscribers miss events, and see it in the event's `seq`."""

    endpoint: str

    def publish(self, event: EngineEvent) -> None:
        """Sends `event` to whoever is subscribed now; never blocks."""
        ...

    def close(self) -> None:
        """Stops publishing. Idempotent."""
        ...


class Subscription(Protocol):
    """Events that arrive until it is closed."""

    def close(self) -> None:
        """No event arrives after this. Idempotent."""
        ...


class Bus(Protocol):
    """A process's way to others."""

    me: Peer

    async def listen(self, endpoint: str, handler: SessionHandler) -> Listener:
        """Accepts sessions at `endpoint`. Raises `ConfigError` when that address cannot be had."""
        ...

    async def dial(self, endpoint: str, handler: SessionHandler, *, timeout: float = 5.0) -> Session:
        """Opens a session with whoever listens at `endpoint`, waiting up to `timeout` seconds for it to appear.

        One incarnation has at most one session with a listener: a second dial ends the first.
        Raises `PeerLost` when nobody answers and `VersionMismatch` when they speak another version.
        """
        ...

    async def publisher(self, endpoint: str) -> Publisher:
        """Publishes at `endpoint`. Raises `ConfigError` when that address cannot be had."""
        ...

    async def subscribe(self, endpoint: str, receive: Callable[[EngineEvent], None]) -> Subscription:
        """Calls `receive` with events published at `endpoint` from about now on, across restarts of the publisher."""
        ...

    def statistics(self) -> BusStatistics:
        """A snapshot of the counters."""
        ...

    async def close(self) -> None:
        """Ends every session, and frees every endpoint. Idempotent."""
        ...
