"""Pools of peers that are mapped: what goes into them, when it is told, and what happens where they cannot be."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from tests.near_rig import LocalMemory
from tests.transfer_child import Child

from microserve.kv.transfer.base import KvMemory, LinkReport, PostState, PostStatus
from microserve.kv.transfer.cuda_ipc import CudaIpc, SharedMemory, near_memory
from microserve.kv.transfer.nixl import NixlTransport
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import TransferFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.kv.transfer.base import Post

    Open = Callable[..., "End"]

PAGES, PAGE = 16, 4096


class End:
    """One engine's end, which maps the pools of others through `near`."""

    def __init__(self, name: str, seed: int, *, near: LocalMemory | None = None) -> None:
        self.name = name
        self.pool = np.random.default_rng(seed).integers(0, 256, (PAGES, PAGE), dtype=np.uint8)
        self.near = near or LocalMemory()
        memory = KvMemory(self.pool.ctypes.data, PAGE, PAGES, owner=self.pool)
        self.transport = NixlTransport(memory, name, near=self.near)
        self._arrived: list[tuple[str, bytes]] = []

    def connect(self, other: End, metadata: bytes | None = None) -> LinkReport:
        connecting = self.transport.connect(other.name, metadata or other.transport.metadata())
        until = monotonic() + 20.0
        while (report := connecting.poll()) is None:
            self.transport.arrivals()
            other.transport.arrivals()
            assert monotonic() < until
        return report

    def begin(self, other: End, source: list[int], target: list[int], note: bytes = b"note") -> Post | str:
        ours, theirs = np.array(source, dtype=np.int32), np.array(target, dtype=np.int32)
        return self.transport.post(other.name, ours, theirs, note)

    def push(self, other: End, source: list[int], target: list[int]) -> PostStatus:
        post = self.begin(other, source, target)
        assert not isinstance(post, str)
        return self.end(post, other)

    def end(self, post: Post, other: End) -> PostStatus:
        until = monotonic() + 20.0
        while (status := self.transport.poll(post)).state is PostState.ACTIVE:
            other.heard(1)
            assert monotonic() < until
        self.transport.release(post)
        return status

    def heard(self, looks: int = 200) -> list[tuple[str, bytes]]:
        """What has arrived, after so many looks more."""
        self._arrived += [each for _ in range(looks) for each in self.transport.arrivals() if each[1]]
        return self._arrived


@pytest.fixture
def make() -> Iterator[Open]:
    with ExitStack() as stack:

        def begin(name: str, seed: int, **options: Any) -> End:
            end = End(name, seed, **options)
            stack.callback(end.transport.close)
            return end

        yield begin


@pytest.fixture
def pair(make: Open) -> tuple[End, End]:
    one, two = make("one:1", 1), make("two:2", 2)
    assert one.connect(two).error == ""
    return one, two


def test_pages_are_copied_into_the_mapped_pool_and_told_once_they_are_written(pair: tuple[End, End]) -> None:
    one, two = pair
    before, expected = one.near.copied, two.pool.copy()
    assert before > 0, "the probe measures the way that pages go"
    assert one.transport.mapped == {"two:2"}
    post = one.begin(two, [1, 2, 9], [3, 4, 0])
    assert not isinstance(post, str)
    assert post.nbytes == 3 * PAGE == one.near.copied - before
    assert one.transport.poll(post).state is PostState.ACTIVE
    assert two.heard() == []
    np.testing.assert_array_equal(two.pool, expected)
    assert one.end(post, two) == PostStatus(PostState.DONE)
    assert two.heard() == [("one:1", b"note")]
    expected[[3, 4, 0]] = one.pool[[1, 2, 9]]
    np.testing.assert_array_equal(two.pool, expected)


def test_ucx_is_told_of_no_memory_that_is_mapped(pair: tuple[End, End]) -> None:
    """Whatever it maps of a GPU's, it keeps, and a process that was killed would keep its pool."""
    one, two = pair
    agent = one.transport._agent
    mine = agent.get_xfer_descs([(one.pool.ctypes.data, PAGE, 0)], "DRAM")
    theirs = agent.get_xfer_descs([(two.pool.ctypes.data, PAGE, 0)], "DRAM")
    with pytest.raises(Exception, match="NOT_FOUND"):
        agent.initialize_xfer("WRITE", mine, theirs, "two:2", b"")
    one.near.broken = "no"
    assert one.push(two, [1], [2]).state is PostState.DONE
    agent.release_xfer_handle(agent.initialize_xfer("WRITE", mine, theirs, "two:2", b""))
    one.transport.disconnect("two:2")
    one.near.broken = ""
    assert one.connect(two).error == ""
    with pytest.raises(Exception, match="NOT_FOUND"):
        agent.initialize_xfer("WRITE", mine, theirs, "two:2", b"")


