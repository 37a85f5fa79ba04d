"""The rules of a session, without sockets and without a loop: frames and the time come in, frames go out.

Anything that breaks the count of frames, the peer's silence, and a full outbound queue end the session; both sides
learn of it, and it is never resumed.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from microserve.runtime.clock import monotonic
from microserve.runtime.codec import decode, from_info, to_info
from microserve.runtime.errors import MicroserveError, PeerLost, ProtocolError, TooLarge, VersionMismatch
from microserve.runtime.frames import HEADER_BYTES, MAX_FRAME_BYTES, pack, salvage, unpack, unpack_seq
from microserve.runtime.ids import Peer
from microserve.runtime.log import get_logger
from microserve.runtime.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Batch,
    Bye,
    Call,
    Cancel,
    Failure,
    Hello,
    Part,
    Ping,
    Pong,
    Reply,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.bus import BusStatistics, SessionHandler
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import Message, RpcMessage

PING_EVERY = 5.0
"""Seconds between pings of a busy session."""
_MOST_PINGS = 64
"""Without an answer that are remembered."""

_log = get_logger(__name__)

_RPC_TYPES: Final = frozenset((Call, Part, Reply, Failure, Cancel, Batch))


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What every session of a bus has in common. Times are seconds."""

    heartbeat: float = 1.0
    """A session without traffic in either direction for this long gets a `Ping`."""
    silence: float = 3.0
    """A peer from which nothing came for this long is lost."""
    max_queue_bytes: int = MAX_FRAME_BYTES
    """How much may wait for one peer in our own queue. The transport's own buffers come on top."""
    clock: Clock = monotonic

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat < self.silence:
            raise ValueError(f"heartbeat {self.heartbeat} s must be positive and shorter than silence {self.silence} s")

    @property
    def tick(self) -> float:
        """Seconds between two looks at the clock."""
        return self.heartbeat / 4


class SessionState(enum.Enum):
    """Where a session stands. It moves down this list only."""

    GREETING = "greeting"
    """We have sent `Hello` and wait for `Welcome`."""
    OPEN = "open"
    """Both sides have greeted."""
    CLOSED = "closed"
    """Ended, for good."""


class Channel(Protocol):
    """Where the frames of one session go."""

    def transmit(self, frame: bytes) -> bool:
        """Takes `frame`, or returns False when there is no room now (`flush` is called when there may be).

        Raises `PeerLost` when nobody is at the other end any more.
        """
        ...

    def release(self, session: LiveSession) -> None:
        """The session has ended and uses the channel no more. Called once."""
        ...


