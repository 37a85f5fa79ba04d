"""The fleet: sessions that come back, engines that come and go, and the choice of the least loaded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.router_support import CONTEXT, ScriptedEngine, World, engine_info
from tests.virtual_time import run_virtual

from microserve.router.dispatch import State
from microserve.router.fleet import EngineFleet
from microserve.router.link import REQUEST_TOKENS, Charge, EngineLink
from microserve.runtime.errors import InternalError, NoEngine, PeerLost
from microserve.runtime.ids import Peer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import Load

if TYPE_CHECKING:
    from microserve.runtime.messages import ModelInfo


def states(world: World) -> dict[str, str]:
    return {engine.info.engine_id: engine.state for engine in world.core.fleet.snapshot()}


def test_an_engine_can_be_picked_once_there_is_a_session_with_it() -> None:
    async def main() -> None:
        async with World() as world:
            engine = ScriptedEngine(world.network, engine_info("a"))
            world.engines["a"] = engine
            world.core.announce(engine.info, Load())
            await world.settle()
            assert states(world) == {"a": "connecting"}
            with pytest.raises(NoEngine):
                world.core.fleet.pick("m")
            await engine.listen()
            # Its port is open now; the next attempt, with growing pauses of at most two seconds, finds it.
            await asyncio.sleep(2.0)
            await world.settle()
            assert states(world) == {"a": "ready"}
            assert world.core.fleet.pick("m").id == "a"

    run_virtual(main())


def test_a_lost_session_is_noticed_at_once_and_dialled_again() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            link = world.core.fleet.links[0]
            assert link.client is not None
            link.client.close("test")
            assert not link.pickable
            await world.settle()
            assert link.pickable
            generation = world.generate()
            await world.settle()
            assert len(engine.calls) == 1
            generation.cancel()

    run_virtual(main())


def test_a_restarted_engine_is_another_one() -> None:
    async def main() -> None:
        async with World() as world:
            old = await world.add("a", epoch=1)
            generation = world.generate()
            await world.settle()
            await old.tokens(5)
            new = await world.add("a", epoch=2)
            assert (await anext(generation)).tokens == [5]
            with pytest.raises(Exception, match="new incarnation"):
                await anext(generation)
            assert world.charges() == {"a": (0, 0)}
            other = world.generate()
            await world.settle()
            assert (len(old.calls), len(new.calls)) == (1, 1)
            other.cancel()
            await old.bus.close()

    run_virtual(main())


def test_a_stranger_at_the_endpoint_is_not_used() -> None:
    async def main() -> None:
        async with World() as world:
            stranger = ScriptedEngine(world.network, engine_info("b", endpoint="memory://shared"))
            world.engines["b"] = stranger
            await stranger.listen()
            world.core.announce(engine_info("a", endpoint="memory://shared"), Load())
            await world.settle()
            assert states(world) == {"a": "connecting"}

    run_virtual(main())


def test_silence_and_return() -> None:
    async def main() -> None:
        async with World(engine_silence=3.0) as world:
            await world.add("a")
            world.core.start()
            await asyncio.sleep(4.0)
            assert states(world) == {"a": "silent"}
            assert world.core.models() == []
            with pytest.raises(NoEngine):
                world.generate()
            world.core.heartbeat("a", 1, Load())
            assert states(world) == {"a": "ready"}
            assert [model.name for model in world.core.models()] == ["m"]

    run_virtual(main())


@pytest.mark.parametrize(
    ("state", "pickable"), [("ready", True), ("degraded", True), ("starting", False), ("draining", False)]
)
def test_the_engines_own_state_counts(state: str, pickable: bool) -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a", load=Load(state=state))
            assert states(world) == {"a": state}
            assert [link.id for link in world.core.fleet.candidates("m")] == (["a"] if pickable else [])

    run_virtual(main())


def test_an_engine_that_leaves_is_gone() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            world.core.leave("a", 1)
            assert states(world) == {}
            with pytest.raises(NoEngine):
                world.generate()

    run_virtual(main())


def test_a_goodbye_that_overtakes_the_last_answers_ends_nothing() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.tokens(5)
            # Over another session than the answers, so it may come first.
            world.core.leave("a", 1)
            assert states(world) == {}
            with pytest.raises(NoEngine):
                world.generate()
            await engine.tokens(6)
            await engine.finish()
            assert [token async for chunk in generation for token in chunk.tokens] == [5, 6]
            await engine.bus.close()
            await world.settle()
            assert [engine.open, asyncio.all_tasks() - {asyncio.current_task()}] == [[], set()]

    run_virtual(main())


def test_an_engine_that_left_is_not_waited_for_long() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.tokens(5)
            assert (await anext(generation)).tokens == [5]
            world.core.leave("a", 1)
            await asyncio.sleep(2.9)
            assert generation.state is State.RUNNING
            await asyncio.sleep(0.2)
            with pytest.raises(PeerLost, match="it left"):
                await anext(generation)
            await world.settle()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_a_router_that_stops_lets_go_of_engines_that_left() -> None:
    async def main() -> None:
        world = World()
        async with world:
            await world.add("a")
            generation = world.generate()
            await world.settle()
            world.core.leave("a", 1)
            generation.cancel()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_pick_prefers_labels_and_avoids_what_it_is_told() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a", labels={"prefill": "yes", "zone": "x"})
            await world.add("b", labels={"prefill": "no", "zone": "y"})
            await world.add("c", model="other")
            fleet = world.core.fleet
            assert [fleet.pick("m", "prefill").id for _ in range(3)] == ["a", "a", "a"]
            assert fleet.pick("m", "zone=y").id == "b"
            # No engine has a fixed role: a label that nobody carries leaves all of them.
            assert {fleet.pick("m", "decode").id for _ in range(2)} == {"a", "b"}
            assert fleet.pick("m", avoid={"a"}).id == "b"
            assert fleet.pick("other").id == "c"
            with pytest.raises(NoEngine) as caught:
                fleet.pick("m", avoid={"a", "b"})
            assert caught.value.retry_after == 1.0

    run_virtual(main())


def test_one_name_is_one_model_at_a_time() -> None:
    async def main() -> None:
        async with World() as world:
            fleet = world.core.fleet

            def picked() -> set[str]:
                return {fleet.pick("m").id for _ in range(4)}

            await world.add("a")
            await world.add("c", revision="2", max_context=50)
            assert picked() == {"a"}
            await world.add("b")
            assert (picked(), [model.max_context for model in fleet.models()]) == ({"a", "b"}, [CONTEXT])
            with pytest.raises(NoEngine):
                fleet.pick("m", avoid={"a", "b"})
            await world.add("d", revision="2")
            await world.add("e", revision="2")
            assert (picked(), [model.max_context for model in fleet.models()]) == ({"c", "d", "e"}, [50])
            for name in "cde":
                world.core.leave(name, 1)
            assert picked() == {"a", "b"}

    run_virtual(main())


def test_a_degraded_engine_is_the_last_resort() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a", load=Load(state="degraded"))
            await world.add("b", load=Load(running=50))
            assert world.core.fleet.pick("m").id == "b"
            assert world.core.fleet.pick("m", avoid={"b"}).id == "a"

    run_virtual(main())


def test_preparation_comes_before_the_first_pick() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        engine = ScriptedEngine(network, engine_info("a"))
        await engine.listen()
        prepared: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked: list[str] = []

        async def prepare(model: ModelInfo) -> None:
            asked.append(model.name)
            await prepared

        bus = network.bus(Peer("router", "r", 1))
        fleet = EngineFleet(bus, prepare=prepare, clock=network.clock)
        fleet.join(engine.info, Load())
        await network.settle()
        assert (asked, fleet.models()) == (["m"], [])
        prepared.set_result(None)
        await network.settle()
        assert [model.name for model in fleet.models()] == ["m"]
        await fleet.close()
        await bus.close()
        await engine.bus.close()

    run_virtual(main())


# --- the weight of work --------------------------------------------------------------------------------------------


def link(**load: Any) -> EngineLink:
    return EngineLink(engine_info("a"), Load(**load), 0.0)


def test_charges_weigh_until_they_are_released() -> None:
    engine = link()
    charge = Charge(engine, 100)
    assert engine.work == 100 + REQUEST_TOKENS
    charge.expect(0)
    charge.expect(0)
    assert engine.work == REQUEST_TOKENS
    charge.release()
    charge.release()
    assert (engine.work, engine.charged_requests) == (0, 0)


def test_what_an_engine_reports_is_ours_or_others() -> None:
    engine = link(running=2, waiting=1, queued_tokens=50)
    assert engine.work == 50 + 3 * REQUEST_TOKENS
    charge = Charge(engine, 20)
    engine.report(Load(running=3, waiting=1, queued_tokens=70), 1.0)
    # One of the four requests and 20 of the tokens are those that we are charged with already.
    assert engine.work == 70 + 4 * REQUEST_TOKENS
    # Given back at once, and not counted as somebody else's until the next report.
    charge.release()
    assert engine.work == 50 + 3 * REQUEST_TOKENS


def test_a_full_pool_weighs_more() -> None:
    empty = link(total_pages=100, free_pages=50, cached_pages=50)
    full = link(total_pages=100, free_pages=5, cached_pages=5, owned_pages=90)
    assert empty.work == 0
    assert full.work == pytest.approx(REQUEST_TOKENS * 2)


def test_a_charge_given_back_twice_is_found_out() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            engine = world.core.fleet.links[0]
            engine.charged_requests = -1
            with pytest.raises(InternalError, match="engine a is charged with -1 requests"):
                world.core.fleet.check_integrity()
            engine.charged_requests = 0

    run_virtual(main())