def test_memory_that_nixl_does_not_take_is_an_error_with_a_reason_that_lasts(pair: tuple[End, End], make: Open) -> None:
    one, two = pair
    good = two.transport.metadata()
    junk = msgspec.msgpack.encode(msgspec.msgpack.decode(good) | {"memory": b"junk"})
    assert "other metadata than when it was connected" in one.connect(two, junk).error
    far, near = make("far:3", 3, near=LocalMemory()), make("near:4", 4)
    far.near.broken = "the GPUs do not reach each other"
    told = "NIXL does not take the metadata of two:2"
    assert told in far.connect(two, junk).error
    assert near.connect(two, junk).error == ""
    assert near.push(two, [1], [2]).state is PostState.DONE
    near.near.broken = "no"
    said = near.begin(two, [1], [2])
    assert isinstance(said, str)
    assert told in said
    near.transport.disconnect("two:2")
    assert near.connect(two, good).error == said, "NIXL has lost it for good, and says no more than INVALID_PARAM"


def test_disconnecting_ends_copies_first_and_they_are_never_told(pair: tuple[End, End]) -> None:
    one, two = pair
    post = one.begin(two, [1], [2])
    assert not isinstance(post, str)
    one.transport.disconnect("two:2")
    assert (one.near.open, one.transport.mapped) == (0, frozenset())
    two.pool[2] = 7
    assert one.transport.poll(post) == PostStatus(PostState.FAILED, "two:2 was disconnected")
    assert one.connect(two).error == ""
    one.transport.release(post)
    assert (two.heard(), one.near.open) == ([], 2)
    assert (two.pool[2] == 7).all(), "a post that was given up still wrote"
    one.transport.close()
    assert one.near.open == 0


def test_a_pool_that_cannot_be_mapped_is_written_by_ucx(make: Open) -> None:
    one, two, near = make("one:1", 1), make("two:2", 2), LocalMemory()
    other = make("three:3", 3, near=near)
    near.broken = "the GPUs do not reach each other"
    assert (other.connect(two).error, other.transport.mapped) == ("", frozenset())
    assert other.push(two, [1], [2]).state is PostState.DONE
    assert (near.copied, two.heard()) == (0, [("three:3", b"note")])
    np.testing.assert_array_equal(two.pool[2], other.pool[1])
    elsewhere = msgspec.msgpack.decode(two.transport.metadata()) | {"host": "another"}
    assert one.connect(two, msgspec.msgpack.encode(elsewhere)).error == ""
    assert one.push(two, [3], [4]).state is PostState.DONE
    assert (one.transport.mapped, one.near.copied) == (frozenset(), 0)
    np.testing.assert_array_equal(two.pool[4], one.pool[3])


def test_warming_writes_no_page_and_says_nothing(pair: tuple[End, End]) -> None:
    one, two = pair
    before = two.pool.copy()
    two.heard()
    assert one.transport.warm("two:2")
    assert one.near.woken == 1 << 20
    assert [each for _ in range(200) for each in two.transport.arrivals()] == [("one:1", b"")]
    assert not one.transport.warm("never seen")
    assert not two.transport.warm("one:1"), "not connected from there"
    one.near.broken = "no"
    one.transport.warm("two:2")
    assert (two.heard(), one.heard()) == ([], [])
    one.near.broken = ""
    assert one.push(two, [0], [1]).state is PostState.DONE
    before[1] = one.pool[0]
    np.testing.assert_array_equal(two.pool, before)


def test_what_cannot_be_copied_goes_by_ucx_and_so_does_all_that_follows(pair: tuple[End, End]) -> None:
    one, two = pair
    one.near.broken = "no"
    assert one.push(two, [3], [4]).state is PostState.DONE
    np.testing.assert_array_equal(two.pool[4], one.pool[3])
    assert two.heard() == [("one:1", b"note")]
    one.near.broken = ""
    copied = one.near.copied
    assert (one.transport.mapped, one.near.open) == (frozenset(), 0)
    assert one.push(two, [5], [6]).state is PostState.DONE
    assert one.near.copied == copied
    assert not one.transport.warm("two:2")


