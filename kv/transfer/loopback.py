"""A transport within one process: pages are copied from pool to pool. For tests, and for engines that share a process.

Engines meet in a `LoopbackHub`. It can be told to do what networks do: hold, fail or lose.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections import deque
from typing import TYPE_CHECKING

from microserve.kv.transfer.base import KvMemory, LinkReport, PostState, PostStatus
from microserve.kv.transfer.plan import runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.kv.pages import PageArray


class LoopbackHub:
    """Where the loopback transports of one process find each other, and where tests make trouble.

    `held`: posts to these peers stay under way until `release`. `failing`: posts to them fail when they are polled.
    `mute`: what is written to them is not notified. Keys are (from, to) names; "*" stands for any.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.members: dict[str, LoopbackTransport] = {}
        self.held: set[tuple[str, str]] = set()
        self.failing: set[tuple[str, str]] = set()
        self.mute: set[tuple[str, str]] = set()
        self.pushed: list[tuple[str, str, int]] = []
        """(from, to, pages) of every post that was completed."""

    def hold(self, source: str = "*", target: str = "*") -> None:
        """Posts from now on stay under way."""
        self.held.add((source, target))

    def let_go(self) -> None:
        """What was held goes on at the next poll."""
        self.held.clear()

    def applies(self, rules: set[tuple[str, str]], source: str, target: str) -> bool:
        """Whether one of `rules` is about this way."""
        return any(a in ("*", source) and b in ("*", target) for a, b in rules)


class LoopbackPost:
    """One push."""

    __slots__ = ("notification", "peer", "source", "status", "target", "transport")

    def __init__(
        self, transport: LoopbackTransport, peer: str, source: PageArray, target: PageArray, notification: bytes
    ) -> None:
        self.transport = transport
        self.peer = peer
        self.source = source
        self.target = target
        self.notification = notification
        self.status = PostStatus(PostState.ACTIVE)

    @property
    def nbytes(self) -> int:
        return len(self.source) * self.transport.memory.page_bytes


class LoopbackTransport:
    """Implements `base.Transport`. Its own name may be a peer, too."""

    name = "loopback"

    def __init__(self, hub: LoopbackHub, me: str, memory: KvMemory, *, wake: Callable[[], None] = lambda: None) -> None:
        self.memory = memory
        self.me = me
        self._hub = hub
        self._wake = wake
        self._peers: set[str] = set()
        self._inbox: deque[tuple[str, bytes]] = deque()
        self._posts: set[LoopbackPost] = set()
        with hub.lock:
            hub.members[me] = self

    def metadata(self) -> bytes:
        return json.dumps({"name": self.me, "page_bytes": self.memory.page_bytes}).encode()

    def connect(self, peer: str, metadata: bytes) -> LinkReport:
        with self._hub.lock:
            found = self._hub.members.get(peer)
        if found is None:
            return LinkReport("local", error=f"{peer} is not in this process")
        if found.memory.page_bytes != self.memory.page_bytes:
            return LinkReport("local", error=f"{peer} has pages of {found.memory.page_bytes} bytes")
        self._peers.add(peer)
        return LinkReport("local")

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)

    def post(self, peer: str, source: PageArray, target: PageArray, notification: bytes) -> LoopbackPost | str:
        if peer != self.me and peer not in self._peers:
            return f"{peer} is not connected"
        if len(source) == 0 or len(source) != len(target):
            return f"{len(source)} pages cannot go into {len(target)}"
        made = LoopbackPost(self, peer, source, target, notification)
        self._posts.add(made)
        return made

    def poll(self, post: LoopbackPost) -> PostStatus:  # type: ignore[override, unused-ignore]
        if post.status.state is PostState.ACTIVE:
            post.status = self._advance(post)
        return post.status

    def release(self, post: LoopbackPost) -> None:  # type: ignore[override, unused-ignore]
        self._posts.discard(post)

    def arrivals(self) -> list[tuple[str, bytes]]:
        found = []
        while self._inbox:
            found.append(self._inbox.popleft())
        return found

    def close(self) -> None:
        with self._hub.lock:
            if self._hub.members.get(self.me) is self:
                del self._hub.members[self.me]

    def _advance(self, post: LoopbackPost) -> PostStatus:
        hub, peer = self._hub, post.peer
        if hub.applies(hub.held, self.me, peer):
            return post.status
        if hub.applies(hub.failing, self.me, peer):
            return PostStatus(PostState.FAILED, "the link was told to fail")
        if peer != self.me and peer not in self._peers:
            return PostStatus(PostState.FAILED, f"{peer} was disconnected")
        with hub.lock:
            other = hub.members.get(peer)
            if other is None:
                return PostStatus(PostState.FAILED, f"{peer} is gone")
            size = self.memory.page_bytes
            for first, second, count in runs(post.source, post.target).tolist():
                ctypes.memmove(other.memory.address + second * size, self.memory.address + first * size, count * size)
            hub.pushed.append((self.me, peer, len(post.source)))
            if not hub.applies(hub.mute, self.me, peer):
                other._inbox.append((self.me, post.notification))
                other._wake()
        return PostStatus(PostState.DONE)
