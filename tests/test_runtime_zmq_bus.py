"""The bus over ZeroMQ against peers that misbehave: strangers on raw sockets, processes that are killed or stopped."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Self

import pytest
import uvloop
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.bus_support import ENGINE, PATIENCE, ROUTER, Recorder, World, no_leaks

from microserve.runtime.clock import ManualClock
from microserve.runtime.errors import MicroserveError, PeerLost, ProtocolError, VersionMismatch
from microserve.runtime.frames import HEADER, MAX_FRAME_BYTES, pack, unpack
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Bye,
    Call,
    Cancel,
    ErrorInfo,
    Failure,
    Hello,
    Message,
    Ok,
    Ping,
    Pong,
    Reply,
    Stats,
    StatsReply,
    Tokenized,
    Welcome,
)
from microserve.runtime.rpc import IncomingCall, RpcServer, connect
from microserve.runtime.zmq_bus import ZmqBus
from microserve.runtime.zmq_bus.sockets import Port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STRANGER = Peer("router", "raw", 1)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield


class Raw:
    """A socket without any of our rules."""

    def __init__(self, kind: int, *, routing_id: bytes | None = None, receive_high_water: int = 1000) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive_high_water)
        if routing_id is not None:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.sent = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.socket.close(0)
        self._context.term()

    async def send(self, message: Message) -> None:
        self.sent += 1
        await self.socket.send(pack(message, self.sent))

    async def receive(self) -> tuple[int, AnyMessage]:
        async with asyncio.timeout(PATIENCE):
            return unpack(await self.socket.recv())

    async def greet(self, endpoint: str, peer: Peer = STRANGER, version: int = PROTOCOL_VERSION) -> AnyMessage:
        self.socket.connect(endpoint)
        await self.send(Hello(version=version, kind=peer.kind, name=peer.name, epoch=peer.epoch))
        return (await self.receive())[1]


def dealer(peer: Peer = STRANGER) -> Raw:
    return Raw(zmq.DEALER, routing_id=peer.routing_id)


async def assert_serves(world: World, endpoint: str, there: Recorder) -> None:
    """Somebody else can still open a session and be heard."""
    before = len(there.messages)
    bus = world.bus(ROUTER)
    session = await bus.dial(endpoint, Recorder())
    session.send(Call(id=99, body=Stats()))
    await there.until(lambda r: len(r.messages) > before)
    assert there.messages[-1] == Call(id=99, body=Stats())
    await bus.close()


# --- greetings -----------------------------------------------------------------------------------------------------


def test_a_raw_socket_can_speak_the_protocol() -> None:
    async def main() -> None:
        async with World("tcp") as world, dealer() as raw:
            there = Recorder()
            listener = await world.bus(ENGINE).listen("tcp://127.0.0.1:*", there)
            welcome = await raw.greet(listener.endpoint)
            assert welcome == Welcome(version=1, kind="engine", name="a", epoch=7)
            await raw.send(Ping())
            assert await raw.receive() == (2, Pong())
            await raw.send(Cancel(id=5))
            await there.until(lambda r: r.messages == [Cancel(id=5)])
            there.session.send(Reply(id=5, body=Ok()))
            assert await raw.receive() == (3, Reply(id=5, body=Ok()))
            await raw.send(Bye(reason="enough"))
            await there.until(lambda r: r.losses)

    asyncio.run(main())


def test_a_hello_of_another_version_is_refused_by_name() -> None:
    async def main() -> None:
        async with World("tcp") as world, dealer() as raw:
            there = Recorder()
            engine = world.bus(ENGINE)
            listener = await engine.listen("tcp://127.0.0.1:*", there)
            answer = await raw.greet(listener.endpoint, version=2)
            assert isinstance(answer, Failure)
            assert answer.id is None
            assert answer.error.code == "version_mismatch"
            assert engine.statistics().unknown_version == 1
            await raw.socket.send(HEADER.pack(9, 1) + b"whatever version 9 says")
            _seq, answer = await raw.receive()
            assert isinstance(answer, Failure)
            assert answer.error.code == "version_mismatch"
            assert engine.statistics().unknown_version == 2
            assert there.sessions == []
            await assert_serves(world, listener.endpoint, there)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("peer", "routing_id"),
    [
        (STRANGER, b"router:other:1"),
        (STRANGER, STRANGER.routing_id + b"#x"),
        (STRANGER, STRANGER.routing_id + b"#"),
        (Peer("router", "no spaces", 1), b"router:no spaces:1"),
    ],
)
def test_a_hello_that_does_not_fit_its_routing_id_is_refused(peer: Peer, routing_id: bytes) -> None:
    async def main() -> None:
        async with World("tcp") as world, Raw(zmq.DEALER, routing_id=routing_id) as raw:
            there = Recorder()
            listener = await world.bus(ENGINE).listen("tcp://127.0.0.1:*", there)
            answer = await raw.greet(listener.endpoint, peer)
            assert isinstance(answer, Failure)
            assert answer.error.code == "invalid_request"
            assert there.sessions == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (pack(Welcome(version=2, kind="engine", name="a", epoch=1), 1), VersionMismatch),
        (b"\x02" + pack(Welcome(version=1, kind="engine", name="a", epoch=1), 1)[1:], VersionMismatch),
        (pack(Failure(id=None, error=ErrorInfo("version_mismatch", "no")), 0), VersionMismatch),
        (pack(Welcome(version=1, kind="engine", name="a", epoch=1), 2), ProtocolError),
        (pack(Bye(reason="no"), 0), PeerLost),
        (pack(Ping(), 1), ProtocolError),
        (b"HTTP/1.1 400 Bad Request", VersionMismatch),
        (b"\x01", ProtocolError),
    ],
)
def test_a_dial_that_is_answered_wrongly_raises(answer: bytes, error: type[MicroserveError]) -> None:
    async def main() -> None:
        async with World("tcp") as world, Raw(zmq.ROUTER) as raw:
            port = raw.socket.bind_to_random_port("tcp://127.0.0.1")
            here = Recorder()
            dial = asyncio.ensure_future(world.bus(ROUTER).dial(f"tcp://127.0.0.1:{port}", here))
            routing_id, hello = await raw.socket.recv_multipart()
            assert routing_id == ROUTER.routing_id + b"#1"
            assert unpack(hello) == (1, Hello(version=1, kind="router", name="r", epoch=3))
            await raw.socket.send_multipart([routing_id, answer])
            with pytest.raises(error):
                await dial
            assert here.sessions == []
            assert here.losses == []

    asyncio.run(main())


@pytest.mark.parametrize("endpoint", ["tcp://no port", "carrier-pigeon://x", ""])
def test_an_address_that_makes_no_sense_cannot_be_dialled(endpoint: str) -> None:
    async def main() -> None:
        async with World("tcp") as world:
            with pytest.raises(PeerLost, match="cannot dial"):
                await world.bus(ROUTER).dial(endpoint, Recorder())

    asyncio.run(main())


# --- nonsense ------------------------------------------------------------------------------------------------------


def test_nonsense_of_a_stranger_is_counted_and_dropped() -> None:
    async def main() -> None:
        async with World("tcp") as world, dealer() as raw:
            there = Recorder()
            engine = world.bus(ENGINE)
            listener = await engine.listen("tcp://127.0.0.1:*", there)
            raw.socket.connect(listener.endpoint)
            await raw.socket.send(b"")
            await raw.socket.send(b"\x01\0\0")
            await raw.socket.send(HEADER.pack(1, 1) + b"\xff\xfe nonsense")
            await raw.socket.send_multipart([b"a", b"b", b"c"])
            # A message of ours without a session: the goodbye shows that everything before it was read.
            await raw.socket.send(pack(Ping(), 17))
            assert await raw.receive() == (0, Bye(reason="no session"))
            assert engine.statistics().malformed == 4
            assert engine.statistics().strays == 1
            await assert_serves(world, listener.endpoint, there)

    asyncio.run(main())


def test_who_leaves_before_the_handshake_was_not_refused_where_there_are_no_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with World("tcp") as world:
            engine = world.bus(ENGINE)
            listener = await engine.listen("tcp://127.0.0.1:*", there := Recorder())
            host, port = listener.endpoint.removeprefix("tcp://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            async with asyncio.timeout(PATIENCE):
                # Whoever looks whether a port is open does that.
                while "a connection ended before its handshake" not in caplog.messages:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            assert engine.statistics().unauthorized == 0
            await assert_serves(world, listener.endpoint, there)

    with caplog.at_level("DEBUG"):
        asyncio.run(main())
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_nonsense_within_a_session_is_answered_and_survived() -> None:
    async def main() -> None:
        async with World("tcp") as world, dealer() as raw:
            there = Recorder()
            listener = await world.bus(ENGINE).listen("tcp://127.0.0.1:*", there)
            await raw.greet(listener.endpoint)
            await raw.socket.send(b"")
            await raw.socket.send_multipart([b"a", b"b", b"c"])
            await raw.socket.send(HEADER.pack(3, 2) + b"x")
            await raw.socket.send(HEADER.pack(1, 2) + b"\xc1")
            for code in ("protocol_error", "protocol_error", "version_mismatch", "protocol_error"):
                _seq, failure = await raw.receive()
                assert isinstance(failure, Failure)
                assert (failure.id, failure.error.code) == (None, code)
            raw.sent = 2
            await raw.send(Cancel(id=1))
            await there.until(lambda r: r.messages == [Cancel(id=1)])
            assert there.losses == []

    asyncio.run(main())


def test_an_oversized_frame_ends_the_session_of_its_sender_only() -> None:
    async def main() -> None:
        async with World("tcp") as world, dealer() as raw:
            # No heartbeat is due within this test: only the broken connection can end the session.
            there, good = Recorder(), Recorder()
            listener = await world.bus(ENGINE, heartbeat=200, silence=600).listen("tcp://127.0.0.1:*", there)
            await raw.greet(listener.endpoint)
            session = await world.bus(ROUTER, heartbeat=200, silence=600).dial(listener.endpoint, good)
            await raw.socket.send(bytes(MAX_FRAME_BYTES + 1))
            await there.until(lambda r: r.losses)
            assert there.losses[0][0].peer == STRANGER
            session.send(Cancel(id=1))
            await there.until(lambda r: r.messages == [Cancel(id=1)])
            assert good.losses == []

    asyncio.run(main())


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    world = Fuzzed()
    world.runner.run(world.open())
    yield world
    world.runner.run(world.close())
    world.runner.close()


class Fuzzed:
    """A listening bus with a good client, kept for all examples of a property."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()

    async def open(self) -> None:
        self.engine = ZmqBus(ENGINE)
        self.router = ZmqBus(ROUTER)

        def answer(call: IncomingCall) -> None:
            call.reply(StatsReply(values={}))

        self.listener = await self.engine.listen("tcp://127.0.0.1:*", RpcServer(answer))
        self.client = await connect(self.router, self.listener.endpoint)
        self.raw = dealer()
        self.epoch = 0

    async def close(self) -> None:
        await self.raw.__aexit__()
        await self.router.close()
        await self.engine.close()

    async def throw(self, frames: list[bytes], greeted: bool) -> None:
        self.epoch += 1
        peer = Peer("router", "raw", self.epoch)
        async with dealer(peer) as raw:
            if greeted:
                assert isinstance(await raw.greet(self.listener.endpoint, peer), Welcome)
            else:
                raw.socket.connect(self.listener.endpoint)
            for frame in frames:
                await raw.socket.send(frame)
            # The listener answers in order of arrival, so an answer to this one shows that it has read the rest.
            await raw.socket.send(HEADER.pack(99, 0) + b"the end")
            while True:
                _seq, message = await raw.receive()
                if isinstance(message, Bye | Failure):
                    break
        assert await self.client.call(Stats(), budget=PATIENCE) == StatsReply(values={})
        assert not self.client.closed


