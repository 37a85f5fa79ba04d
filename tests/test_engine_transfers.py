"""The transfer thread, turned by hand in the test's thread; and, where that is the subject, in its own."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.engine.transfers import Arrival, Push, Pushed, TransferThread, decode_arrival, encode_arrival
from microserve.kv.transfer.base import KvMemory, LinkReport
from microserve.kv.transfer.loopback import LoopbackHub, LoopbackTransport
from microserve.runtime.clock import ManualClock, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.kv.transfer.base import Connecting

LIMIT = 10.0
"""Seconds after which a thread counts as stuck."""
PAGES, PAGE = 16, 64


class End:
    """An engine's end on a hub: what the transfer thread posts is done at once and kept."""

    def __init__(self, hub: LoopbackHub, name: str, *, clock: Callable[[], float], transport: Any = None) -> None:
        self.name = name
        self.pool = np.full((PAGES, PAGE), len(hub.members) + 1, dtype=np.uint8)
        memory = KvMemory(self.pool.ctypes.data, PAGE, PAGES, owner=self.pool)
        self.transport = transport or LoopbackTransport(hub, name, memory)
        self.clock = clock
        self.pushed: queue.SimpleQueue[Pushed] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[LinkReport] = queue.SimpleQueue()
        self.arrived: queue.SimpleQueue[list[Arrival]] = queue.SimpleQueue()
        self.threads: set[str] = set()
        self.transfers = TransferThread(self.transport, arrived=self._arrived, post=self._post, clock=clock)

    def _arrived(self, arrivals: list[Arrival]) -> None:
        self.threads.add(threading.current_thread().name)
        self.arrived.put(arrivals)

    def _post(self, function: Callable[..., object], *args: object) -> None:
        function(*args)

    def turn(self) -> None:
        while self.transfers.turn():
            pass

    def connect(self, other: End) -> None:
        self.transfers.connect(other.name, other.transfers.metadata, self.reports.put)

    def push(
        self, to: str, source: list[int], target: list[int], *, not_after: float = 1e12, note: bytes = b""
    ) -> None:
        note = note or encode_arrival(7, 1, 2, 3, len(source))
        here, there = (np.array(side, dtype=np.int32) for side in (source, target))
        self.transfers.push(Push(to, here, there, note, not_after, self.pushed.put))


@pytest.fixture
def hub() -> LoopbackHub:
    return LoopbackHub()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def pair(hub: LoopbackHub, clock: ManualClock) -> tuple[End, End]:
    """Two ends that are turned by hand; the first is connected to the second."""
    one, two = End(hub, "one:1", clock=clock), End(hub, "two:2", clock=clock)
    one.connect(two)
    one.turn()
    assert one.reports.get_nowait() == LinkReport("local")
    return one, two


def counters(end: End) -> dict[str, float]:
    """Counters that are not zero, without their prefix."""
    return {name.removeprefix("transfer_"): value for name, value in end.transfers.statistics().items() if value}


WORD = st.integers(0, 2**64 - 1)


