"""NIXL between real processes: what arrives, what it says of the link, and what stopped and killed peers do.

The faults go over TCP: on shared memory a push is over when `post` returns, so there is no "while".
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.transfer_child import Child

from microserve.runtime.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Start = Callable[..., Child]

PAGE = 1 << 16
MANY = 512
"""Pages of 64 KiB: 32 MiB do not fit what TCP buffers."""


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a child over the given UCX transports."""
    with ExitStack() as stack:

        def begin(name: str, *, seed: int, tls: str = "", pages: int = 64, **more: Any) -> Child:
            env = {key: value for key, value in os.environ.items() if not key.startswith("UCX_")}
            if tls:
                env["UCX_TLS"] = tls
            child = Child(name, pages=pages, page_bytes=PAGE, seed=seed, env=env, **more)
            stack.callback(child.end)
            return child

        yield begin


@pytest.mark.parametrize(("tls", "kind"), [("", "shm"), ("tcp", "tcp")])
def test_scattered_pages_arrive_byte_for_byte_and_the_link_says_what_it_is(start: Start, tls: str, kind: str) -> None:
    one, two = start("one:1", seed=1, tls=tls), start("two:2", seed=2, tls=tls)
    before = two.digest([3, 4])
    report = one.connect(two)
    assert (report["transport"], report["error"]) == (kind, "")
    assert report["rate"] > 0.01
    one.tell("push", peer="two:2", source=[5, 6, 7, 20, 9], target=[10, 11, 40, 41, 0], note="hello")
    assert one.hear("posted")["posted"] == 5 * PAGE
    assert one.hear("pushed")["pushed"] == "done"
    assert two.hear("arrived") == {"arrived": "hello", "peer": "one:1"}
    assert two.digest([10, 11, 40, 41, 0]) == one.digest([5, 6, 7, 20, 9])
    assert two.digest([3, 4]) == before