@given(
    frames=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.binary(max_size=200).map(lambda body: HEADER.pack(1, 2) + body),
            st.sampled_from(
                [pack(Ping(), 2), pack(Cancel(id=1), 2), pack(Bye(), 3), pack(Call(id=1, body=Stats()), 2)]
            ),
        ),
        max_size=8,
    ),
    greeted=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_leave_a_listener_serving_others(fuzzed: Fuzzed, frames: list[bytes], greeted: bool) -> None:
    fuzzed.runner.run(fuzzed.throw(frames, greeted))


# --- silence and slowness ------------------------------------------------------------------------------------------


def test_a_silent_peer_is_pinged_and_then_given_up() -> None:
    async def main() -> None:
        async with World("tcp") as world, dealer() as raw:
            there = Recorder()
            listener = await world.bus(ENGINE, heartbeat=0.02, silence=0.1).listen("tcp://127.0.0.1:*", there)
            await raw.greet(listener.endpoint)
            assert await raw.receive() == (2, Ping())
            await there.until(lambda r: r.losses)
            assert "nothing heard" in there.losses[0][1].message
            while (message := (await raw.receive())[1]) == Ping():
                pass
            assert message == Bye(reason="you fell silent")

    asyncio.run(main())


def test_a_stall_of_our_own_is_not_the_peers_silence() -> None:
    async def main() -> None:
        clock = ManualClock()
        there = Recorder()
        engine = ZmqBus(ENGINE, clock=clock, heartbeat=0.02, silence=0.1)
        async with dealer() as raw:
            listener = await engine.listen("tcp://127.0.0.1:*", there)
            await raw.greet(listener.endpoint)
            clock.advance(100)
            assert await raw.receive() == (2, Ping()), "asked before it is judged"
            assert there.losses == []
            await engine.close()

    asyncio.run(main())


