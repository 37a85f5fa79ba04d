"""Membership: joining, restarting, silence, leaving, in any order, in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.virtual_time import run_virtual

from microserve.runtime.clock import ManualClock
from microserve.runtime.errors import InvalidRequest, NotFound
from microserve.runtime.ids import Peer
from microserve.runtime.membership import Announcer, Change, Roster, RosterEvent
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import Announce, EngineInfo, Heartbeat, Layout, Leave, Load, ModelInfo, Ok
from microserve.runtime.rpc import IncomingCall, RpcServer

ROUTER = "memory://router"


def engine_info(name: str = "a", epoch: int = 1, **changes: object) -> EngineInfo:
    info = EngineInfo(
        engine_id=name,
        epoch=epoch,
        endpoint=f"memory://{name}",
        events_endpoint=f"memory://{name}-events",
        model=ModelInfo(name="m", revision="r", architecture="fake", vocab_size=10, max_context=100),
        layout=Layout(model_revision="r", dtype="float32", page_size=16, layers=1, kv_heads=1, head_dim=1),
        executor="fake",
        max_running=4,
    )
    return msgspec.structs.replace(info, **changes)


def changes(events: list[RosterEvent]) -> list[Change]:
    return [event.change for event in events]


# --- roster --------------------------------------------------------------------------------------------------------


def make_roster() -> tuple[Roster, ManualClock]:
    clock = ManualClock()
    return Roster(silence=3.0, forget=60.0, clock=clock), clock


def test_an_engine_joins_and_leaves() -> None:
    roster, _ = make_roster()
    info, load = engine_info(), Load(running=2)
    assert roster.announce(info, load) == [RosterEvent(Change.JOINED, info, load)]
    assert [member.info for member in roster.members()] == [info]
    assert roster.leave("a", 1) == [RosterEvent(Change.LEFT, info, load)]
    assert roster.members() == []
    assert roster.leave("a", 1) == []


def test_heartbeats_carry_the_load() -> None:
    roster, _ = make_roster()
    roster.announce(engine_info(), Load())
    assert roster.heartbeat("a", 1, Load(running=3)) == []
    member = roster.get("a")
    assert member is not None
    assert member.load == Load(running=3)


def test_announcing_again_changes_nothing_unless_the_facts_changed() -> None:
    roster, _ = make_roster()
    roster.announce(engine_info(), Load())
    assert roster.announce(engine_info(), Load()) == []
    assert changes(roster.announce(engine_info(endpoint="memory://b"), Load())) == [Change.UPDATED]


def test_a_restarted_engine_is_a_new_epoch_and_the_old_one_is_over() -> None:
    roster, _ = make_roster()
    roster.announce(engine_info(epoch=1), Load(running=1))
    assert changes(roster.announce(engine_info(epoch=2), Load())) == [Change.RESTARTED]
    with pytest.raises(InvalidRequest, match="epoch 1 is over"):
        roster.announce(engine_info(epoch=1), Load())
    with pytest.raises(NotFound):
        roster.heartbeat("a", 1, Load(running=9))
    assert roster.leave("a", 1) == []
    assert roster.suspect("a", 1) == []
    member = roster.get("a")
    assert member is not None
    assert (member.info.epoch, member.load) == (2, Load())


def test_a_late_announcement_does_not_bring_back_who_left() -> None:
    roster, _ = make_roster()
    roster.announce(engine_info(epoch=5), Load())
    roster.leave("a", 5)
    with pytest.raises(InvalidRequest):
        roster.announce(engine_info(epoch=5), Load())
    assert changes(roster.announce(engine_info(epoch=6), Load())) == [Change.JOINED]


def test_an_unknown_engine_is_asked_to_announce_itself() -> None:
    roster, _ = make_roster()
    with pytest.raises(NotFound, match="announce it"):
        roster.heartbeat("a", 1, Load())


def test_silence_is_noticed_once_and_a_heartbeat_ends_it() -> None:
    roster, clock = make_roster()
    roster.announce(engine_info(), Load())
    clock.advance(2.9)
    assert roster.sweep() == []
    clock.advance(0.1)
    assert changes(roster.sweep()) == [Change.SILENT]
    assert roster.sweep() == []
    assert changes(roster.heartbeat("a", 1, Load())) == [Change.BACK]
    assert roster.heartbeat("a", 1, Load()) == []


def test_a_silent_engine_comes_back_by_announcing_too() -> None:
    roster, _ = make_roster()
    roster.announce(engine_info(), Load())
    assert changes(roster.suspect("a", 1)) == [Change.SILENT]
    assert roster.suspect("a", 1) == []
    assert changes(roster.announce(engine_info(), Load())) == [Change.BACK]


def test_an_engine_that_stays_silent_is_forgotten_and_may_join_again() -> None:
    roster, clock = make_roster()
    roster.announce(engine_info(), Load())
    clock.advance(3.0)
    roster.sweep()
    clock.advance(57.0)
    assert changes(roster.sweep()) == [Change.LEFT]
    assert changes(roster.announce(engine_info(), Load())) == [Change.JOINED]


def test_the_next_sweep_is_when_something_can_change() -> None:
    roster, clock = make_roster()
    assert roster.next_sweep() is None
    roster.announce(engine_info("a"), Load())
    clock.advance(1.0)
    roster.announce(engine_info("b"), Load())
    assert roster.next_sweep() == pytest.approx(2.0)
    clock.advance(2.0)
    assert roster.next_sweep() == 0.0
    assert [event.info.engine_id for event in roster.sweep()] == ["a"]
    assert roster.next_sweep() == pytest.approx(1.0)


MOVES = st.one_of(
    st.tuples(st.just("announce"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.just("heartbeat"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.just("leave"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.just("suspect"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 70)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(MOVES, max_size=40))
def test_events_tell_the_whole_story(moves: list[tuple[str, str, int]]) -> None:
    """Whoever only follows the events knows exactly what the roster knows; epochs never go back."""
    roster, clock = make_roster()
    told: dict[str, tuple[int, bool]] = {}
    newest: dict[str, int] = {}
    for move, name, number in moves:
        events: list[RosterEvent] = []
        try:
            if move == "wait":
                clock.advance(number)
                events = roster.sweep()
            elif move == "announce":
                events = roster.announce(engine_info(name, number), Load())
            elif move == "heartbeat":
                events = roster.heartbeat(name, number, Load())
            elif move == "leave":
                events = roster.leave(name, number)
            else:
                events = roster.suspect(name, number)
        except (InvalidRequest, NotFound):
            assert told.get(name, (0, False))[0] != number or newest.get(name, 0) > number
        for event in events:
            who, epoch = event.info.engine_id, event.info.epoch
            assert epoch >= newest.get(who, 0)
            newest[who] = epoch
            if event.change is Change.LEFT:
                del told[who]
            elif event.change is Change.JOINED:
                assert who not in told
                told[who] = (epoch, False)
            elif event.change is Change.RESTARTED:
                assert told[who][0] < epoch
                told[who] = (epoch, False)
            else:
                assert told[who][0] == epoch
                told[who] = (epoch, event.change is Change.SILENT or (event.change is Change.UPDATED and told[who][1]))
        assert told == {member.info.engine_id: (member.info.epoch, member.silent) for member in roster.members()}


# --- announcer -----------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A network, with a router's side that keeps a roster and what it was told."""

    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    events: list[tuple[Change, int]] = field(default_factory=list)
    heartbeats: list[Load] = field(default_factory=list)

    async def router(self, epoch: int = 1, endpoint: str = ROUTER) -> Peer:
        peer = Peer("router", endpoint.removeprefix("memory://"), epoch)
        roster = Roster(silence=3.0, clock=self.network.clock)

        def handle(call: IncomingCall) -> None:
            body = call.body
            if isinstance(body, Announce):
                events = roster.announce(body.info, body.load)
            elif isinstance(body, Heartbeat):
                self.heartbeats.append(body.load)
                events = roster.heartbeat(body.engine_id, body.epoch, body.load)
            else:
                assert isinstance(body, Leave)
                events = roster.leave(body.engine_id, body.epoch)
            self.events.extend((event.change, event.info.epoch) for event in events)
            call.reply(Ok())

        await self.network.bus(peer).listen(endpoint, RpcServer(handle, clock=self.network.clock))
        return peer

    def engine(self, epoch: int = 1, routers: tuple[str, ...] = (ROUTER,)) -> tuple[Announcer, Peer, list[Load]]:
        peer = Peer("engine", "a", epoch)
        load = [Load()]
        bus = self.network.bus(peer)
        return Announcer(bus, routers, lambda: engine_info(epoch=epoch), lambda: load[0]), peer, load

    async def wait(self, seconds: float) -> None:
        """The network's clock and the loop's move together."""
        for _ in range(round(seconds * 10)):
            await self.network.advance(0.1)
            await asyncio.sleep(0.1)
        await self.network.settle()

    async def close(self) -> None:
        for bus in list(self.network.buses):
            await bus.close()


