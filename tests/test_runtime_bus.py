"""The contract of `Bus`, run against every implementation; and the faults that only the memory bus can produce."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.bus_support import ENGINE, ROUTER, Recorder, Signal, World, no_leaks

from microserve.runtime.errors import ConfigError, MicroserveError, PeerLost, TooLarge
from microserve.runtime.frames import pack
from microserve.runtime.ids import Peer
from microserve.runtime.log import get_logger
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import (
    MAX_MESSAGE_BYTES,
    Bye,
    CachePin,
    Call,
    Cancel,
    EngineEvent,
    ErrorInfo,
    Failure,
    Load,
    Ok,
    Ping,
    Reply,
    Stats,
    Tokenize,
    Tokenized,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.bus import Listener, Session
    from microserve.runtime.messages import RpcMessage


@pytest.fixture(params=["memory", "tcp", "ipc", "inproc"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield


def event(seq: int, epoch: int = ENGINE.epoch) -> EngineEvent:
    return EngineEvent(engine_id=ENGINE.name, epoch=epoch, seq=seq, kind="load", load=Load(running=seq))


# --- the contract --------------------------------------------------------------------------------------------------


def test_messages_cross_in_order_both_ways(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, here = Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            session = await router.dial(listener.endpoint, here)
            assert session.peer == ENGINE
            assert here.sessions == [session]
            await there.until(lambda r: r.sessions)
            assert there.session.peer == ROUTER
            calls = [Call(id=i, body=Stats()) for i in range(1000)]
            replies = [Reply(id=i, body=Ok()) for i in range(1000)]
            for call, reply in zip(calls, replies, strict=True):
                session.send(call)
                there.session.send(reply)
            await there.until(lambda r: len(r.messages) == 1000)
            await here.until(lambda r: len(r.messages) == 1000)
            assert there.messages == calls
            assert here.messages == replies
            assert engine.statistics().sessions == router.statistics().sessions == 1
            assert engine.statistics().sent == router.statistics().received == 1001

    asyncio.run(main())


def test_a_closed_session_is_lost_once_on_both_sides(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, here = Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            session = await router.dial(listener.endpoint, here)
            session.send(Call(id=1, body=Stats()))
            session.close("done")
            session.close("again")
            assert session.closed
            with pytest.raises(PeerLost, match="closed"):
                session.send(Call(id=2, body=Stats()))
            await there.until(lambda r: r.losses)
            assert there.messages == [Call(id=1, body=Stats())], "what was sent before the goodbye arrives"
            await engine.close()
            await router.close()
            assert [loss[0] for loss in there.losses] == there.sessions
            assert [loss[0] for loss in here.losses] == [session]
            assert isinstance(here.losses[0][1], PeerLost)
            assert "done" in there.losses[0][1].message
            assert engine.statistics().sessions == router.statistics().sessions == 0

    asyncio.run(main())


def test_a_listener_that_closes_ends_its_sessions(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, here = Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            await router.dial(listener.endpoint, here)
            await there.until(lambda r: r.sessions)
            listener.close()
            listener.close()
            assert len(there.losses) == 1
            await here.until(lambda r: r.losses)
            assert len(here.losses) == 1

    asyncio.run(main())


def test_dialling_where_nobody_listens_fails(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            here = Recorder()
            endpoint = world.endpoint().replace("*", "1")
            with pytest.raises(PeerLost):
                await world.bus(ROUTER).dial(endpoint, here, timeout=0.05)
            assert here.sessions == []
            assert here.losses == []

    asyncio.run(main())


def test_an_address_is_had_once(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            engine = world.bus(ENGINE)
            listener = await engine.listen(world.endpoint(), Recorder())
            if kind != "ipc":  # libzmq takes an ipc path over, so that a file left by a crash is no obstacle
                with pytest.raises(ConfigError, match="cannot listen"):
                    await world.bus(Peer("engine", "b", 1)).listen(listener.endpoint, Recorder())
            listener.close()

    asyncio.run(main())


def test_a_second_dial_of_one_incarnation_replaces_the_first(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, first, second = Recorder(), Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            await router.dial(listener.endpoint, first)
            session = await router.dial(listener.endpoint, second)
            await there.until(lambda r: len(r.sessions) == 2 and r.losses)
            assert there.losses[0][0] is there.sessions[0]
            await first.until(lambda r: r.losses)
            session.send(Call(id=1, body=Stats()))
            await there.until(lambda r: r.messages)
            assert second.losses == []
            assert engine.statistics().sessions == 1

    asyncio.run(main())


def test_a_new_epoch_ends_the_old_session_and_an_old_epoch_is_refused(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, old, new, late = Recorder(), Recorder(), Recorder(), Recorder()
            engine = world.bus(ENGINE)
            listener = await engine.listen(world.endpoint(), there)
            await world.bus(Peer("router", "r", 1)).dial(listener.endpoint, old)
            await world.bus(Peer("router", "r", 2)).dial(listener.endpoint, new)
            await there.until(lambda r: len(r.sessions) == 2 and r.losses)
            assert there.losses[0][0] is there.sessions[0]
            assert "began another session" in there.losses[0][1].message
            await old.until(lambda r: r.losses)
            with pytest.raises(PeerLost, match="newer router"):
                await world.bus(Peer("router", "r", 1)).dial(listener.endpoint, late)
            assert new.losses == []
            assert late.sessions == []

    asyncio.run(main())


def test_a_restarted_listener_does_not_inherit_sessions(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            here, there, again = Recorder(), Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            await router.dial(listener.endpoint, here)
            await engine.close()
            restarted = world.bus(Peer("engine", "a", ENGINE.epoch + 1))
            second = await restarted.listen(listener.endpoint, again)
            await here.until(lambda r: r.losses)
            assert again.sessions == []
            session = await router.dial(second.endpoint, here)
            assert session.peer.epoch == ENGINE.epoch + 1

    asyncio.run(main())


def test_too_large_a_message_is_refused_and_changes_nothing(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, here = Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            session = await router.dial(listener.endpoint, here)
            huge = Call(id=1, body=Tokenize(text="x" * (MAX_MESSAGE_BYTES + 1)))
            with pytest.raises(TooLarge):
                session.send(huge)
            session.send(Call(id=2, body=Stats()))
            await there.until(lambda r: r.messages)
            assert there.messages == [Call(id=2, body=Stats())]
            assert router.statistics().oversized == 1

    asyncio.run(main())


def test_a_large_message_crosses(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, here = Recorder(), Recorder()
            engine, router = world.bus(ENGINE, max_queue_bytes=1 << 26), world.bus(ROUTER, max_queue_bytes=1 << 26)
            listener = await engine.listen(world.endpoint(), there)
            session = await router.dial(listener.endpoint, here)
            reply = Reply(id=1, body=Tokenized(ids=bytes(range(256)) * (1 << 14)))
            session.send(reply)
            await there.until(lambda r: r.messages)
            assert there.messages == [reply]

    asyncio.run(main())


class Broken(Recorder):
    """Fails at everything, after having recorded it."""

    def opened(self, session: Session) -> None:
        super().opened(session)
        raise RuntimeError("opened")

    def received(self, session: Session, message: RpcMessage) -> None:
        super().received(session, message)
        raise RuntimeError("received")

    def lost(self, session: Session, error: MicroserveError) -> None:
        super().lost(session, error)
        raise RuntimeError("lost")


def test_a_handler_that_fails_harms_nobody(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own: what it holds back of a flood, other tests may have caused.
    monkeypatch.setattr("microserve.runtime.session._log", get_logger("microserve.runtime.session"))

    async def main() -> None:
        async with World(kind) as world:
            there, here = Broken(), Broken()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            session = await router.dial(listener.endpoint, here)
            session.send(Cancel(id=1))
            session.send(Cancel(id=2))
            await there.until(lambda r: len(r.messages) == 2)
            session.close()
            await there.until(lambda r: r.losses)
            assert len(here.losses) == 1

    asyncio.run(main())
    # The first of six; the others are held back.
    assert caplog.messages.count("handler failed") == 1


def test_handlers_may_end_sessions_and_listeners(kind: str) -> None:
    class Ending(Recorder):
        listener: Listener

        def received(self, session: Session, message: RpcMessage) -> None:
            super().received(session, message)
            session.close("had enough")
            if isinstance(message, Cancel):
                self.listener.close()

    async def main() -> None:
        async with World(kind) as world:
            there, here = Ending(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = there.listener = await engine.listen(world.endpoint(), there)
            session = await router.dial(listener.endpoint, here)
            session.send(Call(id=1, body=Stats()))
            session.send(Call(id=2, body=Stats()))
            await here.until(lambda r: r.losses)
            assert len(there.messages) == 1
            session = await router.dial(listener.endpoint, here)
            session.send(Cancel(id=1))
            await here.until(lambda r: len(r.losses) == 2)

    asyncio.run(main())


def test_events_reach_every_subscriber_until_it_closes(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            engine, router, other = world.bus(ENGINE), world.bus(ROUTER), world.bus(Peer("router", "s", 1))
            publisher = await engine.publisher(world.endpoint())
            signal = Signal()
            first: list[EngineEvent] = []
            second: list[EngineEvent] = []

            def receive_first(event: EngineEvent) -> None:
                first.append(event)
                signal.set()

            def receive_second(event: EngineEvent) -> None:
                second.append(event)
                signal.set()
                raise RuntimeError("a receiver's bug")

            subscription = await router.subscribe(publisher.endpoint, receive_first)
            await other.subscribe(publisher.endpoint, receive_second)
            # Subscribing takes effect some time after it was asked for: publish until both have heard.
            seq = 0
            while not (first and second):
                seq += 1
                publisher.publish(event(seq))
                await asyncio.wait([asyncio.ensure_future(signal.until(lambda: first and second))], timeout=0.01)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
            last = event(seq + 1)
            publisher.publish(last)
            await signal.until(lambda: first[-1] == last and second[-1] == last)
            assert [e.seq for e in first] == list(range(first[0].seq, seq + 2))
            subscription.close()
            subscription.close()
            final = event(seq + 2)
            publisher.publish(final)
            await signal.until(lambda: second[-1] == final)
            assert first[-1] == last
            publisher.close()
            publisher.close()

    asyncio.run(main())


def test_a_closed_bus_refuses(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            bus = world.bus(ENGINE)
            await bus.close()
            await bus.close()
            with pytest.raises(PeerLost):
                await bus.listen(world.endpoint(), Recorder())
            with pytest.raises(PeerLost):
                await bus.dial(world.endpoint(), Recorder())
            with pytest.raises(PeerLost):
                await bus.publisher(world.endpoint())

    asyncio.run(main())


def test_a_dial_that_is_cancelled_leaves_nothing(kind: str) -> None:
    async def main() -> None:
        async with World(kind) as world:
            there, here = Recorder(), Recorder()
            engine, router = world.bus(ENGINE), world.bus(ROUTER)
            listener = await engine.listen(world.endpoint(), there)
            dial = asyncio.ensure_future(router.dial(listener.endpoint, here))
            await asyncio.sleep(0)
            dial.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dial
            assert here.sessions == []
            session = await router.dial(listener.endpoint, here)
            session.send(Cancel(id=1))
            await there.until(lambda r: r.messages)
            assert router.statistics().sessions == 1

    asyncio.run(main())


# --- faults --------------------------------------------------------------------------------------------------------


class Pair:
    """An engine that listens and a router that dialled it, in a network that may fail."""

    def __init__(self, max_queue_bytes: int = 1 << 20) -> None:
        self.network = MemoryNetwork()
        self.engine = self.network.bus(ENGINE, max_queue_bytes=max_queue_bytes)
        self.router = self.network.bus(ROUTER, max_queue_bytes=max_queue_bytes)
        self.there = Recorder()
        self.here = Recorder()

    async def open(self) -> Session:
        self.listener = await self.engine.listen("memory://engine", self.there)
        return await self.router.dial("memory://engine", self.here)

    async def close(self) -> None:
        await self.router.close()
        await self.engine.close()
        assert self.engine.statistics().sessions == self.router.statistics().sessions == 0
        assert len(self.there.losses) == len(self.there.sessions)
        assert len(self.here.losses) == len(self.here.sessions)


def test_an_idle_session_lives_by_heartbeats() -> None:
    async def main() -> None:
        pair = Pair()
        await pair.open()
        await pair.network.advance(60)
        assert pair.here.losses == pair.there.losses == []
        # Hello, and at most a ping and a pong a second.
        assert 60 <= pair.router.statistics().sent <= 121
        await pair.close()

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [0.25, 1.25, 2.0])
def test_a_round_trip_is_that_of_its_own_ping(seconds: float) -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        assert session.round_trip is None
        # Longer than the time between two pings, too.
        pair.network.delay(ROUTER, ENGINE, seconds)
        await pair.network.advance(12)
        assert session.round_trip == pytest.approx(seconds, abs=0.11)
        await pair.close()

    asyncio.run(main())


def test_silence_ends_the_session_on_both_sides_after_three_seconds() -> None:
    async def main() -> None:
        pair = Pair()
        await pair.open()
        pair.network.partition(ENGINE, ROUTER)
        await pair.network.advance(2.7)
        assert pair.here.losses == pair.there.losses == []
        await pair.network.advance(0.6)
        assert "nothing heard" in pair.here.losses[0][1].message
        assert "nothing heard" in pair.there.losses[0][1].message
        await pair.close()

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["drop", "duplicate"])
@pytest.mark.parametrize("towards", ["listener", "dialler"])
def test_a_lost_or_repeated_frame_ends_the_session_loudly(fault: str, towards: str) -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        source, target = (ROUTER, ENGINE) if towards == "listener" else (ENGINE, ROUTER)
        sender = session if towards == "listener" else pair.there.session
        getattr(pair.network, fault)(source, target, 1)
        sender.send(Cancel(id=1))
        sender.send(Cancel(id=2))
        await pair.network.settle()
        receiver = pair.there if towards == "listener" else pair.here
        assert receiver.messages == ([] if fault == "drop" else [Cancel(id=1)])
        assert len(pair.here.losses) == len(pair.there.losses) == 1
        got, expected = ("3", "2") if fault == "drop" else ("2", "3")
        assert f"expected {expected}, got {got}" in pair.here.losses[0][1].message
        assert f"expected {expected}, got {got}" in pair.there.losses[0][1].message
        gaps = pair.engine.statistics().sequence_gaps + pair.router.statistics().sequence_gaps
        assert gaps == 1
        await pair.close()

    asyncio.run(main())


def test_a_delay_shorter_than_silence_is_survived_in_order() -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        pair.network.delay(ROUTER, ENGINE, 2.0)
        for id in range(10):
            session.send(Cancel(id=id))
        await pair.network.advance(1.9)
        assert pair.there.messages == []
        await pair.network.advance(0.2)
        assert pair.there.messages == [Cancel(id=id) for id in range(10)]
        assert pair.here.losses == pair.there.losses == []
        await pair.close()

    asyncio.run(main())


def test_a_killed_process_is_noticed_at_once_and_hears_nothing() -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        pair.network.kill(ENGINE)
        session.send(Cancel(id=1))
        await pair.network.settle()
        assert "broke" in pair.here.losses[0][1].message
        assert pair.there.losses == []
        assert pair.there.messages == []
        await pair.router.close()
        await pair.engine.close()
        pair = Pair()
        await pair.open()
        pair.network.kill(ROUTER)
        await pair.network.settle()
        assert len(pair.there.losses) == 1
        await pair.close()

    asyncio.run(main())


def test_a_machine_that_loses_power_is_noticed_by_its_silence() -> None:
    async def main() -> None:
        pair = Pair()
        await pair.open()
        pair.network.kill(ENGINE, silently=True)
        await pair.network.advance(2.7)
        assert pair.here.losses == []
        await pair.network.advance(0.6)
        assert len(pair.here.losses) == 1
        await pair.close()

    asyncio.run(main())


def test_what_finds_no_room_waits_and_goes_when_there_is_room() -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        pair.network.stall(ROUTER, ENGINE)
        for id in range(100):
            session.send(Cancel(id=id))
        await pair.network.settle()
        assert pair.there.messages == []
        pair.network.unstall(ROUTER, ENGINE)
        await pair.network.settle()
        assert pair.there.messages == [Cancel(id=id) for id in range(100)]
        await pair.close()

    asyncio.run(main())


@pytest.mark.parametrize("who", ["dialler", "listener"])
def test_a_full_queue_ends_the_session_loudly(who: str) -> None:
    async def main() -> None:
        pair = Pair(max_queue_bytes=1000)
        session = await pair.open()
        source, target = (ROUTER, ENGINE) if who == "dialler" else (ENGINE, ROUTER)
        sender, mine, theirs = (
            (session, pair.here, pair.there) if who == "dialler" else (pair.there.session, pair.there, pair.here)
        )
        pair.network.stall(source, target)
        size = len(pack(Cancel(id=1), 1))
        for _ in range(1000 // size):
            sender.send(Cancel(id=1))
        with pytest.raises(PeerLost, match="too slowly"):
            sender.send(Cancel(id=1))
        assert len(mine.losses) == 1
        bus = pair.router if who == "dialler" else pair.engine
        assert bus.statistics().overflows == 1
        pair.network.unstall(source, target)
        await pair.network.advance(2)
        assert len(theirs.losses) == 1, "the other side learns of it"
        assert theirs.messages == []
        await pair.close()

    asyncio.run(main())


def test_nonsense_on_an_open_session_gets_a_typed_failure() -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        version = pack(Ping(), 2)
        pair.network.inject(ROUTER, ENGINE, b"")
        pair.network.inject(ROUTER, ENGINE, b"\x07" + version[1:])
        pair.network.inject(ROUTER, ENGINE, version[:9] + b"\xc1nonsense")
        pair.network.inject(ROUTER, ENGINE, pack(event(1), 3))
        unknown_verb = pack(Call(id=42, body=Stats()), 4).replace(b"stats", b"statz")
        pair.network.inject(ROUTER, ENGINE, unknown_verb)
        await pair.network.settle()
        failures = [m for m in pair.here.messages if isinstance(m, Failure)]
        assert [(f.id, f.error.code) for f in failures] == [
            (None, "protocol_error"),
            (None, "version_mismatch"),
            (None, "protocol_error"),
            (None, "protocol_error"),
            (42, "protocol_error"),
        ]
        assert pair.engine.statistics().malformed == 4
        assert pair.engine.statistics().unknown_version == 1
        received = pair.engine.statistics().received
        pair.network.inject(ROUTER, ENGINE, pack(Call(id=43, body=CachePin(prompt=b"", ttl=0)), 5))
        await pair.network.settle()
        refused = [m for m in pair.here.messages if isinstance(m, Failure)][-1]
        assert (refused.id, refused.error.code, refused.error.param) == (43, "invalid_request", "ttl")
        assert pair.engine.statistics().malformed == 4, "the frame made sense"
        assert pair.engine.statistics().received == received + 1
        assert not session.closed
        await pair.close()

    asyncio.run(main())


def test_an_answer_that_cannot_be_read_fails_its_call() -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        # The session's own reply, with a tag that nobody knows; the dialling side reads it.
        for number, message in enumerate((Reply(id=5, body=Ok()), Failure(id=6, error=ErrorInfo("busy", "x")))):
            frame = pack(message, 2 + number).replace(b"\xa2ok", b"\xa2ko").replace(b"busy", b"\xff\xff\xff\xff")
            session.receive(frame)  # type: ignore[attr-defined]
        assert [(m.id, m.error.code) for m in pair.here.messages if isinstance(m, Failure)] == [
            (5, "protocol_error"),
            (6, "protocol_error"),
        ]
        assert not session.closed
        batch = pack(Reply(id=1, body=Ok()), 4)[:9] + b"\x82\xa1t\xa5batch\xa5items\x91\x80"
        session.receive(batch)  # type: ignore[attr-defined]
        assert session.closed, "the answers in it are lost, so their calls must end"
        await pair.close()

    asyncio.run(main())


def test_a_frame_of_a_stranger_is_answered_with_a_goodbye() -> None:
    async def main() -> None:
        pair = Pair()
        session = await pair.open()
        # The listening side forgets the session as a restarted process would.
        pair.there.session.close("forget")
        pair.network.drop(ENGINE, ROUTER, 1000)
        pair.network.inject(ROUTER, ENGINE, pack(Bye(), 9))
        pair.network.inject(ROUTER, ENGINE, b"\x01")
        session.send(Cancel(id=1))
        await pair.network.settle()
        assert pair.engine.statistics().strays == 2
        assert pair.engine.statistics().malformed == 1
        await pair.close()

    asyncio.run(main())


def test_a_greeting_that_gets_no_answer_times_out() -> None:
    async def main() -> None:
        pair = Pair()
        pair.network.drop(ENGINE, ROUTER, 100)
        dial = asyncio.ensure_future(pair.open())
        await pair.network.advance(5.5)
        with pytest.raises(PeerLost, match="no answer"):
            await dial
        await pair.close()

    asyncio.run(main())
