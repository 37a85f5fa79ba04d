"""The transfer thread: the only one that touches the transport. Orders in, arrivals and results out.

It polls at most every 50 µs while pushes are under way, more and more seldom while notifications are awaited, and
parks otherwise until somebody wakes it.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from microserve.kv.transfer.base import LinkReport, PostState
from microserve.runtime.clock import monotonic
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.kv.pages import PageArray
    from microserve.kv.transfer.base import Post, Transport
    from microserve.runtime.clock import Clock

_ARRIVAL: Final = struct.Struct("<4sQQQII")
_MAGIC: Final = b"mkv1"

_BUSY_WAIT = 50e-6
"""Seconds between polls while pushes are under way."""
_LONGEST_WAIT = 2e-3
"""Seconds between polls while notifications are awaited and none has come for long."""
_GROWTH = 1.25
"""How the wait between polls grows while nothing happens."""
_IDLE_WAIT = 0.25
"""Seconds between polls while nothing is expected: peers that connect need an answer now and then."""
_LAST_PUSHES = 1.0
"""Seconds that active pushes get to end when the thread is told to stop."""

_log = get_logger(__name__)


class Arrival(Struct, frozen=True):
    """Pages `[first_page, first_page + count)` of a lease were written under a claim, says our own transport."""

    peer: str
    epoch: int
    lease: int
    claim: int
    first_page: int
    count: int


def encode_arrival(epoch: int, lease: int, claim: int, first_page: int, count: int) -> bytes:
    """The notification that goes with a push: for whom it is, and what it wrote. `epoch` is the receiver's."""
    return _ARRIVAL.pack(_MAGIC, epoch, lease, claim, first_page, count)


def decode_arrival(peer: str, notification: bytes) -> Arrival | None:
    """What `encode_arrival` wrote; None for anything else."""
    if len(notification) != _ARRIVAL.size or not notification.startswith(_MAGIC):
        return None
    _, epoch, lease, claim, first_page, count = _ARRIVAL.unpack(notification)
    return Arrival(peer, epoch, lease, claim, first_page, count)


class Pushed(Struct, frozen=True):
    """How a push ended; `error` "" means well. Once told, it writes nothing more."""

    error: str
    nbytes: int
    seconds: float


class Push(Struct, eq=False):
    """Pages to push: `source` are ours, `target` the peer's, int32 [n], in pairs.

    It is not begun after `not_after` (monotonic seconds). `done` is posted to the event loop, once.
    """

    peer: str
    source: PageArray
    target: PageArray
    notification: bytes
    not_after: float
    done: Callable[[Pushed], None]


class _Active(Struct, eq=False):
    order: Push
    post: Post
    began: float