def test_engine_after_router() -> None:
    async def scenario() -> None:
        scene = Scene()
        await scene.router()
        announcer, _, load = scene.engine()
        announcer.start()
        await scene.wait(0.2)
        assert scene.events == [(Change.JOINED, 1)]
        assert list(announcer.announced) == [ROUTER]
        load[0] = Load(running=3)
        await scene.wait(2.5)
        assert scene.heartbeats == [Load(running=3)] * 2
        await announcer.leave()
        await announcer.leave()
        assert scene.events == [(Change.JOINED, 1), (Change.LEFT, 1)]
        await scene.close()

    run_virtual(scenario())


def test_engine_before_router() -> None:
    async def scenario() -> None:
        scene = Scene()
        announcer, _, _ = scene.engine()
        announcer.start()
        await scene.wait(30)
        assert not announcer.announced
        await scene.router()
        await scene.wait(6)
        assert scene.events == [(Change.JOINED, 1)]
        await announcer.leave()
        await scene.close()

    run_virtual(scenario())


def test_a_change_of_state_is_told_at_once() -> None:
    async def scenario() -> None:
        scene = Scene()
        await scene.router()
        announcer, _, load = scene.engine()
        announcer.start()
        await scene.wait(0.2)
        load[0] = Load(state="draining")
        announcer.changed()
        await scene.wait(0.1)
        assert scene.heartbeats == [Load(state="draining")]
        await announcer.leave()
        await scene.close()

    run_virtual(scenario())