def test_a_peer_that_does_not_read_overflows_loudly_and_others_do_not_notice() -> None:
    async def main() -> None:
        slow = Raw(zmq.DEALER, routing_id=STRANGER.routing_id, receive_high_water=1)
        async with World("tcp") as world, slow:
            there, good = Recorder(), Recorder()
            engine = world.bus(ENGINE, heartbeat=200, silence=600, max_queue_bytes=1 << 20)
            listener = await engine.listen("tcp://127.0.0.1:*", there)
            await slow.greet(listener.endpoint)
            chunk = Reply(id=1, body=Tokenized(ids=bytes(100_000)))
            towards_slow = there.session
            await world.bus(ROUTER, heartbeat=200, silence=600).dial(listener.endpoint, good)

            def send_until_full() -> None:
                for _ in range(10_000):
                    towards_slow.send(chunk)

            with pytest.raises(PeerLost, match="reads too slowly"):
                send_until_full()
            assert towards_slow.closed
            assert [loss[0] for loss in there.losses] == [towards_slow]
            assert engine.statistics().overflows == 1
            there.session.send(chunk)
            await good.until(lambda r: r.messages == [chunk])
            # What was on its way arrives; as soon as there is room, the slow peer's words are answered with a goodbye.
            seqs = []
            await slow.send(Ping())
            while not isinstance((received := await slow.receive())[1], Bye):
                seqs.append(received[0])
                await slow.send(Ping())
            assert seqs == list(range(2, 2 + len(seqs)))

    asyncio.run(main())


