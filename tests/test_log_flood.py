"""Floods of what makes no sense: every bit of it is counted, and the log stays short."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import zmq
from tests.cluster import FAKE, Cluster, Daemon
from tests.raw_calls import Recorder

from microserve.runtime.client import Client
from microserve.runtime.codec import pack_tokens
from microserve.runtime.frames import pack
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.keys import new_identity
from microserve.runtime.messages import (
    PROTOCOL_VERSION,
    Generate,
    Hello,
    PrepRecv,
    SamplingParams,
    StartGenerate,
)
from microserve.runtime.zmq_bus import ZmqBus, new_key_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import pytest

    from microserve.runtime.messages import EngineVerb, RouterVerb

LIMIT = 60.0
MOST_LINES = 50
"""That a flood may add to a log."""
EVIL = "no-such-model\n2026-01-01T00:00:00.000Z error   router:r forged\x1b[2J"


def flood_http(url: str, path: str, body: bytes, times: int, expected: int) -> None:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=LIMIT)
    try:
        for _ in range(times):
            connection.request("POST", path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == expected
    finally:
        connection.close()


def flood_garbage(url: str, times: int) -> None:
    """What is not even HTTP."""
    where = urlsplit(url)
    for _ in range(times):
        with socket.create_connection((where.hostname, where.port), LIMIT) as connection:
            connection.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
            while connection.recv(4096):
                pass


def flood_calls(endpoint: str, verb: Callable[[int], RouterVerb | EngineVerb], times: int) -> None:
    """Calls in one session, each of which gets its refusal."""

    async def flood() -> None:
        bus, recorder = ZmqBus(Peer("client", "flood", new_epoch())), Recorder()
        try:
            await bus.dial(endpoint, recorder)
            for number in range(times):
                recorder.call(number, verb(number))
            await recorder.wait(lambda: not recorder.open, LIMIT)
            assert all(recorder.error(number) is not None for number in range(times))
        finally:
            await bus.close()

    asyncio.run(flood())


@contextmanager
def flood_frames(endpoint: str, greeted: int, frames: int) -> Iterator[None]:
    """Frames of somebody unknown, and three from each of `greeted` sessions.

    All stay connected until the block ends: ZeroMQ forgets what it has not handed over of those who leave.
    """
    with zmq.Context() as context, ExitStack() as stack:
        for number in range(greeted + 1):
            dealer = stack.enter_context(context.socket(zmq.DEALER))
            dealer.setsockopt(zmq.LINGER, 0)
            peer = Peer("client", f"flood{number}", new_epoch())
            dealer.setsockopt(zmq.ROUTING_ID, peer.routing_id)
            dealer.setsockopt(zmq.SNDHWM, 0)
            dealer.connect(endpoint)
            if number:
                dealer.send(pack(Hello(version=PROTOCOL_VERSION, kind="client", name=peer.name, epoch=peer.epoch), 1))
            for _ in range(3 if number else frames):
                dealer.send(EVIL.encode())
        yield


def metric(url: str, name: str, **labels: str) -> float:
    """A counter as the router shows it."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=LIMIT)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    told = ",".join(f'{key}="{value}"' for key, value in labels.items())
    found = [line for line in text.splitlines() if line.startswith(f"microserve_router_{name}_total{{{told}}}")]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def until(holds: Callable[[], bool]) -> None:
    """Frames are handled a moment after they were sent."""
    over = threading.Event()
    timer = threading.Timer(LIMIT, over.set)
    timer.start()
    try:
        while not holds():
            assert not over.wait(0.05), "it was never counted"
    finally:
        timer.cancel()
        timer.join()


def lengths(daemons: list[Daemon]) -> dict[str, int]:
    return {daemon.name: len(daemon.text().splitlines()) for daemon in daemons}


def added(before: Mapping[str, int], daemons: list[Daemon]) -> dict[str, list[str]]:
    return {daemon.name: daemon.text().splitlines()[before[daemon.name] :] for daemon in daemons}


