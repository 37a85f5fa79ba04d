"""The protocol of a transport: one-sided pushes of page lists from our pool into a peer's.

A transport is used by one thread. What goes wrong with a peer is a value, never an exception: a dead peer is
everyday life.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from microserve.kv.pages import PageArray


@dataclass(frozen=True, slots=True)
class KvMemory:
    """The pool as plain memory: `total_pages` pages of `page_bytes` bytes from `address` on.

    `device` is "cpu" or "cuda:N". `owner` keeps the memory alive.
    """

    address: int
    page_bytes: int
    total_pages: int
    device: str = "cpu"
    owner: object = None


class PostState(Enum):
    """Where a post stands."""

    ACTIVE = "active"
    DONE = "done"
    FAILED = "failed"


class PostStatus(Struct, frozen=True):
    """`error` says why a post failed. A failed post writes nothing more."""

    state: PostState
    error: str = ""


class LinkReport(Struct, frozen=True):
    """What carries pages to a peer. `error` "" means that the peer can be reached."""

    transport: str
    """"cuda_ipc", "rdma", "shm", "tcp", "local" … as far as it can be told."""
    gigabytes_per_second: float = 0.0
    error: str = ""


class Post(Protocol):
    """One push under way; made by `Transport.post` and understood by the transport that made it."""

    @property
    def nbytes(self) -> int: ...


class Connecting(Protocol):
    """A connection that is being made, warmed and measured."""

    def poll(self) -> LinkReport | None:
        """Drives it. What came of it, once that is known; not to be called again after that."""
        ...


class Transport(Protocol):
    """Pushes pages of one registered pool. Every method but `metadata` is called from the transfer thread alone.

    Peers that push here, or connect, are answered within `arrivals` and `poll`: call `arrivals` now and then, always.

    `peer` is a name that is unique for an incarnation: "engine_id:epoch in hex".
    """

    @property
    def name(self) -> str:
        """ "nixl" or "loopback"."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs to push into our pool. Opaque; the same for the transport's life."""
        ...

    def connect(self, peer: str, metadata: bytes) -> Connecting:
        """Begins to make and warm the connection to `peer`, and to probe what it is. Again for a known peer: measures
        again.

        The peer has to call `arrivals` meanwhile. The probe writes into no page of the peer's, but where its metadata
        says that nothing lies. Our own name needs no connection.
        """
        ...

    def disconnect(self, peer: str) -> None:
        """Forgets `peer`. Idempotent. Posts under way to it fail, although they may still be written: so for a peer
        that lives, wait for its posts first.
        """
        ...

    def warm(self, peer: str) -> bool:
        """A push to `peer` is to come: does what makes its beginning, and its notification, quick. Writes no page.

        Whether pushes to it are so quick that whoever orders one should not fall asleep before.
        """
        ...

    def post(self, peer: str, source: PageArray, target: PageArray, notification: bytes) -> Post | str:
        """Starts to push our pages `source` into the peer's pages `target` (both int32 [n], n >= 1, in pairs).

        `notification` reaches the peer's `arrivals` when, and only when, all of it has been written. Returns why not,
        when it cannot be started.
        """
        ...

    def poll(self, post: Post) -> PostStatus:
        """Where `post` stands. Drives it, too: call it until it is done or has failed."""
        ...

    def release(self, post: Post) -> None:
        """Frees what a done or failed post holds. Once for each post."""
        ...

    def arrivals(self) -> list[tuple[str, bytes]]:
        """Notifications that came since the last call: (peer, notification).

        An empty notification is not for us to read: it says only that `peer` is about, so look again soon.
        """
        ...

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        ...