@pytest.mark.parametrize(
    ("tls", "allowed"),
    [("all", True), ("cuda", True), ("rc,cuda_ipc", True), ("tcp", False), ("^cuda_ipc", False), ("^rc,ud", True)],
)
def test_ucx_tls_has_a_say_in_it(tls: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert isinstance(near_memory(KvMemory(0, PAGE, PAGES, "cuda:1")), CudaIpc) is allowed
    assert near_memory(KvMemory(0, PAGE, PAGES, "cpu")) is None


def test_without_a_driver_nothing_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert near_memory(KvMemory(0, PAGE, PAGES, "cuda:0")) is None


class _Driver:
    """Maps the first allocation that it is shown, and no other."""

    def __init__(self) -> None:
        self.mapped: list[int] = []
        self.context = 0
        """Current in this thread; 0 is none."""

    def cuCtxGetCurrent(self, current: Any) -> int:
        current._obj.value = self.context
        return 0

    def cuDeviceGet(self, number: Any, device: Any) -> int:
        number._obj.value = 10 + device.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, number: Any) -> int:
        context._obj.value = 100 + number.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.context = context.value
        return 0

    def cuIpcOpenMemHandle_v2(self, base: Any, handle: Any, flags: Any) -> int:
        if self.mapped:
            return 217
        base._obj.value = 4096
        self.mapped.append(4096)
        return 0

    def cuIpcCloseMemHandle(self, base: Any) -> int:
        self.mapped.remove(base.value)
        return 0

    def cuGetErrorString(self, status: Any, words: Any) -> int:
        words._obj.value = b"peer access is not supported"
        return 0


def test_what_was_mapped_is_given_back_when_the_rest_cannot_be() -> None:
    driver = _Driver()
    ipc = CudaIpc(driver, 0)
    area = SharedMemory(bytes(64), 0)
    with pytest.raises(TransferFailed, match=r"^cuIpcOpenMemHandle_v2: peer access is not supported \(217\)$"):
        ipc.reach([area, area])
    assert (driver.mapped, driver.context) == ([], 110), "torch's own context, whichever thread this is"
    with pytest.raises(TransferFailed, match="a handle of 3 bytes is not one of CUDA's"):
        ipc.reach([area, SharedMemory(b"abc", 0)])
    assert driver.mapped == []


class _Stream:
    """What torch has for a stream, and for an event."""

    cuda_stream = 77
    made = 0

    def __init__(self, device: int | None = None) -> None:
        type(self).made += 1
        self.waited = 0
        self.over = False

    def synchronize(self) -> None:
        self.waited += 1

    def record(self, stream: Any) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over


class _Event(_Stream):
    made = 0


