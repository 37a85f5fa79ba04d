"""What every transport does: one suite, run against the loopback and against NIXL between two agents of a process.

Against NIXL twice: with UCX carrying the pages, and with pools that are mapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
from tests.near_rig import LocalMemory

from microserve.kv.transfer.base import KvMemory, LinkReport, PostState, PostStatus
from microserve.kv.transfer.factory import open_transport
from microserve.kv.transfer.loopback import LoopbackHub
from microserve.kv.transfer.nixl import NixlTransport
from microserve.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.kv.transfer.base import Transport

    Open = Callable[..., "End"]

T = TypeVar("T")

PAGES, PAGE = 32, 4096
LIMIT = 20.0


class End:
    """One engine's end: a pool whose every byte tells where it came from, and a transport over it."""

    def __init__(self, kind: str, hub: LoopbackHub, name: str, seed: int, page_bytes: int = PAGE) -> None:
        self.name = name
        self.pool = np.random.default_rng(seed).integers(0, 256, (PAGES, page_bytes), dtype=np.uint8)
        memory = KvMemory(self.pool.ctypes.data, page_bytes, PAGES, owner=self.pool)
        self.transport: Transport
        if kind == "nixl, mapped":
            self.transport = NixlTransport(memory, name, near=LocalMemory())
        else:
            self.transport = open_transport(kind, memory, name, registry=hub)
        self.arrived: list[tuple[str, bytes]] = []

    def look(self) -> None:
        self.arrived += [(peer, note) for peer, note in self.transport.arrivals() if note]

    def connect(self, other: End, metadata: bytes | None = None) -> LinkReport:
        connecting = self.transport.connect(other.name, metadata or other.transport.metadata())
        return until(lambda: connecting.poll(), self, other)

    def push(self, other: End, source: list[int], target: list[int], note: bytes = b"note") -> PostStatus:
        """From the beginning to the end of one push."""
        post = self.transport.post(other.name, pages(source), pages(target), note)
        if isinstance(post, str):
            return PostStatus(PostState.FAILED, post)
        assert post.nbytes == len(source) * self.pool.shape[1]

        def ended() -> PostStatus | None:
            status = self.transport.poll(post)
            return None if status.state is PostState.ACTIVE else status

        status = until(ended, self, other)
        self.transport.release(post)
        return status


def until(look: Callable[[], T | None], *ends: End) -> T:
    """What `look` finds, while every end looks after its transport."""
    stop = monotonic() + LIMIT
    while (found := look()) is None:
        for end in ends:
            end.look()
        assert monotonic() < stop, "nothing came"
    return found