class TransferThread:
    """Drives a transport. What does not say otherwise is for other threads."""

    def __init__(
        self,
        transport: Transport,
        *,
        arrived: Callable[[list[Arrival]], None],
        post: Callable[..., object],
        clock: Clock = monotonic,
    ) -> None:
        """`arrived` is called in the transfer thread; everything else goes through `post` to the event loop."""
        self.metadata = transport.metadata()
        """What a peer needs to push into our pool."""
        self.transport_name = transport.name
        self._transport = transport
        self._arrived = arrived
        self._post = post
        self._clock = clock
        self._inbox: deque[Callable[[], object]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._expected = 0
        self._lock = threading.Lock()
        self._active: list[_Active] = []
        self._wait = _BUSY_WAIT
        self._counts = dict.fromkeys(("pushes", "pushed_bytes", "push_failures", "arrivals", "malformed_arrivals"), 0)
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-transfer", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread. Call once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread: active pushes get a second, what was not begun fails. Closes the transport. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def connect(self, peer: str, metadata: bytes, done: Callable[[LinkReport], None]) -> None:
        """Makes, warms and measures the way to `peer`; `done` is posted to the event loop."""
        self._command(lambda: self._post(done, self._transport.connect(peer, metadata)))

    def disconnect(self, peer: str) -> None:
        """Forgets `peer`. Idempotent."""
        self._command(lambda: self._transport.disconnect(peer))

    def push(self, order: Push) -> None:
        """Begins a push as soon as the thread comes to it."""
        self._command(lambda: self._begin(order))

    def expect(self, change: int) -> None:
        """So many notifications more (or fewer) are awaited: while there are any, the thread looks for them."""
        with self._lock:
            self._expected += change
        if change > 0:
            self._wake.set()

    def wake(self) -> None:
        """Something may have arrived."""
        self._wake.set()

    def statistics(self) -> dict[str, float]:
        """Counters by name."""
        values = {f"transfer_{name}": float(count) for name, count in self._counts.items()}
        return values | {"transfer_push_seconds": self._seconds, "transfer_active": float(len(self._active))}

    def _command(self, command: Callable[[], object]) -> None:
        self._inbox.append(command)
        self._wake.set()

    # --- in the transfer thread --------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """One round: orders, polls, arrivals. Whether anything happened."""
        self._wake.clear()
        happened = False
        while self._inbox:
            self._inbox.popleft()()
            happened = True
        for active in tuple(self._active):
            status = self._transport.poll(active.post)
            if status.state is not PostState.ACTIVE:
                happened = True
                self._end(active, status.error if status.state is PostState.FAILED else "")
        if found := self._transport.arrivals():
            happened = True
            self._tell_arrivals(found)
        return happened

    def _begin(self, order: Push) -> None:
        if self._stopping:
            self._post(order.done, Pushed("the engine stops", 0, 0.0))
            return
        now = self._clock()
        if now > order.not_after:
            self._fail(order, "the claim's term was over before the push began")
            return
        post = self._transport.post(order.peer, order.source, order.target, order.notification)
        if isinstance(post, str):
            self._fail(order, post)
            return
        self._active.append(_Active(order, post, now))

    def _fail(self, order: Push, error: str) -> None:
        self._counts["push_failures"] += 1
        self._post(order.done, Pushed(error, 0, 0.0))

    def _end(self, active: _Active, error: str) -> None:
        self._active.remove(active)
        nbytes = active.post.nbytes
        self._transport.release(active.post)
        if error:
            self._fail(active.order, error)
            return
        seconds = self._clock() - active.began
        self._counts["pushes"] += 1
        self._counts["pushed_bytes"] += nbytes
        self._seconds += seconds
        self._post(active.order.done, Pushed("", nbytes, seconds))

    def _tell_arrivals(self, found: list[tuple[str, bytes]]) -> None:
        arrivals = []
        for peer, notification in found:
            arrival = decode_arrival(peer, notification)
            if arrival is None:
                self._counts["malformed_arrivals"] += 1
                _log.warning("a notification made no sense", every=10.0, peer=peer, size=len(notification))
            else:
                arrivals.append(arrival)
        self._counts["arrivals"] += len(arrivals)
        if arrivals:
            self._arrived(arrivals)

    def _run(self) -> None:
        try:
            while not self._stopping:
                happened = self.turn()
                self._pause(happened)
            self._finish()
        except Exception:
            # A bug of ours or of the transport's: pushes end nowhere from here on, and claims stay open. What runs
            # locally goes on, so this is told loudly and does not end the process.
            _log.exception("the transfer thread died")
        finally:
            self._transport.close()

    def _pause(self, happened: bool) -> None:
        if happened:
            self._wait = _BUSY_WAIT
        if self._inbox:
            return
        if self._active:
            self._wake.wait(_BUSY_WAIT)
        elif self._expected > 0:
            self._wake.wait(self._wait)
            self._wait = min(_LONGEST_WAIT, self._wait * _GROWTH)
        else:
            self._wake.wait(_IDLE_WAIT)

    def _finish(self) -> None:
        until = self._clock() + _LAST_PUSHES
        pause = threading.Event()
        while (self._active or self._inbox) and self._clock() < until:
            self.turn()
            pause.wait(_BUSY_WAIT)
        for active in tuple(self._active):
            # It may still be written: the receiver learns of our death by other means.
            self._active.remove(active)
            self._post(active.order.done, Pushed("the engine stopped while it was under way", 0, 0.0))