def test_ucx_listens_on_loopback_alone_unless_it_is_told_otherwise(start: Start) -> None:
    assert EngineConfig().ucx_devices == "lo"
    process = Path(f"/proc/{start('one:1', seed=1).process.pid}")
    sockets = {each.readlink().name for each in (process / "fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in (process / "net" / name).read_text().splitlines()[1:]]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    assert listening == {"0100007F"}


def test_both_ways_at_once(start: Start) -> None:
    one, two = start("one:1", seed=1), start("two:2", seed=2)
    one.tell("connect", peer="two:2", metadata=two.metadata)
    two.tell("connect", peer="one:1", metadata=one.metadata)
    assert (one.hear("transport")["error"], two.hear("transport")["error"]) == ("", "")
    one.tell("push", peer="two:2", source=[0, 1], target=[8, 9], note="there")
    two.tell("push", peer="one:1", source=[0, 1], target=[8, 9], note="back")
    assert (two.hear("arrived")["arrived"], one.hear("arrived")["arrived"]) == ("there", "back")
    assert one.digest([8, 9]) == two.digest([0, 1])
    assert two.digest([8, 9]) == one.digest([0, 1])


def test_a_peer_that_dies_during_a_push_fails_it(start: Start) -> None:
    one, two = (start(name, seed=1, tls="tcp", pages=MANY) for name in ("one:1", "two:2"))
    assert one.connect(two)["error"] == ""
    pages = list(range(MANY))
    os.kill(two.process.pid, signal.SIGSTOP)  # so that it is under way for certain
    one.tell("push", peer="two:2", source=pages, target=pages, note="never")
    one.hear("posted")
    two.process.kill()
    ended = one.hear("pushed")
    assert ended["pushed"] == "failed"
    assert "two:2" in ended["error"]
    one.tell("push", peer="two:2", source=[0], target=[0], note="nobody there")
    assert one.hear("pushed")["pushed"] in ("failed", "refused")
    other = start("two:3", seed=2, tls="tcp")
    one.tell("disconnect", peer="two:2")
    assert one.connect(other)["error"] == ""


def test_a_dead_peer_writes_nothing_once_its_death_is_told(start: Start) -> None:
    """Over TCP, megabytes of its push lie in our own sockets when it is gone, and our own looks write them."""
    one, two = (start(name, seed=1, tls="tcp", pages=MANY) for name in ("one:1", "two:2"))
    assert (one.connect(two)["error"], two.connect(one)["error"]) == ("", "")
    two.tell("still")
    two.hear("still")
    pages = list(range(MANY))
    one.tell("push", peer="two:2", source=pages, target=pages, note="never")
    one.hear("posted")
    one.process.kill()
    one.process.wait()
    two.tell("outlive")
    found = two.hear("overwritten")
    assert found["overwritten"] == 0
    assert found["taken"] > 0


def test_a_stopped_peer_leaves_a_push_under_way_and_going_on_completes_it(start: Start) -> None:
    one, two = (start(name, seed=seed, tls="tcp", pages=MANY) for name, seed in (("one:1", 1), ("two:2", 2)))
    assert one.connect(two)["error"] == ""
    pages = list(range(MANY))
    os.kill(two.process.pid, signal.SIGSTOP)
    one.tell("push", peer="two:2", source=pages, target=pages, note="late")
    one.hear("posted")
    with pytest.raises(TimeoutError):
        one.hear("pushed", within=0.3)
    os.kill(two.process.pid, signal.SIGCONT)
    assert one.hear("pushed")["pushed"] == "done"
    assert two.hear("arrived")["arrived"] == "late"
    assert two.digest(pages) == one.digest(pages)


def test_disconnecting_a_stopped_peer_fails_the_push_at_once(start: Start) -> None:
    one, two = (start(name, seed=1, tls="tcp", pages=MANY) for name in ("one:1", "two:2"))
    assert one.connect(two)["error"] == ""
    pages = list(range(MANY))
    os.kill(two.process.pid, signal.SIGSTOP)
    one.tell("push", peer="two:2", source=pages, target=pages, note="never")
    one.hear("posted")
    one.tell("disconnect", peer="two:2")
    assert one.hear("pushed") == {"pushed": "failed", "error": "two:2 was disconnected"}
    third = start("three:3", seed=3, tls="tcp")
    assert one.connect(third)["error"] == ""
    one.tell("push", peer="three:3", source=[1], target=[1], note="alive")
    assert third.hear("arrived")["arrived"] == "alive"
    two.process.kill()


def test_a_peer_that_does_not_answer_is_not_waited_for_for_ever(start: Start) -> None:
    one, two = (start(name, seed=1, tls="tcp", limit=0.5) for name in ("one:1", "two:2"))
    os.kill(two.process.pid, signal.SIGSTOP)
    report = one.connect(two)
    assert report["error"] == "two:2 did not answer within 0.5 s"
    third = start("three:3", seed=3, tls="tcp")
    assert one.connect(third)["error"] == ""
    two.process.kill()


@pytest.mark.gpu
def test_pages_go_from_gpu_to_gpu(start: Start) -> None:
    """Between two GPUs where there are two, and between two processes on one where there is one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    last = torch.cuda.device_count() - 1
    one, two = start("one:1", seed=1, device="cuda:0"), start("two:2", seed=2, device=f"cuda:{last}")
    before = two.digest([3, 4])
    report = one.connect(two)
    assert (report["transport"], report["error"]) == ("cuda_ipc", "")
    for side in (one, two):
        one.tell("push", peer=side.name, source=[5, 6, 7, 20, 9], target=[10, 11, 40, 41, 0], note="hello")
        assert one.hear("pushed") == {"pushed": "done", "error": ""}
        assert side.hear("arrived") == {"arrived": "hello", "peer": "one:1"}
        assert side.digest([10, 11, 40, 41, 0]) == one.digest([5, 6, 7, 20, 9])
    assert two.digest([3, 4]) == before


@pytest.mark.gpu
def test_ucx_carries_scattered_pages_from_gpu_to_gpu_and_no_others(start: Start) -> None:
    """Where pools cannot be mapped. Between two GPUs where there are two, and between two processes on one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    devices = ("cuda:0", f"cuda:{torch.cuda.device_count() - 1}")
    one, two = (
        start(name, seed=seed, pages=MANY, device=device, maps=False)
        for name, seed, device in zip(("one:1", "two:2"), (1, 2), devices, strict=True)
    )
    report = one.connect(two)
    assert (report["transport"], report["error"], report["mapped"]) == ("cuda_ipc", "", False)
    places = np.random.default_rng(3).permutation(MANY)
    source, target = places[:200].tolist(), places[100:300].tolist()
    others = sorted(set(range(MANY)) - set(target))
    before = two.digest(others)
    one.tell("push", peer="two:2", source=source, target=target, note="all")
    assert one.hear("posted")["posted"] == 200 * PAGE
    assert one.hear("pushed") == {"pushed": "done", "error": ""}
    assert two.hear("arrived") == {"arrived": "all", "peer": "one:1"}
    assert two.digest(target) == one.digest(source)
    assert two.digest(others) == before
