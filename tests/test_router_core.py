"""The core: which model, how much room, who may start, who waits, and who is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.router_support import CONTEXT, VOCABULARY, ScriptedEngine, World, engine_info, ids_of, read
from tests.virtual_time import run_virtual

from microserve.router.core import RouterCore
from microserve.router.dispatch import State
from microserve.router.metrics import RouterMetrics
from microserve.router.strategies.catalog import Catalog
from microserve.router.strategies.data_parallel import data_parallel
from microserve.router.strategy import Program
from microserve.router.versions import Versions
from microserve.runtime.config import RouterConfig
from microserve.runtime.errors import (
    Busy,
    CheckpointError,
    ContextLengthExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    MicroserveError,
    ModelNotFound,
    NoEngine,
    NotFound,
)
from microserve.runtime.ids import Peer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import Load


def test_models_by_name() -> None:
    async def main() -> None:
        async with World() as world:
            with pytest.raises(NoEngine):
                world.core.model("m")
            assert not world.core.ready
            await world.add("a", max_context=50)
            await world.add("b", max_context=40)
            await world.add("c", model="other")
            assert world.core.ready
            # Any engine of a name may be picked, so the shortest context is the model's.
            assert [(model.name, model.max_context) for model in world.core.models()] == [("m", 40), ("other", CONTEXT)]
            assert world.core.model("").name == "m"
            assert world.core.model("other").name == "other"
            with pytest.raises(ModelNotFound, match="model 'x' is not served here; there is: m, other") as caught:
                world.generate(model="x")
            assert caught.value.param == "model"
            world.core.leave("c", 1)
            with pytest.raises(ModelNotFound):
                world.core.model("other")

    run_virtual(main())


@pytest.mark.parametrize(
    ("prompt", "asked", "given"),
    [
        (10, None, CONTEXT - 10),
        (10, 5, 5),
        (10, CONTEXT - 10, CONTEXT - 10),
        (CONTEXT - 1, None, 1),
        (CONTEXT - 1, 1, 1),
    ],
)
def test_output_budget(prompt: int, asked: int | None, given: int) -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            assert world.core.output_budget(world.core.model("m"), prompt, asked) == given

    run_virtual(main())


@pytest.mark.parametrize(
    ("prompt", "asked", "param"),
    [(CONTEXT, None, "prompt"), (CONTEXT + 5, 1, "prompt"), (10, CONTEXT - 9, "max_tokens")],
)
def test_output_budget_refuses_what_does_not_fit(prompt: int, asked: int | None, param: str) -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            with pytest.raises(ContextLengthExceeded, match="maximum context length is 100 tokens") as caught:
                world.core.output_budget(world.core.model("m"), prompt, asked)
            assert caught.value.param == param

    run_virtual(main())


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ([], InvalidRequest),
        ([1] * CONTEXT, ContextLengthExceeded),
        ([1, -1], InvalidRequest),
        ([1, VOCABULARY], InvalidRequest),
    ],
)
def test_a_wrong_prompt_never_reaches_an_engine(prompt: list[int], kind: type[MicroserveError]) -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            with pytest.raises(kind):
                world.generate(prompt)
            await world.settle()
            assert engine.calls == []
            assert world.metric("refused_total", reason=kind.code) == 1

    run_virtual(main())


def test_max_tokens_is_clipped_to_the_context() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate([1] * 90, max_tokens=500, seed=3)
            await world.settle()
            assert engine.started().sampling.max_tokens == 10
            assert engine.started().sampling.seed == 3
            generation.cancel()

    run_virtual(main())


# --- admission -----------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_moves_in_order() -> None:
    async def main() -> None:
        async with World(max_active=2, max_queued=2) as world:
            engine = await world.add("a")
            assert not world.core.full
            generations = [world.generate(request_id=f"r{index}") for index in range(4)]
            assert world.core.full
            with pytest.raises(Busy) as caught:
                world.generate()
            assert caught.value.retry_after is not None
            assert 1.0 <= caught.value.retry_after <= 30.0
            await world.settle()
            assert [generation.state for generation in generations] == [State.RUNNING] * 2 + [State.QUEUED] * 2
            assert (world.metric("active"), world.metric("queued")) == (2, 2)
            await engine.finish(1, call=0)
            assert engine.started().request_id == "r2"
            generations[1].cancel()
            await world.settle()
            assert engine.started().request_id == "r3"
            for call in engine.open:
                await engine.finish(1, call=engine.calls.index(call))
            assert ids_of(await read(generations[3])) == [1]
            await world.core.wait_idle()

    run_virtual(main())


def test_a_place_in_the_queue_lasts_so_long() -> None:
    async def main() -> None:
        async with World(max_active=1, max_queued=1, queue_timeout=10.0) as world:
            engine = await world.add("a")
            first, second = world.generate(), world.generate()
            with pytest.raises(Busy, match="within 10 s"):
                await anext(second)
            assert first.state is State.RUNNING
            assert len(engine.calls) == 1
            third = world.generate()
            first.cancel()
            await world.settle()
            assert third.state is State.RUNNING
            # The third got its place in time: its patience in the queue is no deadline.
            await asyncio.sleep(20.0)
            assert third.state is State.RUNNING
            third.cancel()

    run_virtual(main())


def test_cancelling_what_waits_gives_its_place_away() -> None:
    async def main() -> None:
        async with World(max_active=1, max_queued=1) as world:
            await world.add("a")
            first, second = world.generate(), world.generate()
            second.cancel()
            third = world.generate()
            assert world.metric("queued") == 1
            first.cancel()
            assert (world.metric("queued"), third.state) == (0, State.RUNNING)
            third.cancel()

    run_virtual(main())


def test_the_deadline_counts_the_time_in_the_queue() -> None:
    async def main() -> None:
        async with World(max_active=1, queue_timeout=100.0, request_timeout=50.0) as world:
            await world.add("a")
            first, second = world.generate(), world.generate(timeout=5.0)
            third = world.generate(timeout=500.0)
            with pytest.raises(MicroserveError, match="5 s") as caught:
                await anext(second)
            assert caught.value.code == "deadline_exceeded"
            with pytest.raises(MicroserveError, match="50 s"):
                await anext(first)
            with pytest.raises(MicroserveError, match="50 s"):
                await anext(third)

    run_virtual(main())


def test_draining_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        async with World(max_active=1) as world:
            engine = await world.add("a")
            running, waiting = world.generate(), world.generate()
            world.core.drain()
            assert not world.core.ready
            with pytest.raises(Draining) as caught:
                world.generate()
            assert caught.value.retry_after == 1.0
            idle = asyncio.create_task(world.core.wait_idle())
            await world.settle()
            await engine.finish(1)
            assert not idle.done()
            await engine.finish(2)
            await idle
            assert ids_of(await read(running)) == [1]
            assert ids_of(await read(waiting)) == [2]

    run_virtual(main())


def test_close_ends_what_still_runs_with_one_error() -> None:
    async def main() -> None:
        async with World(max_active=1) as world:
            engine = await world.add("a")
            running, waiting = world.generate(), world.generate()
            await world.settle()
            await world.core.close()
            for generation in (running, waiting):
                with pytest.raises(Draining, match="the router stops"):
                    await anext(generation)
            await world.settle()
            assert len(engine.cancelled) == 1
            assert len(engine.calls) == 1

    run_virtual(main())


def test_one_version_serves_all_choices_of_a_request() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            await world.core.versions.set("prefill_decode", {}, share=0.5)
            served = []
            for number in range(20):
                names = (f"r{number}", *(f"r{number}-{index}" for index in range(1, 5)))
                generations = [world.generate(request_id=name, choice_of=f"r{number}") for name in names]
                served.append({generation.strategy_version for generation in generations})
                for generation in generations:
                    generation.cancel()
            assert {len(versions) for versions in served} == {1}
            assert len(set.union(*served)) == 2

    run_virtual(main())


def test_a_changed_program_serves_the_next_request() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            old = world.generate()
            program = world.core.versions.default
            world.core.versions = Versions(Program(program.strategy, {}, "data_parallel@new"), Catalog.built_in())
            new = world.generate()
            assert old.strategy_version != new.strategy_version == "data_parallel@new"
            old.cancel()
            new.cancel()

    run_virtual(main())


def test_status_counts() -> None:
    async def main() -> None:
        async with World(max_active=1) as world:
            await world.add("a", load=Load(running=3))
            generations = [world.generate() for _ in range(2)]
            await world.settle()
            await asyncio.sleep(2.5)
            status = world.core.status()
            assert (status.active_requests, status.queued_requests, status.requests_total) == (1, 1, 2)
            assert (status.router, status.version, status.strategy) == (
                "r",
                "test",
                world.core.versions.default.version,
            )
            assert status.uptime == pytest.approx(2.5)
            (engine,) = status.engines
            assert (engine.info.engine_id, engine.state, engine.charged) == ("a", "ready", 1)
            assert engine.last_seen == pytest.approx(2.5)
            assert engine.load.running == 3
            for generation in generations:
                generation.cancel()
            assert world.core.status().requests_total == 2

    run_virtual(main())


# --- membership and text -------------------------------------------------------------------------------------------


def test_a_heartbeat_of_a_stranger_asks_it_to_announce() -> None:
    async def main() -> None:
        async with World() as world:
            with pytest.raises(NotFound):
                world.core.heartbeat("a", 1, Load())
            await world.add("a", epoch=2)
            with pytest.raises(NotFound):
                world.core.heartbeat("a", 1, Load())
            with pytest.raises(InvalidRequest):
                world.core.announce(engine_info("a", epoch=1), Load())
            world.core.leave("a", 1)
            assert [link.id for link in world.core.fleet.links] == ["a"]

    run_virtual(main())


def test_texts_are_loaded_once_per_path_before_the_engine_is_used() -> None:
    # In real time: the loading runs in a thread.
    async def main() -> None:
        network = MemoryNetwork()
        bus = network.bus(Peer("router", "r", 1))
        asked: list[str] = []

        def load(path: str) -> Any:
            asked.append(path)
            if path == "/broken":
                raise CheckpointError("no tokenizer.json")
            return f"text of {path}"

        core = RouterCore(
            RouterConfig(),
            bus,
            data_parallel.configure(),
            metrics=RouterMetrics(CollectorRegistry()),
            load_text=load,
            clock=network.clock,
        )
        ready = asyncio.Event()
        core.fleet.changed = ready.set
        engines = []
        for name, model, path in (("a", "m", "/m"), ("b", "m", "/m"), ("c", "bad", "/broken"), ("d", "ids", "")):
            engine = ScriptedEngine(network, engine_info(name, model=model, path=path))
            engines.append(engine)
            await engine.listen()
            core.announce(engine.info, Load())
        while sum(link.pickable for link in core.fleet.links) < 4:
            ready.clear()
            await ready.wait()
        assert sorted(asked) == ["/broken", "/m"]
        assert core.text_model("m") == "text of /m"  # type: ignore[comparison-overlap]
        assert (core.has_text("m"), core.has_text("bad"), core.has_text("ids")) == (True, False, False)
        with pytest.raises(InternalError, match=r"'bad' could not be loaded: no tokenizer\.json"):
            core.text_model("bad")
        with pytest.raises(InvalidRequest, match="give token ids"):
            core.text_model("ids")
        await core.close()
        await bus.close()
        for engine in engines:
            await engine.bus.close()

    asyncio.run(main())