class _CopyingDriver(_Driver):
    """Maps everything, a gibibyte apart, and has no batches."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[int, int, int, int]] = []
        self.refuses = 0
        self.waits: Callable[[], int] = lambda: 0
        self.waited = 0
        """How often the stream had been waited for when memory was unmapped."""

    def cuIpcCloseMemHandle(self, base: Any) -> int:
        self.waited = self.waits()
        return super().cuIpcCloseMemHandle(base)

    def cuIpcOpenMemHandle_v2(self, base: Any, handle: Any, flags: Any) -> int:
        base._obj.value = (len(self.mapped) + 1) << 30
        self.mapped.append(base._obj.value)
        return 0

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:
        if len(self.copies) == self.refuses - 1:
            return 700
        self.copies.append((source.value, target.value, size.value, stream.value))
        return 0


@pytest.fixture
def ipc(monkeypatch: pytest.MonkeyPatch) -> tuple[CudaIpc, _CopyingDriver]:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    _Stream.made = _Event.made = 0
    driver = _CopyingDriver()
    return CudaIpc(driver, 1), driver


def test_runs_are_copied_in_the_one_stream_and_events_are_used_again(ipc: tuple[CudaIpc, _CopyingDriver]) -> None:
    maps, driver = ipc
    first = maps.reach([SharedMemory(bytes(64), 16), SharedMemory(bytes(64), 0)])
    second = maps.reach([SharedMemory(bytes(64), 0)])
    assert (first.addresses, second.addresses) == (((1 << 30) + 16, 2 << 30), (3 << 30,))
    written = first.copy([(0, 5, 2), (9, 1, 1)], 1000, first.addresses[0], 100)
    base = (1 << 30) + 16
    assert driver.copies == [(1000, base + 500, 200, 77), (1900, base + 100, 100, 77)]
    assert not written()
    written.args[0].over = True  # type: ignore[attr-defined]
    assert written()
    second.copy([(0, 0, 1)], 0, 3 << 30, 100)
    second.wake(8, 3 << 30, 64)
    assert driver.copies[-1] == (8, 3 << 30, 64, 77)
    assert (_Stream.made, _Event.made) == (1, 1)
    assert maps._copier is not None
    stream = maps._copier._stream
    driver.waits = lambda: int(stream.waited)
    first.close()
    assert driver.mapped == [3 << 30]
    assert driver.waited == 1, "unmapped while copies may be under way"


def test_a_copy_that_fails_half_way_is_waited_for(ipc: tuple[CudaIpc, _CopyingDriver]) -> None:
    maps, driver = ipc
    reach = maps.reach([SharedMemory(bytes(64), 0)])
    driver.refuses = 2
    with pytest.raises(TransferFailed, match="cuMemcpyDtoDAsync_v2: peer access is not supported"):
        reach.copy([(0, 0, 1), (1, 1, 1)], 0, 1 << 30, 100)
    assert maps._copier is not None
    assert maps._copier._stream.waited == 1


def test_what_torch_raises_is_an_error_of_the_push_and_nothing_stays_mapped(
    ipc: tuple[CudaIpc, _CopyingDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, driver = ipc

    def broken(*args: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(_Event, "record", broken)
    reach = maps.reach([SharedMemory(bytes(64), 0)])
    with pytest.raises(TransferFailed, match="illegal memory access"):
        reach.copy([(0, 0, 1)], 0, 1 << 30, 100)
    reach.close()
    monkeypatch.setattr(_Stream, "__init__", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        CudaIpc(driver, 0).reach([SharedMemory(bytes(64), 0)])
    assert driver.mapped == []


def test_a_peer_that_does_not_answer_is_mapped_no_more(make: Open) -> None:
    one, two = make("one:1", 1), make("two:2", 2)
    one.transport._connect_limit = 0.05
    connecting = one.transport.connect("two:2", two.transport.metadata())
    assert one.transport.mapped == {"two:2"}
    until = monotonic() + 20.0
    while (report := connecting.poll()) is None:
        assert monotonic() < until
    assert report.error == "two:2 did not answer within 0.05 s"
    assert (one.transport.mapped, one.near.open) == (frozenset(), 0)


def test_a_probe_that_cannot_be_copied_goes_by_ucx(make: Open) -> None:
    one, two = make("one:1", 1), make("two:2", 2)
    connecting = one.transport.connect("two:2", two.transport.metadata())
    one.near.broken = "no"
    until = monotonic() + 20.0
    while (report := connecting.poll()) is None:
        assert monotonic() < until
        one.transport.arrivals()
        two.transport.arrivals()
    assert (report.error, one.transport.mapped, one.near.open) == ("", frozenset(), 0)
    assert one.push(two, [3], [4]).state is PostState.DONE


_BATCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_void_p] * 3,
    ctypes.c_size_t,
    *[ctypes.c_void_p] * 2,
    ctypes.c_size_t,
    ctypes.c_void_p,
)


class _BatchingDriver(_CopyingDriver):
    """Has batches: what is called is a C function, which copies in our own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.batch = _BATCH(self._batch)

    def cuIpcOpenMemHandle_v2(self, base: Any, handle: Any, flags: Any) -> int:
        base._obj.value = int.from_bytes(bytes(handle), "little")
        self.mapped.append(base._obj.value)
        return 0

    def cuGetProcAddress_v2(self, name: bytes, entry: Any, version: Any, flags: Any, found: Any) -> int:
        assert (name, version.value, flags.value) == (b"cuMemcpyBatchAsync", 13000, 0)
        entry._obj.value = ctypes.cast(self.batch, ctypes.c_void_p).value
        return 0

    def _batch(self, *arguments: Any) -> int:
        targets, sources, sizes, count, attributes, firsts, attribute_count, stream = arguments
        numbers = [(ctypes.c_uint64 * count).from_address(each) for each in (targets, sources, sizes)]
        words = (ctypes.c_uint32 * 6).from_address(attributes)
        self.calls.append((count, list(words), ctypes.c_size_t.from_address(firsts).value, attribute_count, stream))
        for target, source, size in zip(*numbers, strict=True):
            ctypes.memmove(target, source, size)
        return 0