def test_what_waits_goes_out_when_a_slow_peer_reads_again() -> None:
    async def main() -> None:
        slow = Raw(zmq.DEALER, routing_id=STRANGER.routing_id, receive_high_water=1)
        async with World("tcp") as world, slow:
            there = Recorder()
            engine = world.bus(ENGINE, heartbeat=200, silence=600, max_queue_bytes=1 << 26)
            listener = await engine.listen("tcp://127.0.0.1:*", there)
            await slow.greet(listener.endpoint)
            chunk = Reply(id=1, body=Tokenized(ids=bytes(100_000)))
            sent = 0
            while there.session.queued_bytes < 1 << 25:  # type: ignore[attr-defined]
                there.session.send(chunk)
                sent += 1
            there.session.send(Cancel(id=2))
            for number in range(sent):
                assert await slow.receive() == (2 + number, chunk)
            assert await slow.receive() == (2 + sent, Cancel(id=2))
            assert there.losses == []
            assert there.session.queued_bytes == 0  # type: ignore[attr-defined]

    asyncio.run(main())


@pytest.fixture(scope="module", autouse=True)
def _uvloop_is_warm() -> None:
    """The first loop opens a descriptor that uvloop keeps for the process."""
    uvloop.run(asyncio.sleep(0))


class Echo(Recorder):
    """Sends everything back, from within the callback."""

    def received(self, session: object, message: object) -> None:
        super().received(session, message)  # type: ignore[arg-type]
        self.session.send(message)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("kind", ["tcp", "ipc", "inproc"])
