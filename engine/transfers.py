"""The transfer thread: the only one that touches the transport. Orders in, arrivals and results out.

It looks at the transport as often as the system lets it (every 20 µs or so) while a push is under way that should take
no longer than two milliseconds, as most do between two GPUs of a host, and while such a push is about to be ordered.
Else it looks again after 50 µs when something happened, and more and more seldom while nothing does: up to 100 µs apart
while pushes or connections are under way (they go on only when somebody looks), 0.5 ms while arrivals are expected,
20 ms otherwise (peers that connect have to be answered). An order wakes it at once.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from microserve.kv.transfer.base import LinkReport, PostState
from microserve.runtime.clock import monotonic
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.kv.pages import PageArray
    from microserve.kv.transfer.base import Connecting, Post, Transport
    from microserve.runtime.clock import Clock

_ARRIVAL: Final = struct.Struct("<4sQQQII")
_MAGIC: Final = b"mkv2"

_SHORTEST_WAIT: Final = 50e-6
_GROWTH: Final = 1.25
"""How the wait between looks grows while nothing happens."""
_LONGEST_BUSY, _LONGEST_EXPECTING, _LONGEST_IDLE = 100e-6, 500e-6, 20e-3
"""Seconds between looks at most: with something of ours under way, with arrivals expected, without either."""
_SHORT: Final = 2e-3
"""Seconds that a push may be expected to take, by its peer's link, and is looked at with the shortest of pauses."""
_PR_SET_TIMERSLACK: Final = 29
_LAST_WORDS = 10e-3
"""Seconds of looks after which what a dead peer left is taken. Over TCP, a single look was seen to take all that lay in
our sockets, and what its kernel held behind that: several MB. The time is for a machine with too much to do."""
_LAST_PUSHES = 1.0
"""Seconds that active pushes get to end when the thread is told to stop."""

_STOPS: Final = "the engine stops"
_COUNTED: Final = (
    "pushes",
    "pushed_bytes",
    "push_failures",
    "arrivals",
    "malformed_arrivals",
    "connections",
    "failed_connections",
)

_log = get_logger(__name__)


