"""The session: exchanged by the bus itself."""

from __future__ import annotations

from microserve.runtime.messages.base import Message, Name, Seconds


class Hello(Message, tag="hello", frozen=True):
    """First message of a session, from the side that dialled."""

    version: int
    kind: Name
    name: Name
    epoch: int
    heartbeat: Seconds = 1.0


class Welcome(Message, tag="welcome", frozen=True):
    """The answer to `Hello`: the session is open."""

    version: int
    kind: Name
    name: Name
    epoch: int
    heartbeat: Seconds = 1.0


class Ping(Message, tag="ping", frozen=True):
    """Sent on an idle session; any message proves life, and `Ping` is the one with nothing else to say."""


class Pong(Message, tag="pong", frozen=True):
    """The answer to `Ping`."""


class Bye(Message, tag="bye", frozen=True):
    """The sender ends the session; what belonged to it is aborted."""

    reason: str = ""


SessionMessage = Hello | Welcome | Ping | Pong | Bye