def test_no_wake_up_is_lost_under_load(kind: str, run: object) -> None:
    """The descriptor is edge-triggered: one edge that a send consumed unnoticed would stop everything here."""

    async def main() -> None:
        async with World(kind) as world:
            there, here = Echo(), Recorder()
            listener = await world.bus(ENGINE, heartbeat=200, silence=600, max_queue_bytes=1 << 26).listen(
                world.endpoint(), there
            )
            session = await world.bus(ROUTER, heartbeat=200, silence=600, max_queue_bytes=1 << 26).dial(
                listener.endpoint, here
            )
            sent = 0
            for burst in (1, 1, 2, 255, 256, 257, 1, 5000, 1, 3):
                for _ in range(burst):
                    session.send(Cancel(id=sent))
                    sent += 1
                await here.until(lambda r: len(r.messages) == sent)  # noqa: B023
            assert here.messages == [Cancel(id=id) for id in range(sent)]

    run(main())  # type: ignore[operator]


# --- processes -----------------------------------------------------------------------------------------------------

_CHILD = """
import asyncio, sys
from microserve.runtime.ids import Peer
from microserve.runtime.zmq_bus import ZmqBus
from microserve.runtime.zmq_bus.sockets import Port

class Quiet:
    def opened(self, session): print("opened", flush=True)
    def received(self, session, message): pass
    def lost(self, session, error): print("lost", error, flush=True)

async def main(role, endpoint, heartbeat, silence):
    bus = ZmqBus(Peer("child", "c", 1), heartbeat=float(heartbeat), silence=float(silence))
    if role == "listen":
        print((await bus.listen(endpoint, Quiet())).endpoint, flush=True)
    else:
        await bus.dial(endpoint, Quiet())
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


class Child:
    """A process of its own that listens or dials."""

    def __init__(self, role: str, endpoint: str, heartbeat: float, silence: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, role, endpoint, str(heartbeat), str(silence)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
@pytest.mark.parametrize("role", ["listen", "dial"])
def test_a_killed_process_is_noticed_long_before_its_silence(kind: str, role: str, tmp_path: Path) -> None:
    endpoint = "tcp://127.0.0.1:*" if kind == "tcp" else f"ipc://{tmp_path}/s"

    async def main() -> None:
        async with World(kind) as world:
            mine = Recorder()
            bus = world.bus(ENGINE, heartbeat=200, silence=600)
            if role == "dial":
                listener = await bus.listen(endpoint, mine)
            with Child(role, endpoint if role == "listen" else listener.endpoint, 200, 600) as child:
                if role == "listen":
                    await bus.dial(await child.line(), mine)
                await mine.until(lambda r: r.sessions)
                child.process.send_signal(signal.SIGKILL)
                await mine.until(lambda r: r.losses)
            assert [type(error) for _session, error in mine.losses] == [PeerLost]

    asyncio.run(main())


def test_a_stopped_process_is_given_up_and_learns_of_it_when_it_wakes() -> None:
    async def main() -> None:
        async with World("tcp") as world:
            mine = Recorder()
            listener = await world.bus(ENGINE, heartbeat=0.05, silence=0.5).listen("tcp://127.0.0.1:*", mine)
            # Its own patience is endless: only our goodbye can tell it.
            with Child("dial", listener.endpoint, 200, 600) as child:
                await mine.until(lambda r: r.sessions)
                assert await child.line() == "opened"
                child.process.send_signal(signal.SIGSTOP)
                await mine.until(lambda r: r.losses)
                assert "nothing heard" in mine.losses[0][1].message
                child.process.send_signal(signal.SIGCONT)
                assert "you fell silent" in await child.line()

    asyncio.run(main())


def test_a_socket_that_is_left_open_does_not_keep_the_context_from_ending() -> None:
    async def main() -> None:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)

        def take() -> None:
            socket.recv(zmq.NOBLOCK)

        port = Port(socket, take)
        async with asyncio.timeout(10):
            await asyncio.to_thread(context.term)
        assert port.closed
        assert socket.closed

    asyncio.run(main())