def pages(numbers: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(numbers, dtype=np.int32)


@pytest.fixture(params=["loopback", "nixl", "nixl, mapped"])
def make(request: pytest.FixtureRequest) -> Iterator[Open]:
    hub = LoopbackHub()
    ends: list[End] = []

    def begin(name: str, **options: Any) -> End:
        ends.append(End(request.param, hub, name, len(ends), **options))
        return ends[-1]

    yield begin
    for end in ends:
        end.transport.close()
        end.transport.close()  # again does nothing


@pytest.fixture
def pair(make: Open) -> tuple[End, End]:
    """Two ends; the first is connected to the second."""
    one, two = make("one:1a"), make("two:2b")
    assert one.connect(two).error == ""
    return one, two


def test_pages_arrive_where_they_should_and_nowhere_else(pair: tuple[End, End]) -> None:
    one, two = pair
    expected = two.pool.copy()
    source, target = [3, 4, 5, 31, 0, 7], [10, 11, 12, 0, 30, 29]
    expected[target] = one.pool[source]
    ours = one.pool.copy()
    assert one.push(two, source, target, b"all of it\0\xff") == PostStatus(PostState.DONE)
    until(lambda: two.arrived or None, two)
    assert two.arrived == [("one:1a", b"all of it\0\xff")]
    np.testing.assert_array_equal(two.pool, expected)
    np.testing.assert_array_equal(one.pool, ours)


def test_every_post_is_notified_once_and_in_full(pair: tuple[End, End]) -> None:
    one, two = pair
    transport = one.transport
    posts = []
    for index in range(16):
        post = transport.post("two:2b", pages([index]), pages([31 - index]), b"%d" % index)
        assert not isinstance(post, str)
        posts.append(post)

    def all_over() -> bool | None:
        over = [transport.poll(post).state is PostState.DONE for post in posts]
        return all(over) or None

    until(all_over, one, two)
    for post in posts:
        transport.release(post)
    until(lambda: len(two.arrived) >= 16 or None, two)
    two.look()
    assert sorted(int(note) for _, note in two.arrived) == list(range(16))
    np.testing.assert_array_equal(two.pool[16:][::-1], one.pool[:16])


def test_connecting_writes_no_page_and_says_what_the_link_is(make: Open) -> None:
    one, two = make("one:1a"), make("two:2b")
    before = two.pool.copy()
    first, again = one.connect(two), one.connect(two)
    assert first.error == again.error == ""
    assert first.transport == again.transport != ""
    assert first.gigabytes_per_second >= 0
    np.testing.assert_array_equal(two.pool, before)
    two.look()
    assert two.arrived == []


def test_an_engine_pushes_to_itself_without_a_connection(make: Open) -> None:
    one = make("one:1a")
    expected = one.pool[[1, 2, 9]].copy()
    assert one.push(one, [1, 2, 9], [20, 21, 3], b"mine").state is PostState.DONE
    until(lambda: one.arrived or None, one)
    assert one.arrived == [("one:1a", b"mine")]
    np.testing.assert_array_equal(one.pool[[20, 21, 3]], expected)


def test_what_cannot_be_pushed_is_said_and_changes_nothing(pair: tuple[End, End]) -> None:
    one, two = pair
    before = two.pool.copy()
    for source, target, why in (
        ([], [], "0 pages cannot be pushed into 0"),
        ([1, 2], [1], "2 pages cannot be pushed into 1"),
        ([PAGES], [0], f"page {PAGES} is not among our {PAGES}"),
        ([0], [PAGES], f"page {PAGES} is not among the peer's {PAGES}"),
        ([0], [-1], f"page -1 is not among the peer's {PAGES}"),
    ):
        assert one.push(two, source, target) == PostStatus(PostState.FAILED, why)
    assert two.push(one, [0], [0]) == PostStatus(PostState.FAILED, "one:1a is not connected")
    np.testing.assert_array_equal(two.pool, before)


def test_a_connection_that_cannot_be_is_refused_with_the_reason(make: Open) -> None:
    one, two, other = make("one:1a"), make("two:2b"), make("three:3c", page_bytes=2 * PAGE)
    assert "makes no sense" in one.connect(two, b"\xc1garbage").error
    assert "is that of two:2b, not of three:3c" in one.connect(other, two.transport.metadata()).error
    assert one.connect(other).error == f"three:3c has pages of {2 * PAGE} bytes, we of {PAGE}"
    assert one.push(other, [0], [0]).error == "three:3c is not connected"
    assert one.connect(two).error == ""


def test_disconnecting_forgets_a_peer_and_connecting_again_works(pair: tuple[End, End]) -> None:
    one, two = pair
    one.transport.disconnect("two:2b")
    one.transport.disconnect("two:2b")
    one.transport.disconnect("never seen")
    assert one.push(two, [0], [0]).error == "two:2b is not connected"
    assert one.connect(two).error == ""
    assert one.push(two, [4], [5]).state is PostState.DONE
    np.testing.assert_array_equal(two.pool[5], one.pool[4])


def test_a_peer_that_closed_fails_pushes_and_others_go_on(pair: tuple[End, End], make: Open) -> None:
    one, two = pair
    three = make("three:3c")
    assert one.connect(three).error == ""
    two.transport.close()
    post = one.transport.post("two:2b", pages([0]), pages([0]), b"nobody")
    if not isinstance(post, str):

        def failed() -> PostStatus | None:
            status = one.transport.poll(post)
            return None if status.state is PostState.ACTIVE else status

        assert until(failed, one).state is PostState.FAILED
        one.transport.release(post)
    assert one.push(three, [0], [1]).state is PostState.DONE
    np.testing.assert_array_equal(three.pool[1], one.pool[0])


def test_metadata_stays_the_same(pair: tuple[End, End]) -> None:
    one, two = pair
    before = two.transport.metadata()
    assert two.connect(one).error == ""
    assert one.push(two, [0], [0]).state is PostState.DONE
    assert two.transport.metadata() == before
