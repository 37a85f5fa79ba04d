"""The listening side of sessions: tells the frames of many peers apart by routing id, and greets new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from microserve.runtime.codec import to_info
from microserve.runtime.errors import InvalidRequest, MicroserveError, PeerLost, ProtocolError, VersionMismatch
from microserve.runtime.frames import GREETING_SEQ, HEADER_BYTES, pack, unpack
from microserve.runtime.ids import Peer, valid_name
from microserve.runtime.log import get_logger
from microserve.runtime.messages import PROTOCOL_VERSION, Bye, Failure, Hello
from microserve.runtime.session import LiveSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.bus import BusStatistics, SessionHandler
    from microserve.runtime.messages import Message
    from microserve.runtime.session import Channel, SessionSettings

_log = get_logger(__name__)


def dialling_id(me: Peer, dial: int) -> bytes:
    """The routing id of this process's `dial`-th connection: libzmq wants one of its own for each."""
    return b"%b#%d" % (me.routing_id, dial)


def dial_number(peer: Peer, routing_id: bytes) -> int | None:
    """The `dial` of `dialling_id`; 0 for a plain `Peer.routing_id`; None when the routing id is not the peer's."""
    base, _, number = routing_id.partition(b"#")
    if base != peer.routing_id or not (number.isdigit() or routing_id == base):
        return None
    return int(number or 0)


class _Newest(NamedTuple):
    """The session of a name. A later epoch, or a later dial of the same epoch, replaces it."""

    order: tuple[int, int]
    routing_id: bytes
    session: LiveSession


class Switchboard:
    """The sessions of one listener. Pure: frames come in through `receive`, and go out through channels."""

    def __init__(
        self,
        me: Peer,
        handler: SessionHandler,
        channel: Callable[[bytes], Channel],
        settings: SessionSettings,
        statistics: BusStatistics,
        *,
        admit: Callable[[Hello, str], str] | None = None,
    ) -> None:
        """`channel` makes the way to a routing id. `admit(hello, user)` gives a peer's role, or raises why it has none;
        None where keys are not in use."""
        self._me = me
        self._handler = handler
        self._channel = channel
        self._admit = admit
        self._settings = settings
        self._statistics = statistics
        self._sessions: dict[bytes, LiveSession] = {}
        self._newest: dict[tuple[str, str], _Newest] = {}

    @property
    def sessions(self) -> list[LiveSession]:
        """The open sessions."""
        return list(self._sessions.values())

    def session(self, routing_id: bytes) -> LiveSession | None:
        """The open session of that routing id."""
        return self._sessions.get(routing_id)

    def receive(self, routing_id: bytes, frame: bytes, user: str = "") -> None:
        """One frame from `routing_id`, sent under the key `user`. Never raises."""
        session = self._sessions.get(routing_id)
        if session is not None and session.user != user:
            # Routing ids are the sender's own choice: somebody took another's, and libzmq handed the connection over.
            self._statistics.unauthorized += 1
            session.end(PeerLost(f"somebody else's connection took the place of {session.peer}"))
            session = None
        if session is not None and frame[1:HEADER_BYTES] != GREETING_SEQ:
            session.receive(frame)
            return
        try:
            _seq, message = unpack(frame)
        except VersionMismatch as error:
            self._statistics.unknown_version += 1
            self._answer(routing_id, Failure(id=None, error=to_info(error)))
            return
        except ProtocolError as error:
            if session is not None:
                session.receive(frame)
                return
            self._statistics.malformed += 1
            _log.debug("dropped a frame of an unknown sender", size=len(frame), why=error.message)
            return
        if isinstance(message, Hello):
            self._greet(routing_id, message, user)
        elif session is not None:
            session.receive(frame)
        else:
            self._statistics.strays += 1
            if not isinstance(message, Bye):
                self._answer(routing_id, Bye(reason="no session"))

    def _greet(self, routing_id: bytes, hello: Hello, user: str) -> None:
        peer = Peer(hello.kind, hello.name, hello.epoch)
        name = (peer.kind, peer.name)
        dial = dial_number(peer, routing_id)
        if hello.version != PROTOCOL_VERSION:
            self._statistics.unknown_version += 1
            ours = f"{self._me} speaks {PROTOCOL_VERSION}"
            self._refuse(routing_id, VersionMismatch(f"you speak version {hello.version}, {ours}"))
            return
        if dial is None or not valid_name(peer.name) or not valid_name(peer.kind):
            self._statistics.malformed += 1
            self._refuse(routing_id, InvalidRequest(f"the hello of {peer} does not fit its routing id", param="name"))
            return
        role = ""
        if self._admit is not None:
            try:
                role = self._admit(hello, user)
            except MicroserveError as error:
                self._statistics.unauthorized += 1
                self._refuse(routing_id, error)
                return
        newest = self._newest.get(name)
        if newest is not None and newest.order > (peer.epoch, dial):
            self._statistics.strays += 1
            self._refuse(routing_id, PeerLost(f"a newer {peer.kind} of the name {peer.name} has a session"))
            return
        self._statistics.received += 1
        if newest is not None:
            # To the same routing id no goodbye: it would arrive on the new connection.
            bye = None if newest.routing_id == routing_id else "you, or a newer incarnation, began another session"
            newest.session.end(PeerLost(f"{newest.session.peer} began another session as {peer}"), bye=bye)
        channel = _Tracked(self, routing_id, self._channel(routing_id))
        session = LiveSession(peer, self._handler, channel, self._settings, self._statistics)
        session.role, session.user = role, user
        self._sessions[routing_id] = session
        self._newest[name] = _Newest((peer.epoch, dial), routing_id, session)
        session.accept(self._me)

    def _refuse(self, routing_id: bytes, error: MicroserveError) -> None:
        _log.warning("session refused", every=1.0, why=error.message)
        self._answer(routing_id, Failure(id=None, error=to_info(error)))

    def _answer(self, routing_id: bytes, message: Message) -> None:
        """Tells somebody who has no session; if that is impossible now, their own timeout tells them."""
        try:
            if self._channel(routing_id).transmit(pack(message, 0)):
                self._statistics.sent += 1
        except PeerLost as error:
            _log.debug("no answer possible", why=error.message)

    def forget(self, routing_id: bytes, session: LiveSession) -> None:
        """`session` has ended."""
        if self._sessions.get(routing_id) is session:
            del self._sessions[routing_id]
        name = (session.peer.kind, session.peer.name)
        if name in self._newest and self._newest[name].session is session:
            del self._newest[name]

    def tick(self, stalled: float = 0.0) -> None:
        """Every session looks at the clock."""
        for session in self.sessions:
            session.tick(stalled)

    def probe(self) -> None:
        """Somebody was disconnected, nobody knows who: a ping finds out."""
        for session in self.sessions:
            session.ping()

    def close(self, reason: str) -> None:
        """Ends every session."""
        for session in self.sessions:
            session.close(reason)


class _Tracked:
    """A channel that also tells the switchboard when its session has ended."""

    __slots__ = ("_channel", "_routing_id", "_switchboard", "transmit")

    def __init__(self, switchboard: Switchboard, routing_id: bytes, channel: Channel) -> None:
        self._switchboard = switchboard
        self._routing_id = routing_id
        self._channel = channel
        self.transmit = channel.transmit

    def release(self, session: LiveSession) -> None:
        self._switchboard.forget(self._routing_id, session)
        self._channel.release(session)
