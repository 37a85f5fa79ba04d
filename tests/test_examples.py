"""`examples/` and the built-in strategies on whole engines in virtual time: who does what, and the right tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.simulation import Deployment
from tests.virtual_time import run_virtual

from microserve.router.core import GenerationSpec
from microserve.router.strategies.catalog import BUILT_IN, load_catalog
from microserve.runtime.async_engine import AsyncEngine, migrate
from microserve.runtime.config import FakeConfig
from microserve.runtime.errors import Busy, Draining, MicroserveError, NotFound
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from microserve.router.dispatch import Generation
    from microserve.router.strategy import SettingValue, Strategy
    from microserve.runtime.rpc import RpcClient

FOLDER = Path(__file__).parent.parent / "examples"
FLEET = {"p": {"prefill": "yes"}, "q": {"prefill": "yes"}, "d": {"decode": "yes"}}
TIMES = FakeConfig(decode_base_us=4000, decode_us_per_sequence=100, prefill_us_per_token=20)

CATALOG = load_catalog(FOLDER, built_in=(), entry_points=())
EXAMPLES = tuple(CATALOG.strategies.values())
ALL = {each.name: each for each in (*BUILT_IN, *EXAMPLES)}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng([length, seed]).integers(0, 30_000, length).tolist()
    return found


def deployment(chosen: Strategy, settings: Mapping[str, SettingValue] | None = None) -> Deployment:
    router = {"strategy": chosen.name, "strategy_settings": dict(settings or {})}
    return Deployment(
        FLEET, fake=TIMES, seconds_per_page=0.0005, strategies=EXAMPLES, router=router, kv_pages=600, step_tokens=256
    )


async def answer(world: Deployment, prompt: Sequence[int], count: int = 6) -> Generation:
    """One request, served and compared."""
    sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    generation = world.core.generate(GenerationSpec("r", "", np.asarray(prompt, dtype=np.int32), sampling))
    tokens = [token async for chunk in generation for token in chunk.tokens]
    assert tokens == world.expected(prompt, count)
    await world.core.wait_idle()
    return generation


def asked(generation: Generation) -> list[str]:
    return [f"{each.engine} {each.verb}" for each in generation.sub_requests if each.outcome == "ok"]


def test_every_file_is_a_strategy_of_that_name() -> None:
    assert CATALOG.problems == ()
    assert {Path(source).stem for source in CATALOG.sources.values()} == set(CATALOG.strategies)
    assert {path.stem for path in FOLDER.glob("*.py")} == set(CATALOG.strategies)
    assert all(each.summary for each in ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_prompts_of_every_length_cold_and_warm(name: str) -> None:
    async def main() -> None:
        async with deployment(ALL[name]) as world:
            for length in (1, 15, 16, 17, 100, 1000):
                prompt = prompt_of(length)
                first = await answer(world, prompt)
                again = await answer(world, prompt)
                longer = await answer(world, [*prompt, *prompt_of(40, 1)])
                assert first.finish is not None
                assert first.finish.usage.cached_tokens == 0
                for each in (first, again, longer):
                    assert {record.outcome for record in each.sub_requests} <= {"ok"}
                    assert all(record.ended is not None for record in each.sub_requests)
            await world.settle_whole()

    run_virtual(main())


DISAGGREGATED = ["d prep_recv", "p remote_send", "d start_generate"]
LEASING = {
    "disaggregation",
    "balanced_disaggregation",
    "split_prefill",
    "fallback_prefill",
    "prefill_decode",
    "balanced",
}
"""Those that ask for a lease first. `cached_disaggregation` does without one when all is cached."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data_parallelism", ["p start_generate"]),
        ("disaggregation", DISAGGREGATED),
        ("balanced_disaggregation", DISAGGREGATED),
        ("cached_disaggregation", ["d cache_match", *DISAGGREGATED]),
        ("moved_context", ["p start_generate"]),
        ("split_prefill", ["d prep_recv", "p remote_send", "q remote_send", "d start_generate"]),
        ("fallback_prefill", DISAGGREGATED),
        ("prefill_decode", ["d prep_recv", "p start_generate", "p remote_send", "d start_generate"]),
        ("balanced", DISAGGREGATED),
    ],
)
def test_who_does_what(name: str, expected: list[str]) -> None:
    async def main() -> None:
        async with deployment(ALL[name]) as world:
            generation = await answer(world, prompt_of(500))
            assert asked(generation) == expected
            received = [record for record in generation.sub_requests if record.verb == "remote_send"]
            sizes = {(record.engine, record.computed, record.begin, record.end) for record in received}
            if name == "split_prefill":
                assert sizes == {("p", 256, 0, 256), ("q", 243, 256, 499)}
            elif received:
                (record,) = received
                # What was computed for the first token is there already.
                computed = 0 if name == "prefill_decode" else record.end
                assert record.computed == computed
                ends = {"balanced": 400, "balanced_disaggregation": 448, "prefill_decode": 496}
                assert record.end == ends.get(name, 499)
            await world.settle_whole()

    run_virtual(main())


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_that_no_lease_can_hold_is_served(name: str) -> None:
    """It has 375 pages of the pool's 600, and leases hold half of those. With its KV cached, a lease is as ever."""

    async def main() -> None:
        async with deployment(ALL[name]) as world:
            prompt = prompt_of(6000)
            first = await answer(world, prompt)
            refused = [f"{each.engine} {each.verb}" for each in first.sub_requests if each.outcome != "ok"]
            if name == "prefill_decode":
                # It was asked for the first token at the same time.
                assert refused.pop() == "p start_generate"
            if name in LEASING:
                assert (refused, asked(first)[-1:]) == (["d prep_recv"], ["d start_generate"])
            else:
                assert set(refused) <= {"d prep_recv"}
            assert len([each for each in asked(first) if each.endswith("start_generate")]) == 1
            again = await answer(world, prompt)
            assert {each.outcome for each in again.sub_requests} <= {"ok", "lease_too_large"}
            if name in LEASING:
                assert "d prep_recv" in asked(again)
                assert again.finish is not None
                assert again.finish.usage.cached_tokens >= 5984
            await world.settle_whole()

    run_virtual(main())