def _sleep_exactly() -> None:
    """Linux makes this thread's sleeps up to 50 µs longer than asked for, to wake fewer times; no more (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


class Arrival(Struct, frozen=True):
    """Pages `[first_page, first_page + count)` of a claim on a lease were written, says our own transport.

    Counted from the claim, whose range both sides know: an address may be wrong about where its lease begins.
    """

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
    """How a push ended; `error` "" means well. Once told, and `certain`, it writes nothing more."""

    error: str
    nbytes: int
    seconds: float
    certain: bool = True
    """False: it was given up, and may still be written."""


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
    watched_until: float


class _Dialled(Struct, eq=False):
    peer: str
    connecting: Connecting
    done: Callable[[LinkReport], None]


class _Outlived(Struct, eq=False):
    peer: str
    told: Callable[[], object]
    until: float


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
        self._lock = threading.Lock()
        self._expected = 0
        self._over = ""
        """Why nothing is begun any more."""
        self._closed = False
        """Nobody looks into the inbox any more."""
        self._active: list[_Active] = []
        self._dialled: list[_Dialled] = []
        self._outlived: list[_Outlived] = []
        """What waits for the last words of peers that are dead."""
        self._rates: dict[str, float] = {}
        """Bytes/s of the links, as measured when they were made."""
        self._wait = _SHORTEST_WAIT
        self._awake_for, self._awake_until = "", 0.0
        """To that peer a push is awaited, until then, that will be short."""
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-transfer", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread. Call once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread: what is under way gets a second, what was not begun fails. Closes the transport. Idempotent.

        Waits for the thread. What it has to say until then is posted.
        """
        self._over = self._over or _STOPS
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        elif not self._closed:
            self._give_up()  # it was turned by hand

    def connect(self, peer: str, metadata: bytes, done: Callable[[LinkReport], None]) -> None:
        """Makes, warms and measures the way to `peer`; `done` is posted to the event loop."""
        self._command(lambda: self._connect(peer, metadata, done))

    def disconnect(self, peer: str) -> None:
        """Forgets `peer`; pushes to it that are under way fail. Idempotent."""
        self._command(lambda: self._disconnect(peer))

    def warm(self, peer: str) -> None:
        """A push to `peer` comes soon: what has rested for a while, links and code, makes its beginning slow."""
        self._command(lambda: self._stay_awake(peer))

    def push(self, order: Push) -> None:
        """Begins a push as soon as the thread comes to it."""
        self._command(lambda: self._begin(order))

    def outlive(self, peer: str, told: Callable[[], object]) -> None:
        """`peer` is dead: `told` is called once nothing comes from it any more, behind its last arrivals. Forgets it.

        What it wrote may lie in our own sockets, from where our own looks at the transport copy it into the pool. In
        the transfer thread; from whoever calls, when that has ended.
        """
        self._command(lambda: self._outlive(peer, told))

    def expect(self, change: int) -> None:
        """So many notifications more (or fewer) are awaited: while there are any, the thread looks for them often."""
        with self._lock:
            self._expected += change
        if change > 0:
            self._wait = _SHORTEST_WAIT
            self._wake.set()

    def statistics(self) -> dict[str, float]:
        """Counters by name."""
        values = {f"transfer_{name}": float(count) for name, count in self._counts.items()}
        gauges = {"active": len(self._active), "expected": self._expected}
        return (
            values
            | {f"transfer_{name}": float(count) for name, count in gauges.items()}
            | {"transfer_push_seconds": self._seconds}
        )

    def _command(self, command: Callable[[], object]) -> None:
        self._inbox.append(command)
        self._wake.set()
        if self._closed:
            # The thread looks no more, or looks for the last time: a command is taken by one of us.
            self._answer_rest()

    # --- in the transfer thread --------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """One round: at most one order, polls, arrivals. Whether anything happened."""
        self._wake.clear()
        happened = False
        if self._inbox:
            # One at a time: posting may copy all of it on the spot, and arrivals should not wait for a row of those.
            self._inbox.popleft()()
            happened = True
        for active in tuple(self._active):
            status = self._transport.poll(active.post)
            if status.state is not PostState.ACTIVE:
                happened = True
                self._end(active, status.error if status.state is PostState.FAILED else "")
        for dialled in tuple(self._dialled):
            if (report := dialled.connecting.poll()) is not None:
                happened = True
                self._dialled.remove(dialled)
                self._counts["failed_connections" if report.error else "connections"] += 1
                self._rates[dialled.peer] = report.gigabytes_per_second * 1e9
                self._post(dialled.done, report)
        looked_at = self._clock()
        if found := self._transport.arrivals():
            happened = True
            self._tell_arrivals(found)
        for outlived in tuple(self._outlived):
            if looked_at >= outlived.until:
                happened = True
                self._outlived.remove(outlived)
                outlived.told()
                # Its memory, where that is mapped here, is not free before: another incarnation needs it.
                self._disconnect(outlived.peer)
        return happened

    def _outlive(self, peer: str, told: Callable[[], object]) -> None:
        if self._closed:
            told()
        else:
            self._outlived.append(_Outlived(peer, told, self._clock() + _LAST_WORDS))

    def _connect(self, peer: str, metadata: bytes, done: Callable[[LinkReport], None]) -> None:
        if self._over:
            self._post(done, LinkReport("", error=self._over))
        else:
            self._dialled.append(_Dialled(peer, self._transport.connect(peer, metadata), done))

    def _disconnect(self, peer: str) -> None:
        self._rates.pop(peer, None)
        if not self._over:
            self._transport.disconnect(peer)

    def _stay_awake(self, peer: str) -> None:
        if not self._over and self._transport.warm(peer):
            self._awake_for, self._awake_until = peer, self._clock() + _SHORT

    def _begin(self, order: Push) -> None:
        now = self._clock()
        if order.peer == self._awake_for:
            self._awake_until = now
        if self._over:
            self._fail(order, self._over)
        elif now > order.not_after:
            self._fail(order, "the claim's term was over before the push began")
        else:
            post = self._transport.post(order.peer, order.source, order.target, order.notification)
            if isinstance(post, str):
                self._fail(order, post)
            else:
                short = post.nbytes <= self._rates.get(order.peer, 0.0) * _SHORT
                self._active.append(_Active(order, post, now, now + _SHORT if short else now))

    def _fail(self, order: Push, error: str, *, certain: bool = True) -> None:
        self._counts["push_failures"] += 1
        self._post(order.done, Pushed(error, 0, 0.0, certain))

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
            if arrival is not None:
                arrivals.append(arrival)
            elif notification:
                self._counts["malformed_arrivals"] += 1
                _log.warning("a notification made no sense", every=10.0, peer=peer, size=len(notification))
        self._counts["arrivals"] += len(arrivals)
        if arrivals:
            self._arrived(arrivals)

    def _run(self) -> None:
        _sleep_exactly()
        try:
            while not self._over:
                self._pause(self.turn())
            self._finish()
        except Exception as error:
            # A bug of ours or of the transport's. What runs locally goes on, so this is told loudly, whatever waits
            # for us is answered, and the process does not end.
            _log.exception("the transfer thread died")
            self._over = f"the transfer thread died: {error!r}"
        finally:
            self._give_up()

    def _pause(self, happened: bool) -> None:
        if self._clock() < max([self._awake_until, *(each.watched_until for each in self._active)]):
            # Not nothing: a thread that only yields takes the interpreter again at once, and others wait for it.
            time.sleep(0)
            return
        if self._active or self._dialled:
            longest = _LONGEST_BUSY
        else:
            longest = _LONGEST_EXPECTING if self._expected > 0 or self._outlived else _LONGEST_IDLE
        self._wait = _SHORTEST_WAIT if happened else min(longest, self._wait * _GROWTH)
        if not self._inbox:
            self._wake.wait(self._wait)

    def _finish(self) -> None:
        """What is under way may end; orders are answered."""
        until = self._clock() + _LAST_PUSHES
        self._dial_no_more()
        while (self._active or self._inbox) and self._clock() < until:
            self._pause(self.turn())

    def _give_up(self) -> None:
        self._dial_no_more()
        for active in self._active:
            # It may still be written: the receiver learns of our end by other means.
            self._fail(active.order, self._over, certain=False)
        self._active.clear()
        try:
            # First: while it is open, what lies in our sockets may still be copied.
            self._transport.close()
        finally:
            self._closed = True
            for outlived in self._outlived:
                outlived.told()
            self._outlived.clear()
            self._answer_rest()

    def _dial_no_more(self) -> None:
        for dialled in self._dialled:
            self._post(dialled.done, LinkReport("", error=self._over))
        self._dialled.clear()

    def _answer_rest(self) -> None:
        while True:
            try:
                command = self._inbox.popleft()
            except IndexError:
                return
            command()
