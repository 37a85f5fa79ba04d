"""A transport within one process: pages are copied from pool to pool. For tests, and for engines that share a process.

Engines meet in a `LoopbackHub`. It can be told to do what networks do: hold, fail, tear, lose, and lose a peer.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from typing import TYPE_CHECKING, cast

import msgspec

from microserve.kv.transfer.base import KvMemory, LinkReport, PostState, PostStatus
from microserve.kv.transfer.plan import planned, runs
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.kv.pages import PageArray
    from microserve.kv.transfer.base import Post
    from microserve.runtime.clock import Clock

Rules = set[tuple[str, str]]
"""Ways, each (from, to); "*" stands for any name."""

_ACTIVE = PostStatus(PostState.ACTIVE)


class LoopbackHub:
    """Where the loopback transports of one process find each other, and where tests make trouble.

    A post over a way that is in `held` stays under way until `let_go`; in `failing`, it fails without having written
    anything; in `tearing`, it fails after the first half; in `mute`, it is written and never notified; in `late`, it
    lies in the receiver's buffers until that one looks, whoever is dead by then, and its sender hears no more of it.
    A page takes `seconds_per_page` of `clock`; what one engine pushes goes one after the other.
    """

    def __init__(self, *, seconds_per_page: float = 0.0, clock: Clock = monotonic) -> None:
        self.seconds_per_page = seconds_per_page
        self.clock = clock
        self.lock = threading.Lock()
        """Held while pages are copied: a transport that was closed is not written any more."""
        self.members: dict[str, LoopbackTransport] = {}
        self.held: Rules = set()
        self.failing: Rules = set()
        self.tearing: Rules = set()
        self.mute: Rules = set()
        self.late: Rules = set()
        self.pushed: list[tuple[str, str, int]] = []
        """(from, to, pages) of every post that was completed."""
        self.warmed: list[tuple[str, str]] = []
        """(from, to) of every way that was made ready for a push."""

    def hold(self, source: str = "*", target: str = "*") -> None:
        """Posts from now on stay under way."""
        self.held.add((source, target))

    def let_go(self) -> None:
        """What was held goes on at the next poll."""
        self.held.clear()

    def kill(self, name: str) -> None:
        """`name` is dead: what it had under way is never written, and what goes to it fails."""
        with self.lock:
            self.members.pop(name, None)

    def applies(self, rules: Rules, source: str, target: str) -> bool:
        """Whether one of `rules` is about this way."""
        return any(a in ("*", source) and b in ("*", target) for a, b in rules)


class LoopbackPost:
    """One push."""

    __slots__ = ("due", "nbytes", "notification", "peer", "sent", "source", "status", "target")

    def __init__(
        self, peer: str, source: PageArray, target: PageArray, notification: bytes, nbytes: int, due: float
    ) -> None:
        self.due = due
        self.peer = peer
        self.source = source
        self.target = target
        self.notification = notification
        self.nbytes = nbytes
        self.status = _ACTIVE
        self.sent = False
        """Whether it lies in the receiver's buffers, or did."""


class LoopbackConnecting:
    """A connection that is there at once."""

    def __init__(self, report: LinkReport) -> None:
        self._report = report

    def poll(self) -> LinkReport | None:
        return self._report


class _Metadata(msgspec.Struct, frozen=True):
    name: str
    page_bytes: int