class LiveSession:
    """One session, on either side. Implements `bus.Session`."""

    __slots__ = (
        "_channel",
        "_clock",
        "_error",
        "_handler",
        "_heard_at",
        "_on_greeted",
        "_pinged_at",
        "_pings",
        "_queue",
        "_queued_bytes",
        "_received",
        "_sent",
        "_sent_at",
        "_settings",
        "_state",
        "_statistics",
        "peer",
        "role",
        "round_trip",
        "user",
    )

    def __init__(
        self,
        peer: Peer,
        handler: SessionHandler,
        channel: Channel,
        settings: SessionSettings,
        statistics: BusStatistics,
        *,
        on_greeted: Callable[[MicroserveError | None], None] | None = None,
    ) -> None:
        """`on_greeted` is told once whether a greeting that we began succeeded (None) or why not."""
        self.peer = peer
        self.role = ""
        """What the peer's key is for ("engine", "router", "client", "admin"); empty where keys are not in use."""
        self.user = ""
        """The peer's public key; empty where keys are not in use."""
        self._handler = handler
        self._channel = channel
        self._settings = settings
        self._clock = settings.clock
        self._statistics = statistics
        self._on_greeted = on_greeted
        self._state = SessionState.GREETING
        self._error: MicroserveError | None = None
        self._sent = 0
        self._received = 0
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._heard_at = self._sent_at = self._pinged_at = self._clock()
        self._pings: deque[float] = deque(maxlen=_MOST_PINGS)
        """When those were sent that have no answer yet; a session keeps their order."""
        self.round_trip: float | None = None
        """Seconds from the last answered ping to its answer; None until then."""

    # --- beginning ---

    def greet(self, me: Peer) -> None:
        """The dialling side's first step: say hello."""
        hello = Hello(
            version=PROTOCOL_VERSION, kind=me.kind, name=me.name, epoch=me.epoch, heartbeat=self._settings.heartbeat
        )
        self._post(hello)

    def accept(self, me: Peer) -> None:
        """The listening side's first step, after a valid hello."""
        self._received = 1
        welcome = Welcome(
            version=PROTOCOL_VERSION, kind=me.kind, name=me.name, epoch=me.epoch, heartbeat=self._settings.heartbeat
        )
        try:
            self._post(welcome)
        except PeerLost as error:
            _log.debug("peer went away before it was welcomed", peer=self.peer, why=error.message)
            return
        self._open()

    def _receive_greeting(self, frame: bytes) -> None:
        """GREETING: only `Welcome` opens; everything else is a refusal."""
        try:
            seq, message = unpack(frame)
        except VersionMismatch as error:
            self._statistics.unknown_version += 1
            self.end(error)
            return
        except ProtocolError as error:
            self._statistics.malformed += 1
            self.end(error)
            return
        self._statistics.received += 1
        if isinstance(message, Failure):
            self.end(from_info(message.error))
        elif isinstance(message, Bye):
            self.end(PeerLost(f"the listener refused: {message.reason}"))
        elif not isinstance(message, Welcome) or seq != 1:
            self.end(ProtocolError(f"expected a welcome, got {type(message).__name__.lower()} {seq}"))
        elif message.version != PROTOCOL_VERSION:
            self.end(VersionMismatch(f"the listener speaks version {message.version}, we speak {PROTOCOL_VERSION}"))
        else:
            self.peer = Peer(message.kind, message.name, message.epoch)
            self._received = 1
            self._open()
            self._tell_greeted(None)

    def _open(self) -> None:
        self._state = SessionState.OPEN
        self._statistics.sessions += 1
        try:
            self._handler.opened(self)
        except Exception:  # a handler's bug must not take the bus down
            _log.exception("handler failed", every=1.0, on="opened", peer=self.peer)

    def _tell_greeted(self, error: MicroserveError | None) -> None:
        on_greeted, self._on_greeted = self._on_greeted, None
        if on_greeted is not None:
            on_greeted(error)

    # --- sending ---

    @property
    def closed(self) -> bool:
        return self._state is SessionState.CLOSED

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait in our queue because the transport has no room."""
        return self._queued_bytes

    def send(self, message: RpcMessage) -> None:
        if self._state is not SessionState.OPEN:
            raise PeerLost(f"session with {self.peer} is closed: {self._error}")
        self._post(message)

    def _post(self, message: Message) -> None:
        try:
            frame = pack(message, self._sent + 1)
        except TooLarge:
            self._statistics.oversized += 1
            raise
        self._sent += 1
        self._statistics.sent += 1
        self._sent_at = self._clock()
        if not self._queue:
            try:
                taken = self._channel.transmit(frame)
            except PeerLost as error:
                self.end(error)
                raise
            if taken:
                return
        if self._queued_bytes + len(frame) > self._settings.max_queue_bytes:
            self._statistics.overflows += 1
            overflow = PeerLost(f"{self.peer} reads too slowly: {self._queued_bytes} bytes were waiting for it")
            self.end(overflow, bye="you read too slowly")
            raise overflow
        self._queue.append(frame)
        self._queued_bytes += len(frame)

    def flush(self) -> bool:
        """Passes on what waits, as far as there is room. Returns whether anything moved."""
        moved = False
        while self._queue:
            try:
                if not self._channel.transmit(self._queue[0]):
                    return moved
            except PeerLost as error:
                self.end(error)
                return True
            moved = True
            self._queued_bytes -= len(self._queue.popleft())
        return moved

    # --- receiving ---

    def receive(self, frame: bytes) -> None:
        """One frame from the peer, in order of arrival. Never raises; may end the session."""
        if self._state is not SessionState.OPEN:
            if self._state is SessionState.GREETING:
                self._receive_greeting(frame)
            return
        self._heard_at = self._clock()
        try:
            seq = unpack_seq(frame)
        except (ProtocolError, VersionMismatch) as error:
            self._complain(error)
            return
        body = memoryview(frame)[HEADER_BYTES:]
        if seq != self._received + 1:
            self._out_of_sequence(seq, body)
            return
        self._received = seq
        try:
            message = decode(body)
        except ProtocolError as error:
            self._receive_undecodable(body, error)
            return
        if type(message) not in _RPC_TYPES:
            self._receive_control(message)
            return
        self._statistics.received += 1
        self._deliver(message)  # type: ignore[arg-type]

    def _deliver(self, message: RpcMessage) -> None:
        try:
            self._handler.received(self, message)
        except Exception:  # a handler's bug must not take the bus down
            _log.exception("handler failed", every=1.0, on=type(message).__name__, peer=self.peer)

    def _receive_control(self, message: AnyMessage) -> None:
        if isinstance(message, Ping | Pong | Bye):
            self._statistics.received += 1
        if isinstance(message, Ping):
            self._try_post(Pong())
        elif isinstance(message, Bye):
            self.end(PeerLost(f"{self.peer} ended the session: {message.reason or 'goodbye'}"))
        elif isinstance(message, Pong):
            if self._pings:
                self.round_trip = self._clock() - self._pings.popleft()
        else:
            self._complain(ProtocolError(f"{type(message).__name__.lower()} has no place in an open session"))

    def _out_of_sequence(self, seq: int, body: memoryview) -> None:
        # A goodbye overtakes what waits in front of it, and comes without a number from a peer that has no session.
        try:
            message = decode(body)
        except ProtocolError:
            message = None
        if isinstance(message, Bye):
            self._receive_control(message)
            return
        self._statistics.sequence_gaps += 1
        what = f"sequence broken: expected {self._received + 1}, got {seq}"
        self.end(PeerLost(f"{self.peer}: {what}"), bye=what)

    def _receive_undecodable(self, body: memoryview, error: ProtocolError) -> None:
        """The frame is in sequence, but what it says is not ours. Whoever waits for it must not wait for ever."""
        remains = salvage(body)
        if remains.id is not None and remains.tag in ("part", "reply", "failure"):
            self._statistics.malformed += 1
            _log.warning("undecodable answer", every=1.0, peer=self.peer, kind=remains.tag, why=error.message)
            if remains.tag == "part":
                self._try_post(Cancel(id=remains.id))
            self._deliver(Failure(id=remains.id, error=to_info(error)))
        elif remains.tag in ("part", "reply", "failure", "batch"):
            # Answers of unknown calls are lost: those calls can only end with the session.
            self._statistics.malformed += 1
            self.end(error, bye=error.message)
        elif remains.refusal is not None:
            # The frame is ours and makes sense; what is wrong is what somebody asks for.
            self._statistics.received += 1
            _log.debug("a call was refused", peer=self.peer, why=remains.refusal.message)
            self._try_post(Failure(id=remains.id, error=to_info(remains.refusal)))
        else:
            self._complain(error, remains.id if remains.tag == "call" else None)

    def _complain(self, error: MicroserveError, call: int | None = None) -> None:
        """Counts a frame that makes no sense, and tells the peer."""
        if isinstance(error, VersionMismatch):
            self._statistics.unknown_version += 1
        else:
            self._statistics.malformed += 1
        _log.warning("a frame made no sense", every=1.0, peer=self.peer, why=error.message)
        self._try_post(Failure(id=call, error=to_info(error)))

    def _try_post(self, message: Message) -> None:
        try:
            self._post(message)
        except PeerLost as error:
            # The session has ended and its handler knows; there is nobody to answer any more.
            _log.debug("no answer possible", peer=self.peer, why=error.message)

    # --- time ---

    def tick(self, stalled: float = 0.0) -> None:
        """Looks at the clock: pings an idle peer, gives up a silent one.

        `stalled` is how many seconds late this look is: while we did not look we could not hear either,
        so that time is not the peer's silence.
        """
        if self._state is not SessionState.OPEN:
            return
        now = self._clock()
        self._heard_at = min(now, self._heard_at + stalled)
        silent = now - self._heard_at
        if silent >= self._settings.silence:
            self.end(PeerLost(f"nothing heard from {self.peer} for {silent:.1f} s"), bye="you fell silent")
            return
        idle = max(now - self._sent_at, silent)
        since_ping = now - self._pinged_at
        # A busy session proves its life by itself; it is pinged now and then to know how long the way is.
        if since_ping >= (self._settings.heartbeat if idle >= self._settings.heartbeat else PING_EVERY):
            self.ping()

    def ping(self) -> None:
        """Asks for a sign of life; also finds out whether the transport still knows the peer."""
        self._pinged_at = self._clock()
        if self._queue:
            self.flush()
        if not self._queue and self._state is SessionState.OPEN:
            self._pings.append(self._pinged_at)
            self._try_post(Ping())

    # --- ending ---

    def close(self, reason: str = "") -> None:
        self.end(PeerLost(f"session with {self.peer} was closed here{f': {reason}' if reason else ''}"), bye=reason)

    def give_up(self, error: MicroserveError) -> None:
        """Ends the session because of `error` unless the peer has greeted."""
        if self._state is SessionState.GREETING:
            self.end(error)

    def end(self, error: MicroserveError, *, bye: str | None = None) -> None:
        """Ends the session because of `error`, once; with `bye`, tells the peer as well if that is possible now."""
        if self._state is SessionState.CLOSED:
            return
        was_open = self._state is SessionState.OPEN
        self._state = SessionState.CLOSED
        self._error = error
        if bye is not None and was_open:
            self._say_bye(bye)
        self._queue.clear()
        self._queued_bytes = 0
        if was_open:
            self._statistics.sessions -= 1
        self._channel.release(self)
        if was_open:
            try:
                self._handler.lost(self, error)
            except Exception:  # a handler's bug must not take the bus down
                _log.exception("handler failed", every=1.0, on="lost", peer=self.peer)
        self._tell_greeted(error)

    def _say_bye(self, reason: str) -> None:
        self._sent += 1
        try:
            # What waits goes first, as far as there is room; a goodbye that arrives out of sequence is understood.
            while self._queue and self._channel.transmit(self._queue[0]):
                self._queue.popleft()
            if self._channel.transmit(pack(Bye(reason=reason), self._sent)):
                self._statistics.sent += 1
        except PeerLost as error:
            _log.debug("no goodbye possible", peer=self.peer, why=error.message)