def test_what_is_cached_needs_no_second_engine() -> None:
    async def main() -> None:
        async with deployment(ALL["cached_disaggregation"]) as world:
            prompt = prompt_of(500)
            await answer(world, prompt)
            again = await answer(world, prompt)
            assert asked(again) == ["d cache_match", "d start_generate"]
            assert again.finish is not None
            assert again.finish.usage.cached_tokens == 496

    run_virtual(main())


def test_a_context_moves_before_its_turn() -> None:
    async def main() -> None:
        async with deployment(ALL["moved_context"]) as world:
            prompt = prompt_of(500)
            await answer(world, prompt)
            second = await answer(world, [*prompt, *prompt_of(20)])
            assert asked(second) == ["q prep_recv", "p remote_send", "q commit", "q start_generate"]
            assert second.finish is not None
            # p had it cached, so nobody computed it for this request.
            assert second.finish.usage.cached_tokens == 496

    run_virtual(main())


def test_a_context_moves_ahead_of_its_next_turn() -> None:
    async def main() -> None:
        async with deployment(ALL["context_migration"], {"target": "decode"}) as world:
            prompt = prompt_of(500)
            first = await answer(world, prompt)
            assert asked(first) == ["p start_generate", "d prep_recv", "p remote_send", "d commit"]
            turn = [*prompt, *world.expected(prompt, 6), *prompt_of(20)]
            second = await answer(world, turn)
            assert asked(second) == ["d start_generate"]
            assert second.finish is not None
            assert second.finish.usage.cached_tokens == 496
            await world.settle_whole()

    run_virtual(main())


@pytest.mark.parametrize("error", [Busy("no room"), Draining("the engine ends")])
@pytest.mark.parametrize("length", [1000, 1008, 1009])
def test_a_send_that_fails_behind_the_first_token_costs_no_wait(length: int, error: MicroserveError) -> None:
    """Whatever the prompt's length: what the lease awaits behind the pages that are sent comes from nobody."""

    async def main() -> None:
        async with deployment(ALL["prefill_decode"]) as world:

            def refuse(*_: object) -> None:
                raise error

            for name in "pq":
                world.engines[name].core.scheduler.submit_send = refuse  # type: ignore[method-assign, assignment]
            began = world.clock()
            generation = await answer(world, prompt_of(length))
            assert [each.outcome for each in generation.sub_requests if each.verb == "remote_send"] == [error.code]
            assert world.clock() - began < 0.2, "twice the prompt's own time, and six tokens"
            await world.settle_whole()

    run_virtual(main())


def test_a_second_sender_steps_in_for_one_that_is_gone() -> None:
    async def main() -> None:
        async with deployment(ALL["fallback_prefill"]) as world:
            generation = world.core.generate(
                GenerationSpec(
                    "r", "", np.array(prompt_of(1000), np.int32), SamplingParams(max_tokens=4, temperature=0)
                )
            )
            await world.until(lambda: len(generation.sub_requests) == 2)
            world.network.kill(world.engines["p"].bus.me)
            assert [token async for chunk in generation for token in chunk.tokens] == world.expected(prompt_of(1000), 4)
            outcomes = [f"{each.engine} {each.verb} {each.outcome}" for each in generation.sub_requests]
            assert outcomes == [
                "d prep_recv ok",
                "p remote_send peer_lost",
                "d prep_recv ok",
                "q remote_send ok",
                "d start_generate ok",
            ]

    run_virtual(main())


class Connection:
    """A client of the deployment's router, as `AsyncEngine` wants it."""

    def __init__(self, world: Deployment) -> None:
        self._world = world
        self._rpc: RpcClient | None = None

    async def connect(self) -> RpcClient:
        if self._rpc is None:
            self._rpc = await self._world.client("operator")
        return self._rpc


def test_an_operator_moves_a_context() -> None:
    async def main() -> None:
        async with deployment(ALL["cache_aware"]) as world:
            connection = Connection(world)
            p, d = AsyncEngine(connection, "p"), AsyncEngine(connection, "d")
            prompt = prompt_of(100)
            await p.generate(prompt, max_tokens=1, temperature=0)
            assert await migrate(prompt, p, d) == await d.cache_match(prompt) == 96
            tokens, done = await d.generate(prompt, max_tokens=4, temperature=0)
            assert tokens == world.expected(prompt, 4)
            assert done.usage.cached_tokens == 96
            with pytest.raises(NotFound, match="no engine 'z'"):
                await migrate(prompt_of(100, 1), AsyncEngine(connection, "z"), d)
            await world.settle_whole()

    run_virtual(main())


def test_moving_a_context_that_is_given_up_leaves_nothing() -> None:
    async def main() -> None:
        async with deployment(ALL["cache_aware"]) as world:
            connection = Connection(world)
            moving = asyncio.create_task(
                migrate(prompt_of(2000), AsyncEngine(connection, "p"), AsyncEngine(connection, "d"))
            )
            await world.until(lambda: len(world.engines["p"].core.sends) == 1)
            moving.cancel()
            await asyncio.wait([moving])
            await world.settle_whole(5.0)

    run_virtual(main())
