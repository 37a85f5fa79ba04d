"""A ZMQ socket on the event loop, and the news of its connections."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Final

import zmq

from microserve.runtime.errors import AddressError, ConfigError
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.session import LiveSession

_log = get_logger(__name__)

_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
RCVMORE: Final = int(zmq.RCVMORE)
NOBLOCK: Final = int(zmq.NOBLOCK)
NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)

_FAIR_SHARE: Final = 256
"""Messages read from one socket before the loop may do something else."""

_DRAIN_ROUNDS: Final = 16
"""Fair shares that a drain reads at most: more than the buffers of a peer hold, and still an end for busy listeners."""

LINGER_MS: Final = 250
"""How long a goodbye may take to leave after a socket was closed on purpose."""

_SETTLE: Final = 0.005
"""Seconds between the news of a disconnect and acting on it: what had arrived before is delivered first."""

_MONITOR_EVENT: Final = struct.Struct("=HI")

_REFUSALS: Final = int(
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Port:
    """A ZMQ socket on the loop: calls `take` to receive one message, whenever there may be one.

    `take` raises `zmq.Again` when there is none.
    """

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[], None]) -> None:
        self.socket = socket
        self.closed = False
        self.blocked: set[LiveSession] = set()
        """Sessions whose frames found no room."""
        self._take = take
        self._events: Callable[[int], int] = socket.getsockopt  # type: ignore[assignment]
        self._loop = asyncio.get_running_loop()
        self._fd: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._reading = False
        self._touched = False
        self._scheduled = False
        self._loop.add_reader(self._fd, self._wake)
        self.recheck()

    def recheck(self) -> None:
        """Must follow every send: it may have taken the descriptor's edge. Looks at the socket again if that is so."""
        if self._reading:
            self._touched = True
        elif not self._scheduled and not self.closed and (self.blocked or self._events(_EVENTS) & _POLLIN):
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self.closed:
            self._scheduled = True
            self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        self._scheduled = False
        self._read_all()

    def _wake(self) -> None:
        """The descriptor fired, so there is a message, most likely: one is received without asking first."""
        if self._reading or self.closed:
            return
        self._reading = True
        self._touched = False
        try:
            self._take()
        except zmq.Again:
            self._touched = True
        except zmq.ContextTerminated:
            self._left_behind()
        finally:
            self._reading = False
        if self._touched or self.blocked:
            self._read_all()
        else:
            # Whoever was woken by this message runs first; then one look covers what has arrived and what they sent.
            self._schedule()

    def _read_all(self) -> None:
        """Receives and flushes until there is nothing to do, or others should have a turn."""
        if self._reading or self.closed:
            return
        self._reading = True
        exhausted = False
        try:
            for _ in range(_FAIR_SHARE):
                if self._events(_EVENTS) & _POLLIN:
                    self._take()
                elif not self._flush():
                    exhausted = True
                if exhausted or self.closed:
                    break
            else:
                self._flush()
        except zmq.ContextTerminated:
            self._left_behind()
        finally:
            self._reading = False
            if not exhausted:
                self._schedule()

    def _left_behind(self) -> None:
        """The context ends, and waits for every socket of it: one that nobody has closed closes itself."""
        _log.warning("a socket was left open when the bus closed", every=1.0)
        self.close()

    def _flush(self) -> bool:
        """Moves blocked frames; returns whether any moved (then the socket must be looked at again)."""
        moved = False
        for session in tuple(self.blocked):
            moved |= session.flush()
            if not session.queued_bytes:
                self.blocked.discard(session)
        return moved

    def drain(self) -> None:
        """Delivers what has arrived, now."""
        for _ in range(_DRAIN_ROUNDS):
            self._scheduled = False
            self._read_all()
            if self.closed or not self._scheduled:
                return

    def close(self, *, linger: int = 0) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        self.socket.close(linger)


class Monitor:
    """Calls `disconnected()` when a connection of `port`'s socket has gone, after what it delivered has been read.

    `refused(unsaid)` is called when a handshake failed: one of the two sides has the wrong key, or none; or, `unsaid`,
    the other one left, or said nothing that could be understood.
    """

    def __init__(self, port: Port, disconnected: Callable[[], None], refused: Callable[[bool], None]) -> None:
        self._watched = port
        self._disconnected = disconnected
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._port = Port(port.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSALS), self._take)

    def _take(self) -> None:
        event, _value = _MONITOR_EVENT.unpack(self._port.socket.recv_multipart(NOBLOCK)[0])
        if event & _REFUSALS:
            self._refused(event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        elif event == zmq.EVENT_DISCONNECTED and self._timer is None:
            self._timer = self._loop.call_later(_SETTLE, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self._watched.drain()
        self._disconnected()

    def close(self) -> None:
        """Must come before the watched socket is closed."""
        if self._port.closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._watched.socket.disable_monitor()
        self._port.close()


def plain_send(socket: zmq.Socket[bytes]) -> Callable[[bytes, int], object]:
    """`socket.send` without its conveniences, which cost as much as the rest of it."""
    return super(zmq.Socket, socket).send


def allow_ipv6(socket: zmq.Socket[bytes], endpoint: str) -> None:
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)


def bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Binds, and returns the resolved endpoint. Closes the socket and raises `ConfigError` when that is impossible."""
    try:
        allow_ipv6(socket, endpoint)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        # What ZeroMQ cannot even read stays wrong.
        kind = ConfigError if error.errno in (zmq.EINVAL, zmq.EPROTONOSUPPORT) else AddressError
        raise kind(f"cannot listen at {endpoint!r}: {error}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