@given(WORD, WORD, WORD, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_notification_says_what_was_put_in(epoch: int, lease: int, claim: int, first: int, count: int) -> None:
    note = encode_arrival(epoch, lease, claim, first, count)
    assert len(note) == 36
    assert decode_arrival("p", note) == Arrival("p", epoch, lease, claim, first, count)


@given(st.binary(max_size=60))
def test_other_notifications_are_none(note: bytes) -> None:
    assert decode_arrival("p", note) is None
    assert decode_arrival("p", encode_arrival(1, 2, 3, 4, 5) + note[:1]) == (
        None if note else Arrival("p", 1, 2, 3, 4, 5)
    )


def test_a_push_moves_pages_tells_its_end_and_arrives(pair: tuple[End, End]) -> None:
    one, two = pair
    one.push("two:2", [1, 2], [8, 5])
    one.turn()
    assert one.pushed.get_nowait() == Pushed("", 2 * PAGE, 0.0)
    two.turn()
    assert two.arrived.get_nowait() == [Arrival("one:1", 7, 1, 2, 3, 2)]
    assert [int(page[0]) for page in two.pool[[5, 8, 6]]] == [1, 1, 2]
    assert counters(one) == {"pushes": 1, "pushed_bytes": 2 * PAGE, "connections": 1}
    assert counters(two) == {"arrivals": 1}
    one.transport.check_integrity()


def test_a_push_is_timed_from_its_post_to_its_end(pair: tuple[End, End], hub: LoopbackHub, clock: ManualClock) -> None:
    one, _ = pair
    hub.hold()
    one.push("two:2", [0], [0])
    one.turn()
    assert one.pushed.empty()
    assert counters(one)["active"] == 1
    clock.advance(2.5)
    hub.let_go()
    one.turn()
    assert one.pushed.get_nowait() == Pushed("", PAGE, 2.5)
    assert counters(one)["push_seconds"] == 2.5


def test_nothing_is_begun_after_the_claims_term(pair: tuple[End, End], clock: ManualClock) -> None:
    one, two = pair
    one.push("two:2", [0], [0], not_after=clock() + 1.0)
    clock.advance(1.5)
    one.turn()
    assert one.pushed.get_nowait().error == "the claim's term was over before the push began"
    assert int(two.pool[0, 0]) == 2
    one.push("two:2", [0], [0], not_after=clock())
    one.turn()
    assert one.pushed.get_nowait().error == ""


def test_what_goes_wrong_is_a_value(pair: tuple[End, End], hub: LoopbackHub) -> None:
    one, two = pair
    one.push("nobody", [0], [0])
    one.push("two:2", [0], [PAGES])
    one.turn()
    assert one.pushed.get_nowait() == Pushed("nobody is not connected", 0, 0.0)
    assert one.pushed.get_nowait() == Pushed(f"page {PAGES} is not among the peer's {PAGES}", 0, 0.0)
    hub.tearing.add(("one:1", "two:2"))
    one.push("two:2", [0, 1], [0, 1])
    one.turn()
    assert one.pushed.get_nowait() == Pushed("the link was told to tear", 0, 0.0)
    assert [int(page[0]) for page in two.pool[:2]] == [1, 2]
    hub.hold()
    one.push("two:2", [0], [0])
    one.turn()
    one.transfers.disconnect("two:2")
    one.turn()
    assert one.pushed.get_nowait() == Pushed("two:2 was disconnected", 0, 0.0)
    assert counters(one)["push_failures"] == 4
    one.transport.check_integrity()
    two.turn()
    assert two.arrived.empty()


def test_a_dead_peer_fails_and_a_dead_sender_writes_nothing(pair: tuple[End, End], hub: LoopbackHub) -> None:
    one, two = pair
    hub.hold()
    one.push("two:2", [0], [0])
    one.turn()
    hub.kill("one:1")
    hub.let_go()
    one.turn()
    assert one.pushed.empty()
    assert int(two.pool[0, 0]) == 2
    two.connect(one)
    two.turn()
    assert two.reports.get_nowait() == LinkReport("local", error="one:1 is not in this process")


def test_what_a_dead_peer_left_is_taken_before_it_is_told(
    pair: tuple[End, End], hub: LoopbackHub, clock: ManualClock
) -> None:
    """Its pages lie in our buffers, and our own look writes them."""
    one, two = pair
    hub.late.add(("one:1", "two:2"))
    one.push("two:2", [0], [3])
    one.turn()
    hub.kill("one:1")
    told: list[int] = []
    two.transfers.outlive("gone:1", lambda: told.append(two.arrived.qsize()))
    assert (told, int(two.pool[3, 0])) == ([], 2)
    two.turn()
    assert (told, int(two.pool[3, 0])) == ([], 1)
    clock.advance(9e-3)
    two.turn()
    assert told == []
    clock.advance(1.1e-3)
    two.turn()
    two.turn()
    assert told == [1], "once, and behind the arrival"
    assert two.arrived.get_nowait() == [Arrival("one:1", 7, 1, 2, 3, 1)]


def test_a_dead_peer_is_forgotten_behind_its_last_words(
    pair: tuple[End, End], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its pool is mapped here, its next incarnation has no memory."""
    _, two = pair
    heard: list[str] = []
    monkeypatch.setattr(two.transport, "disconnect", heard.append)
    two.transfers.outlive("one:1", lambda: heard.append("told"))
    two.turn()
    assert heard == []
    clock.advance(11e-3)
    two.turn()
    assert heard == ["told", "one:1"]


def test_a_death_is_not_told_before_a_look_that_began_late_enough(
    pair: tuple[End, End], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = pair
    told: list[float] = []
    two.transfers.outlive("gone:1", lambda: told.append(clock()))

    def slow_look() -> list[tuple[str, bytes]]:
        clock.advance(0.5)
        return []

    monkeypatch.setattr(two.transport, "arrivals", slow_look)
    began = clock()
    two.transfers.turn()
    assert told == []
    two.transfers.turn()
    assert told == [began + 1.0]


def test_a_death_is_told_by_a_thread_that_stops_when_its_transport_is_closed(
    pair: tuple[End, End], hub: LoopbackHub
) -> None:
    _, two = pair
    told: list[bool] = []
    two.transfers.outlive("gone:1", lambda: told.append("two:2" in hub.members))
    two.turn()
    assert told == []
    two.transfers.outlive("gone:1", lambda: told.append("two:2" in hub.members))
    two.transfers.stop()
    assert told == [False, False]
    two.transfers.outlive("gone:1", lambda: told.append("two:2" in hub.members))
    assert told == [False] * 3


def test_notifications_that_make_no_sense_are_counted_and_dropped(
    pair: tuple[End, End], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = pair
    one.push("two:2", [0], [0], note=b"nonsense")
    one.push("two:2", [0], [0])
    one.turn()
    with caplog.at_level(logging.WARNING):
        two.turn()
    assert two.arrived.get_nowait() == [Arrival("one:1", 7, 1, 2, 3, 1)]
    assert counters(two) == {"arrivals": 1, "malformed_arrivals": 1}
    assert [record.message for record in caplog.records] == ["a notification made no sense"]


def test_stopped_before_it_ran_it_answers_everything(pair: tuple[End, End], hub: LoopbackHub) -> None:
    one, two = pair
    hub.hold()
    one.push("two:2", [0], [0])
    one.turn()
    one.push("two:2", [1], [1])
    one.transfers.stop()
    one.transfers.stop()
    assert [one.pushed.get_nowait().error for _ in range(2)] == ["the engine stops"] * 2
    one.push("two:2", [1], [1])
    one.connect(two)
    one.transfers.disconnect("two:2")
    assert one.pushed.get_nowait().error == "the engine stops"
    assert one.reports.get_nowait() == LinkReport("", error="the engine stops")
    assert "one:1" not in hub.members


class _Silent:
    """A peer that never answers."""

    def poll(self) -> LinkReport | None:
        return None


def test_a_connection_under_way_is_answered_when_it_stops(
    pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    monkeypatch.setattr(one.transport, "connect", lambda peer, metadata: _Silent())
    one.connect(two)
    one.turn()
    assert one.reports.empty()
    one.transfers.stop()
    assert one.reports.get_nowait() == LinkReport("", error="the engine stops")


class _Measured:
    """A connection that was made, to a peer that takes `rate` bytes/s."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def poll(self) -> LinkReport | None:
        return LinkReport("fast", self._rate / 1e9)


class _Recorder:
    """In place of the event that wakes the thread: keeps how long it would have waited."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass


def test_it_looks_often_while_something_goes_on_and_seldom_when_not(
    pair: tuple[End, End], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    event = _Recorder()
    monkeypatch.setattr(one.transfers, "_wake", event)

    def longest() -> float:
        event.waits.clear()
        for _ in range(60):
            one.transfers._pause(one.transfers.turn())
        assert event.waits == sorted(event.waits)
        return event.waits[-1]

    one.transfers._pause(True)
    one.transfers._pause(False)
    assert event.waits == pytest.approx([50e-6, 62.5e-6])
    assert longest() == 20e-3
    one.transfers.expect(2)
    one.transfers.expect(-1)
    assert longest() == 0.5e-3
    hub.hold()
    one.push("two:2", [0], [0])
    assert longest() == 0.1e-3
    hub.let_go()
    one.transfers.expect(-1)
    assert longest() == 20e-3
    one.transfers.outlive("gone:1", lambda: None)
    assert longest() == 0.5e-3


@pytest.mark.parametrize(("rate", "pauses"), [(0.999, 5), (1.001, 0)])
def test_a_push_that_should_be_short_is_watched_without_a_pause(
    pair: tuple[End, End],
    hub: LoopbackHub,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    pauses: int,
) -> None:
    one, two = pair
    monkeypatch.setattr(one.transport, "connect", lambda peer, metadata: _Measured(PAGE * rate / 2e-3))
    one.connect(two)
    event = _Recorder()
    monkeypatch.setattr(one.transfers, "_wake", event)
    one.transfers._pause(one.transfers.turn())
    one.transfers._pause(one.transfers.turn())
    hub.hold()
    one.push("two:2", [0], [0])
    event.waits.clear()
    for _ in range(5):
        one.transfers._pause(one.transfers.turn())
    assert len(event.waits) == pauses
    clock.advance(3e-3)
    one.transfers._pause(one.transfers.turn())
    assert len(event.waits) == pauses + 1, "it took longer than it should"


@pytest.mark.parametrize(("short", "pauses"), [(True, 0), (False, 5)])
def test_whoever_waits_for_a_short_push_does_not_fall_asleep(
    pair: tuple[End, End], clock: ManualClock, monkeypatch: pytest.MonkeyPatch, short: bool, pauses: int
) -> None:
    one, _ = pair
    event, asked = _Recorder(), list[str]()

    def warm(peer: str) -> bool:
        asked.append(peer)
        return short

    monkeypatch.setattr(one.transport, "warm", warm)
    monkeypatch.setattr(one.transfers, "_wake", event)
    one.transfers.warm("two:2")
    one.transfers.turn()
    for _ in range(5):
        one.transfers._pause(one.transfers.turn())
    assert (asked, len(event.waits)) == (["two:2"], pauses)
    clock.advance(1.9e-3)
    one.transfers._pause(False)
    assert len(event.waits) == pauses + (not short)
    clock.advance(0.2e-3)
    one.transfers._pause(False)
    assert len(event.waits) == pauses + 1 + (not short), "no push has come"


# --- in threads of their own ----------------------------------------------------------------------------------------


@pytest.fixture
def running(hub: LoopbackHub) -> Iterator[tuple[End, End]]:
    ends = End(hub, "one:1", clock=monotonic), End(hub, "two:2", clock=monotonic)
    for end in ends:
        end.transfers.start()
    yield ends
    for end in ends:
        end.transfers.stop()


def test_two_threads_push_both_ways(running: tuple[End, End]) -> None:
    one, two = running
    for here, there in ((one, two), (two, one)):
        here.connect(there)
        assert here.reports.get(timeout=LIMIT).error == ""
    for page in range(8):
        one.push("two:2", [page], [page])
        two.push("one:1", [8 + page], [15 - page])
    for end in running:
        assert [end.pushed.get(timeout=LIMIT).error for _ in range(8)] == [""] * 8
        seen = 0
        while seen < 8:
            seen += len(end.arrived.get(timeout=LIMIT))
        assert end.threads == {"engine-transfer"}
    assert two.pool[:8].max() == 1
    assert one.pool[8:].min() == 2


def test_a_death_is_told_by_a_thread_that_has_nothing_else_to_do(running: tuple[End, End]) -> None:
    one, _ = running
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    one.transfers.outlive("gone:1", lambda: told.put(threading.current_thread().name))
    assert told.get(timeout=LIMIT) == "engine-transfer"


def test_stopping_lets_a_push_end(running: tuple[End, End], hub: LoopbackHub) -> None:
    one, two = running
    one.connect(two)
    assert one.reports.get(timeout=LIMIT).error == ""
    hub.hold()
    one.push("two:2", [0], [0])
    stopping = threading.Thread(target=one.transfers.stop)
    stopping.start()
    hub.let_go()
    stopping.join(LIMIT)
    # Whether it had begun when the stop came is a race, and either answer is right: but there is one.
    assert one.pushed.get(timeout=LIMIT).error in ("", "the engine stops")
    assert "one:1" not in hub.members


def test_stopping_gives_up_on_a_push_that_does_not_end(running: tuple[End, End], hub: LoopbackHub) -> None:
    one, two = running
    one.connect(two)
    assert one.reports.get(timeout=LIMIT).error == ""
    hub.hold()
    one.push("two:2", [0], [0])
    one.transfers.stop()
    assert one.pushed.get(timeout=LIMIT) == Pushed("the engine stops", 0, 0.0)
    hub.let_go()
    assert int(two.pool[0, 0]) == 2


class _Broken:
    """A transport with a bug."""

    name = "broken"

    def __init__(self) -> None:
        self.closed = threading.Event()

    def metadata(self) -> bytes:
        return b""

    def connect(self, peer: str, metadata: bytes) -> Connecting:
        raise KeyError(peer)

    def arrivals(self) -> list[tuple[str, bytes]]:
        return []

    def close(self) -> None:
        self.closed.set()


def test_a_bug_ends_the_thread_loudly_and_everybody_is_answered(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    transport = _Broken()
    one = End(hub, "one:1", clock=monotonic, transport=transport)
    died = threading.Event()
    with caplog.at_level(logging.ERROR):
        one.transfers.outlive("gone:1", died.set)
        one.transfers.start()
        one.transfers.connect("two:2", b"", one.reports.put)
        assert transport.closed.wait(LIMIT)
        one.push("two:2", [0], [0])
        assert one.pushed.get(timeout=LIMIT).error == "the transfer thread died: KeyError('two:2')"
        assert died.wait(LIMIT)
        died.clear()
        one.transfers.outlive("gone:1", died.set)
        assert died.is_set()
    assert "the transfer thread died" in caplog.messages
    one.transfers.stop()