@pytest.mark.parametrize("silently", [False, True])
def test_a_restarted_router_is_announced_to_again(silently: bool) -> None:
    async def scenario() -> None:
        scene = Scene()
        first = await scene.router(epoch=1)
        announcer, _, _ = scene.engine()
        announcer.start()
        await scene.wait(1)
        scene.network.kill(first, silently=silently)
        await scene.wait(8)
        assert not announcer.announced
        await scene.router(epoch=2)
        await scene.wait(6)
        assert scene.events == [(Change.JOINED, 1), (Change.JOINED, 1)]
        assert list(announcer.announced) == [ROUTER]
        await announcer.leave()
        await scene.close()

    run_virtual(scenario())


def test_a_restarted_engine_replaces_the_old_one() -> None:
    async def scenario() -> None:
        scene = Scene()
        await scene.router()
        old, peer, _ = scene.engine(epoch=1)
        old.start()
        await scene.wait(1)
        scene.network.kill(peer)
        new, _, _ = scene.engine(epoch=2)
        new.start()
        await scene.wait(1)
        assert scene.events == [(Change.JOINED, 1), (Change.RESTARTED, 2)]
        await old.leave()
        await new.leave()
        assert scene.events[2:] == [(Change.LEFT, 2)]
        await scene.close()

    run_virtual(scenario())


def test_a_router_that_forgot_the_engine_is_told_again() -> None:
    async def scenario() -> None:
        scene = Scene()
        seen: list[str] = []

        def forgetful(call: IncomingCall) -> None:
            seen.append(type(call.body).__name__)
            if isinstance(call.body, Heartbeat):
                raise NotFound("who?")
            call.reply(Ok())

        bus = scene.network.bus(Peer("router", "router", 1))
        await bus.listen(ROUTER, RpcServer(forgetful, clock=scene.network.clock))
        announcer, _, _ = scene.engine()
        announcer.start()
        await scene.wait(2.5)
        assert seen == ["Announce", "Heartbeat", "Announce", "Heartbeat", "Announce"]
        await announcer.leave()
        await scene.close()

    run_virtual(scenario())


def test_every_router_is_told_and_one_that_is_missing_holds_up_nobody() -> None:
    async def scenario() -> None:
        scene = Scene()
        await scene.router(endpoint="memory://r1")
        await scene.router(endpoint="memory://r2")
        announcer, _, _ = scene.engine(routers=("memory://r1", "memory://missing", "memory://r2", "memory://r1"))
        announcer.start()
        await scene.wait(0.5)
        assert sorted(announcer.announced) == ["memory://r1", "memory://r2"]
        assert scene.events == [(Change.JOINED, 1)] * 2
        await announcer.leave()
        assert scene.events[2:] == [(Change.LEFT, 1)] * 2
        await scene.close()

    run_virtual(scenario())


def test_leaving_does_not_wait_for_a_router_that_hangs() -> None:
    async def scenario() -> None:
        scene = Scene()
        router = await scene.router()
        announcer, peer, _ = scene.engine()
        announcer.start()
        await scene.wait(1)
        scene.network.partition(router, peer)
        before = asyncio.get_running_loop().time()
        await announcer.leave()
        assert asyncio.get_running_loop().time() - before <= 1.0 + 1e-6
        await scene.close()

    run_virtual(scenario())