def test_thousands_of_bad_requests_make_a_short_log_and_are_all_counted() -> None:
    tokens, sampling = pack_tokens([1, 2, 3]), SamplingParams(max_tokens=4)
    unknown = json.dumps({"model": EVIL, "prompt": [1, 2, 3]}).encode()
    numbers = itertools.count()
    with Cluster(engines=1) as cluster:
        engine = cluster.endpoints()["e0"]
        before = lengths(cluster.daemons)
        flood_http(cluster.http, "/v1/completions", b'{"model": ', 1000, 400)
        flood_http(cluster.http, "/v1/chat/completions", unknown, 1000, 400)
        flood_http(cluster.http, "/v1/completions", unknown, 1000, 404)
        flood_garbage(cluster.http, 200)
        flood_calls(cluster.router, lambda _: Generate(model=EVIL, prompt=tokens, sampling=sampling), 1000)
        outside = pack_tokens([10**6])
        flood_calls(cluster.router, lambda _: Generate(prompt=outside, sampling=sampling), 1000)

        def bad(_: int) -> EngineVerb:
            sub = f"{EVIL}{next(numbers)}"
            if next(numbers) % 4 == 1:
                return StartGenerate(request_id=EVIL, sub_id=sub, prompt=outside, begin=0, sampling=sampling)
            return PrepRecv(request_id=EVIL, sub_id=sub, prompt=outside, end=-1)

        flood_calls(engine, bad, 1000)
        with flood_frames(engine, 100, 2000), flood_frames(cluster.router, 100, 2000):
            # Its first bytes say another version of the protocol.
            until(lambda: metric(cluster.http, "bus", event="unknown_version") == 2300)
        assert metric(cluster.http, "http_errors", code="invalid_request") == 2000
        assert metric(cluster.http, "http_errors", code="model_not_found") == 1000
        assert metric(cluster.http, "call_errors", code="model_not_found") == 1000
        assert metric(cluster.http, "refused", reason="invalid_request") == 1000
        assert len(cluster.client().generate([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
        for name, lines in added(before, cluster.daemons).items():
            assert 0 < len(lines) < MOST_LINES, f"{name}:\n" + "\n".join(lines[:60])
            assert not any(line.startswith("2026-01-01") for line in lines), "nobody writes our log"
            assert all(line.isprintable() for line in lines)


def test_who_has_no_key_does_not_fill_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    for name, role in (("r", "router"), ("e0", "engine"), ("root", "admin")):
        new_identity(keys, name, role, new_key_pair)
    monkeypatch.setenv("MICROSERVE_KEY_FILE", str(keys / "root.key"))
    engine = (*FAKE, "--key-file", str(keys / "e0.key"))
    with Cluster(engines=1, engine_args=engine, router_args=("--key-file", str(keys / "r.key"))) as cluster:
        before = lengths(cluster.daemons)
        flood_frames_without_waiting(cluster.router, 300)
        until(lambda: metric(cluster.http, "bus", event="unauthorized") >= 300)
        with Client(cluster.router, key_file=keys / "root.key") as client:
            assert len(client.generate([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
        for name, lines in added(before, cluster.daemons).items():
            assert len(lines) < MOST_LINES, f"{name}:\n" + "\n".join(lines[:60])


def flood_frames_without_waiting(endpoint: str, times: int) -> None:
    """Connections without a key; each is there until it was refused at least once."""
    context = zmq.Context()
    try:
        for _ in range(times):
            with context.socket(zmq.DEALER) as dealer, dealer.get_monitor_socket() as monitor:
                dealer.setsockopt(zmq.LINGER, 0)
                dealer.connect(endpoint)
                with suppress(zmq.Again):  # It may have been refused before that, and then there is nobody to send to.
                    dealer.send(b"let me in", zmq.NOBLOCK)
                while monitor.poll(round(LIMIT * 1000)):
                    event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
                    if event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                        break
                dealer.disable_monitor()
    finally:
        context.term()
