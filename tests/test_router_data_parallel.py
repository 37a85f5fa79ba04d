"""The data-parallel strategy: whole requests, on the engine with the least work before it."""

from __future__ import annotations

import asyncio

from tests.router_support import World, ids_of, read
from tests.virtual_time import run_virtual

from microserve.runtime.messages import Load


def test_requests_go_where_the_least_work_stands() -> None:
    async def main() -> None:
        async with World() as world:
            a, b = await world.add("a"), await world.add("b")
            world.generate([1] * 90, max_tokens=2)
            await world.settle()
            for _ in range(2):
                world.generate([1] * 4, max_tokens=2)
                await world.settle()
            # A request weighs 64 tokens beside its prompt: 154 on a; 68, then 136 on b.
            assert (len(a.calls), len(b.calls)) == (1, 2)
            assert world.charges() == {"a": (1, 90), "b": (2, 8)}
            await a.tokens(1)
            # The prompt of a is computed: 64 are left there.
            world.generate([1] * 4, max_tokens=2)
            await world.settle()
            assert (len(a.calls), len(b.calls)) == (2, 2)
            for engine in (a, b):
                for index in range(len(engine.calls)):
                    await engine.finish(1, call=index)

    run_virtual(main())


def test_idle_engines_take_turns() -> None:
    async def main() -> None:
        async with World() as world:
            engines = [await world.add(name) for name in "abc"]
            for _ in range(6):
                generation = world.generate()
                await world.settle()
                engine = next(engine for engine in engines if engine.open)
                await engine.finish(1)
                assert ids_of(await read(generation)) == [1]
            assert [len(engine.calls) for engine in engines] == [2, 2, 2]

    run_virtual(main())


def test_a_burst_is_spread_before_any_engine_has_reported() -> None:
    async def main() -> None:
        async with World() as world:
            engines = [await world.add(name) for name in "abcd"]
            generations = [world.generate() for _ in range(40)]
            await world.settle()
            assert [len(engine.calls) for engine in engines] == [10] * 4
            for generation in generations:
                generation.cancel()
            await asyncio.sleep(0)
            assert set(world.charges().values()) == {(0, 0)}

    run_virtual(main())


def test_what_other_routers_sent_counts() -> None:
    async def main() -> None:
        async with World() as world:
            a = await world.add("a", load=Load(running=2, waiting=1))
            b = await world.add("b", load=Load())
            generations = [world.generate([1] * 10) for _ in range(2)]
            await world.settle()
            assert (len(a.calls), len(b.calls)) == (0, 2)
            for generation in generations:
                generation.cancel()

    run_virtual(main())