def test_all_runs_are_one_call_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    ours, theirs = (np.random.default_rng(seed).integers(0, 256, (8, 64), dtype=np.uint8) for seed in (1, 2))
    expected = theirs.copy()
    expected[[5, 6, 0]] = ours[[1, 2, 7]]
    driver = _BatchingDriver()
    reach = CudaIpc(driver, 0).reach([SharedMemory((theirs.ctypes.data - 8).to_bytes(64, "little"), 8)])
    written = reach.copy([(1, 5, 2), (7, 0, 1)], ours.ctypes.data, reach.addresses[0], 64)
    np.testing.assert_array_equal(theirs, expected)
    # In stream order, from and to wherever the pointers say, without flags, from the first copy on.
    assert driver.calls == [(2, [1, 0, 0, 0, 0, 0], 0, 1, 77)]
    assert not written()


MANY, LARGE = 16384, 1 << 16
"""Pages of 64 KiB: 1 GiB takes a GPU half a millisecond, and three to another."""


@pytest.fixture
def children() -> Iterator[tuple[Child, Child]]:
    """On two GPUs where there are two, else on one; a pool of 1 GiB each."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with ExitStack() as stack:
        made = []
        for name, seed, device in (("one:1", 1, 0), ("two:2", 2, torch.cuda.device_count() - 1)):
            env = dict(os.environ)
            child = Child(name, seed=seed, pages=MANY, page_bytes=LARGE, env=env, device=f"cuda:{device}")
            stack.callback(child.end)
            made.append(child)
        one, two = made
        report = one.connect(two)
        assert (report["transport"], report["error"], report["mapped"]) == ("cuda_ipc", "", True)
        yield one, two


@pytest.mark.gpu
def test_scattered_pages_of_a_gpu_arrive_and_no_others(children: tuple[Child, Child]) -> None:
    one, two = children
    places = np.random.default_rng(3).permutation(MANY)
    source, target, rest = places[:6000].tolist(), places[4000:10000].tolist(), sorted(places[10000:].tolist())
    before = two.digest(rest)
    one.tell("push", peer="two:2", source=source, target=target, note="all")
    assert one.hear("pushed") == {"pushed": "done", "error": ""}
    assert two.hear("arrived") == {"arrived": "all", "peer": "one:1"}
    assert two.digest(target) == one.digest(source)
    assert two.digest(rest) == before


@pytest.mark.gpu
def test_a_dead_sender_writes_no_page_of_a_gpu(children: tuple[Child, Child]) -> None:
    one, two = children
    pages = list(range(MANY))
    two.tell("still")
    two.hear("still")
    for number in range(30):
        one.tell("push", peer="two:2", source=pages, target=pages, note=f"never {number}")
    one.hear("posted")
    one.process.kill()
    one.process.wait()
    two.tell("outlive")
    assert two.hear("overwritten")["overwritten"] == 0


@pytest.mark.gpu
def test_a_receiver_that_dies_hurts_nobody_else(children: tuple[Child, Child]) -> None:
    torch = pytest.importorskip("torch")
    one, two = children
    last = torch.cuda.device_count() - 1
    free = torch.cuda.mem_get_info(last)[0]
    pages = list(range(MANY))
    for number in range(10):
        one.tell("push", peer="two:2", source=pages, target=pages, note=f"to the dead {number}")
    one.hear("posted")
    two.process.kill()
    two.process.wait()
    for _ in range(10):
        assert one.hear("pushed")["pushed"] in ("done", "failed", "refused")
    one.tell("disconnect", peer="two:2")
    one.tell("push", peer="one:1", source=[1], target=[2], note="mine")
    assert one.hear("pushed") == {"pushed": "done", "error": ""}
    assert one.hear("arrived") == {"arrived": "mine", "peer": "one:1"}
    assert one.digest([1]) == one.digest([2])
    assert torch.cuda.mem_get_info(last)[0] - free >= MANY * LARGE, "its pool came back"