class LoopbackTransport:
    """Implements `Transport` for pools in host memory. `wake` is called when something was written here."""

    def __init__(self, hub: LoopbackHub, me: str, memory: KvMemory, *, wake: Callable[[], None] = lambda: None) -> None:
        if memory.device != "cpu":
            raise ConfigError(f"the loopback transport moves host memory, not that of {memory.device}")
        self.me = me
        self.memory = memory
        self._hub = hub
        self._wake = wake
        self._peers: set[str] = set()
        self._inbox: deque[tuple[str, bytes]] = deque()
        self._buffers: dict[LoopbackPost, tuple[str, bytes]] = {}
        """Pages that were sent here and that we have not looked at: (sender, pages) by post."""
        self._posts: set[LoopbackPost] = set()
        self._busy_until = 0.0
        with hub.lock:
            if me in hub.members:
                raise ConfigError(f"there is a {me} in this process already")
            hub.members[me] = self

    @property
    def name(self) -> str:
        return "loopback"

    @property
    def due(self) -> float | None:
        """When the first of the posts under way may be over; None without any."""
        active = [post.due for post in self._posts if post.status.state is PostState.ACTIVE]
        return min(active, default=None)

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(_Metadata(self.me, self.memory.page_bytes))

    def connect(self, peer: str, metadata: bytes) -> LoopbackConnecting:
        error = self._connect(peer, metadata)
        return LoopbackConnecting(LinkReport("local", error=error))

    def _connect(self, peer: str, metadata: bytes) -> str:
        try:
            theirs = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            return f"the metadata of {peer} makes no sense: {error}"
        if theirs.name != peer:
            return f"the metadata is that of {theirs.name}, not of {peer}"
        if theirs.page_bytes != self.memory.page_bytes:
            return f"{peer} has pages of {theirs.page_bytes} bytes, we of {self.memory.page_bytes}"
        with self._hub.lock:
            if peer not in self._hub.members:
                return f"{peer} is not in this process"
        self._peers.add(peer)
        return ""

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)

    def warm(self, peer: str) -> bool:
        self._hub.warmed.append((self.me, peer))
        return False

    def post(self, peer: str, source: PageArray, target: PageArray, notification: bytes) -> LoopbackPost | str:
        if peer != self.me and peer not in self._peers:
            return f"{peer} is not connected"
        with self._hub.lock:
            other = self._hub.members.get(peer)
            total = other.memory.total_pages if other is not None else None
        if total is None:
            return f"{peer} is gone"
        if isinstance(found := planned(source, target, self.memory.total_pages, total), str):
            return found
        hub, count = self._hub, len(source)
        if hub.seconds_per_page:
            self._busy_until = max(hub.clock(), self._busy_until) + count * hub.seconds_per_page
        made = LoopbackPost(peer, source, target, notification, count * self.memory.page_bytes, self._busy_until)
        self._posts.add(made)
        return made

    def poll(self, post: Post) -> PostStatus:
        ours = cast("LoopbackPost", post)
        if ours.status.state is PostState.ACTIVE:
            ours.status = self._advance(ours)
        return ours.status

    def release(self, post: Post) -> None:
        self._posts.remove(cast("LoopbackPost", post))

    def arrivals(self) -> list[tuple[str, bytes]]:
        for post in list(self._buffers):
            self._unpack(post, *self._buffers.pop(post))
        found = []
        while self._inbox:
            found.append(self._inbox.popleft())
        return found

    def close(self) -> None:
        self._peers.clear()
        with self._hub.lock:
            if self._hub.members.get(self.me) is self:
                del self._hub.members[self.me]

    def check_integrity(self) -> None:
        """Raises `RuntimeError` when a post was never released."""
        if self._posts:
            raise RuntimeError(f"{len(self._posts)} posts of {self.me} were not released")

    def _advance(self, post: LoopbackPost) -> PostStatus:
        hub, peer = self._hub, post.peer
        if peer != self.me and peer not in self._peers:
            return PostStatus(PostState.FAILED, f"{peer} was disconnected")
        with hub.lock:
            if hub.members.get(self.me) is not self:
                return _ACTIVE  # we are dead: nobody is told anything
            other = hub.members.get(peer)
            if other is None:
                return PostStatus(PostState.FAILED, f"{peer} is gone")
            if hub.applies(hub.held, self.me, peer) or (post.due and hub.clock() < post.due):
                return _ACTIVE
            if hub.applies(hub.failing, self.me, peer):
                return PostStatus(PostState.FAILED, "the link was told to fail")
            if hub.applies(hub.tearing, self.me, peer):
                half = len(post.source) // 2
                self._copy(other, post.source[:half], post.target[:half])
                return PostStatus(PostState.FAILED, "the link was told to tear")
            if hub.applies(hub.late, self.me, peer):
                if not post.sent:
                    other._buffers[post] = (self.me, self._pack(post.source))
                    post.sent = True
                return _ACTIVE
            self._copy(other, post.source, post.target)
            other._written(self.me, post)
        other._wake()
        return PostStatus(PostState.DONE)

    def _written(self, sender: str, post: LoopbackPost) -> None:
        """All of a post of `sender`'s is in our pool."""
        hub = self._hub
        hub.pushed.append((sender, self.me, len(post.target)))
        if not hub.applies(hub.mute, sender, self.me):
            self._inbox.append((sender, post.notification))

    def _pack(self, pages: PageArray) -> bytes:
        size = self.memory.page_bytes
        return b"".join(ctypes.string_at(self.memory.address + page * size, size) for page in pages.tolist())

    def _unpack(self, post: LoopbackPost, sender: str, pages: bytes) -> None:
        size = self.memory.page_bytes
        for index, page in enumerate(post.target.tolist()):
            ctypes.memmove(self.memory.address + page * size, pages[index * size : (index + 1) * size], size)
        self._written(sender, post)

    def _copy(self, other: LoopbackTransport, source: PageArray, target: PageArray) -> None:
        size = self.memory.page_bytes
        here, there = self.memory.address, other.memory.address
        for first, second, count in runs(source, target):
            ctypes.memmove(there + second * size, here + first * size, count * size)
