"""The built-in strategies: what each asks of which engine, in which order, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from tests.router_support import ScriptedEngine, World, ids_of, read
from tests.virtual_time import run_virtual

from microserve.router.strategies.catalog import BUILT_IN, Catalog
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import (
    Busy,
    InternalError,
    InvalidRequest,
    MicroserveError,
    PeerLost,
    TransferFailed,
)
from microserve.runtime.messages import (
    CacheMatch,
    CacheMatched,
    Commit,
    Generated,
    PrepRecv,
    RemoteSend,
    StartGenerate,
    Tokens,
    Usage,
)

if TYPE_CHECKING:
    from microserve.runtime.rpc import IncomingCall

PROMPT = list(range(90))
"""Five whole pages and ten tokens."""

Check = Callable[[World], Awaitable[None]]


def run(name: str, check: Check, *engines: str, **settings: Any) -> None:
    """A world of engines that do what they are asked at once; "d-decode-fast" carries two labels."""

    async def main() -> None:
        async with World(Catalog.built_in().get(name).configure(settings)) as world:
            for each in engines:
                await add(world, *each.split("-"))
            await check(world)
            await world.settle()
            world.check_clean()

    run_virtual(main())


async def add(world: World, name: str, *labels: str) -> ScriptedEngine:
    engine = await world.add(name, labels=dict.fromkeys(labels, "yes"), max_context=1000)
    engine.grant_always()
    engine.answers[RemoteSend] = engine.report
    engine.answers[StartGenerate] = lambda call: say(engine, call)
    engine.answers[Commit] = lambda call: engine.settle_commit(call, 80)
    engine.answers[CacheMatch] = lambda call: call.reply(CacheMatched(tokens=engine.matched))
    return engine


def say(engine: ScriptedEngine, call: IncomingCall) -> None:
    """The tokens 1 and 2, as many of them as are wanted and were not said before, and the end."""
    body = call.body
    assert isinstance(body, StartGenerate)
    engine._use_up(call)
    most = min(2, body.sampling.max_tokens)
    for token in range(body.prior_output + 1, most + 1):
        call.part(Tokens(ids=pack_tokens([token])))
    usage = Usage(prompt_tokens=len(body.prompt) // 4, completion_tokens=most)
    call.reply(Generated(finish_reason="length", usage=usage))


async def serve(world: World, prompt: list[int] = PROMPT) -> list[str]:
    """What a request makes of the engines."""
    before = len(world.log)
    assert ids_of(await read(world.generate(prompt))) == [1, 2]
    await world.core.wait_idle()
    await world.settle()
    return world.log[before:]


# --- prefill_decode --------------------------------------------------------------------------------------------------


def test_the_first_token_comes_from_the_engine_that_prefills_and_kv_moves_behind_it() -> None:
    async def check(world: World) -> None:
        assert await serve(world) == [
            "d prep_recv end=-1",
            "p start_generate 0",
            "p remote_send d 0 80",
            "d start_generate 80 lease=401 after=1",
        ]
        first, last = world.engines["p"].calls[0].body, world.engines["d"].started()
        assert isinstance(first, StartGenerate)
        assert (first.sampling.max_tokens, last.sampling.max_tokens) == (1, 16)
        assert last.prompt == pack_tokens([*PROMPT, 1])
        # Part of it is cached there, and the rest is less than a page: nobody says anything early.
        world.engines["d"].matched = 80
        assert (await serve(world))[1:] == ["p remote_send d 80 89", "d start_generate 89 lease=403"]

    run("prefill_decode", check, "d-decode", "p-prefill", min_remote=0)


def test_who_wants_one_token_needs_no_second_engine() -> None:
    async def check(world: World) -> None:
        generation = world.generate(PROMPT, max_tokens=1)
        (chunk,) = await read(generation)
        assert (chunk.tokens, chunk.finish is not None) == ([1], True)
        await world.core.wait_idle()
        await world.settle()
        assert world.log == ["d prep_recv end=-1", "p start_generate 0", "d release lease=401"]

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_what_was_computed_for_the_first_token_counts_as_computed() -> None:
    async def check(world: World) -> None:
        p = world.engines["p"]
        p.answers[RemoteSend] = lambda call: p.report(call, reused=80)
        p.answers[StartGenerate] = lambda call: say(p, call)
        chunks = await read(world.generate(PROMPT))
        assert chunks[-1].finish is not None
        assert chunks[-1].finish.usage.cached_tokens == 0

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_the_end_waits_for_no_report_where_the_first_token_came_early() -> None:
    """What counts as cached was known with the first token."""

    async def check(world: World) -> None:
        d = world.engines["d"]

        def end(call: IncomingCall) -> None:
            d._use_up(call)
            call.part(Tokens(ids=pack_tokens([2])))
            usage = Usage(prompt_tokens=len(PROMPT) + 1, completion_tokens=2)
            call.reply(Generated(finish_reason="length", usage=usage, received_tokens=80))

        world.engines["p"].answers[RemoteSend] = lambda call: None
        d.answers[StartGenerate] = end
        began = asyncio.get_running_loop().time()
        chunks = await read(world.generate(PROMPT, max_tokens=2))
        assert chunks[-1].finish is not None
        assert asyncio.get_running_loop().time() - began < 0.1

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_the_engine_that_prefilled_dies_behind_the_first_token() -> None:
    async def check(world: World) -> None:
        p = world.engines["p"]
        p.answers[RemoteSend] = lambda call: call.fail(TransferFailed("torn"))
        log = await serve(world)
        assert log[3:] == ["d start_generate 80 lease=401 after=1", "d forgo lease=401 0 80"]

    run("prefill_decode", check, "d-decode", "p-prefill")


@pytest.mark.parametrize("error", [Busy("full"), InternalError("broken"), PeerLost("dead"), InvalidRequest("what?")])
def test_who_decodes_does_without_an_engine_that_says_no_first_token(error: MicroserveError) -> None:
    async def check(world: World) -> None:
        world.engines["p"].answers[StartGenerate] = lambda call: call.fail(error)
        assert (await serve(world))[1:] == ["p start_generate 0", "d start_generate 0 lease=401"]

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_the_engine_that_prefills_dies_between_its_token_and_its_answer() -> None:
    async def check(world: World) -> None:
        p = world.engines["p"]

        def die(call: IncomingCall) -> None:
            call.part(Tokens(ids=pack_tokens([1])))
            p.dead = True
            world.network.kill(p.bus.me)

        p.answers[StartGenerate] = die
        assert (await serve(world))[1:] == ["p start_generate 0", "d start_generate 0 lease=401 after=1"]

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_nobody_stands_in_line_for_long_while_pages_are_held_elsewhere() -> None:
    async def check(world: World) -> None:
        await serve(world)
        assert world.engines["p"].started(0).admit_by == 20.0
        assert world.engines["d"].started().admit_by is None

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_kv_of_long_prompts_moves_while_it_is_computed() -> None:
    async def check(world: World) -> None:
        world.engines["d"].matched = 32
        assert (await serve(world, PROMPT[:40]))[1] == "p start_generate 0"
        assert (await serve(world))[1] == "p start_generate 0"
        assert (await serve(world, [*PROMPT, *PROMPT]))[1] == "p remote_send d 32 179"

    run("prefill_decode", check, "d-decode", "p-prefill", early_first=60, min_remote=0)


def test_kv_that_the_router_does_not_know_of_is_not_sent_behind_the_first_token() -> None:
    async def check(world: World) -> None:
        world.engines["d"].matched = 80
        assert await serve(world) == [
            "d prep_recv end=-1",
            "p start_generate 0",
            "d start_generate 80 lease=401 after=1",
        ]

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_kv_that_the_router_believes_to_be_there_is_sent_where_it_is_not() -> None:
    async def check(world: World) -> None:
        await serve(world)
        world.engines["d"].matched = 0
        assert (await serve(world))[1:] == ["p remote_send d 0 89", "d start_generate 89 lease=403"]

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_nothing_is_said_before_there_is_room_where_it_goes_on() -> None:
    """So the program can run again, elsewhere, as if nothing had happened."""

    async def check(world: World) -> None:
        world.engines["d"].answers[PrepRecv] = lambda call: call.fail(Busy("full"))
        assert await serve(world) == [
            "d prep_recv end=-1",
            "p start_generate 0",
            "p prep_recv end=-1",
            "p start_generate 0 lease=1602",
        ]

    run("prefill_decode", check, "d-decode", "p-prefill")


def test_prefill_and_decode_on_two_engines() -> None:
    async def check(world: World) -> None:
        expected = ["d prep_recv end=-1", "p remote_send d 0 89", "d start_generate 89 lease=401"]
        assert await serve(world) == expected

    run("prefill_decode", check, "d-decode", "p-prefill", early_first=0)


def test_what_is_cached_where_it_is_decoded_is_not_sent() -> None:
    async def check(world: World) -> None:
        d = world.engines["d"]
        d.matched = 16
        assert (await serve(world))[1:] == ["p remote_send d 16 89", "d start_generate 89 lease=401"]
        # Less than `min_remote` is missing, or nothing at all: no other engine is asked.
        d.matched = 32
        assert (await serve(world))[1:] == ["d start_generate 32 lease=403"]
        d.matched = 80
        assert (await serve(world))[1:] == ["d start_generate 80 lease=405"]
        assert (await serve(world, PROMPT[:80]))[1:] == ["d start_generate 79 lease=407"]
        assert len(world.engines["p"].calls) == 1

    run("prefill_decode", check, "d-decode", "p-prefill", min_remote=64, early_first=0)


def test_without_regard_to_caches_every_prompt_is_sent() -> None:
    async def check(world: World) -> None:
        world.engines["d"].matched = 80
        assert (await serve(world))[1] == "p remote_send d 80 89"
        assert (await serve(world, [1]))[1] == "d start_generate 0 lease=403"

    run("prefill_decode", check, "d-decode", "p-prefill", cache_aware=False, early_first=0)


def test_several_engines_of_each_kind_take_turns() -> None:
    async def check(world: World) -> None:
        for number in range(12):
            await serve(world, [number] * 90)
        calls = {name: len(engine.calls) for name, engine in world.engines.items()}
        assert calls == {"a": 8, "b": 8, "c": 8, "x": 6, "y": 6}

    run("prefill_decode", check, "a-decode", "b-decode", "c-decode", "x-prefill", "y-prefill", early_first=0)


def test_a_conversation_is_decoded_where_its_prefix_is() -> None:
    async def check(world: World) -> None:
        await serve(world)
        first = next(name for name in "ab" if world.engines[name].calls)
        world.engines[first].matched = 80
        log = await serve(world, PROMPT + [7] * 100)
        assert log[0] == f"{first} prep_recv end=-1"
        assert log[1].split()[1:] == ["remote_send", first, "80", "189"]

    run("prefill_decode", check, "a-decode", "b-decode", "x-prefill", "y-prefill", early_first=0)


@pytest.mark.parametrize(("name", "end"), [("prefill_decode", -1), ("balanced", 64)])
def test_one_engine_alone_serves_disaggregated_requests_and_sends_itself_nothing(name: str, end: int) -> None:
    async def check(world: World) -> None:
        assert await serve(world) == [f"a prep_recv end={end}", "a start_generate 0 lease=101"]
        world.engines["a"].matched = 16
        assert (await serve(world))[1] == "a start_generate 16 lease=103"

    run(name, check, "a")


@pytest.mark.parametrize(
    ("name", "settings", "end"), [("prefill_decode", {"early_first": 0}, 89), ("balanced", {}, 64)]
)
def test_another_engine_prefills_though_the_one_that_decodes_carries_the_label_too(
    name: str, settings: dict[str, int], end: int
) -> None:
    async def check(world: World) -> None:
        assert (await serve(world))[1:] == [f"q remote_send d 0 {end}", f"d start_generate {end} lease=401"]

    run(name, check, "d-decode-prefill", "q", **settings)


# --- balanced --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "split"), [(0.0, 80), (0.1, 80), (0.37, 64), (0.5, 48), (0.95, 0), (1.0, 0)])
def test_the_prompt_is_split_by_the_ratio(ratio: float, split: int) -> None:
    async def check(world: World) -> None:
        log = await serve(world)
        sends = [f"p remote_send d 0 {split}"] if split else []
        assert log == [f"d prep_recv end={split}", *sends, f"d start_generate {split} lease=401"]

    run("balanced", check, "d-decode", "p-prefill", ratio=ratio)


def test_what_is_cached_is_not_balanced_again() -> None:
    async def check(world: World) -> None:
        world.engines["d"].matched = 48
        assert (await serve(world))[1:] == ["p remote_send d 48 64", "d start_generate 64 lease=401"]
        world.engines["d"].matched = 80
        assert (await serve(world))[1:] == ["d start_generate 64 lease=403"]

    run("balanced", check, "d-decode", "p-prefill", ratio=0.3)


# --- cache_aware -----------------------------------------------------------------------------------------------------


def test_turns_of_a_conversation_stay_on_an_engine() -> None:
    async def check(world: World) -> None:
        served: dict[int, set[str]] = {}
        for turn in range(3):
            # In another order each time: taking turns would mix them.
            for conversation in ((0, 1, 2), (1, 2, 0), (2, 1, 0))[turn]:
                log = await serve(world, [conversation] * (32 + 20 * turn))
                served.setdefault(conversation, set()).add(log[0].split()[0])
        assert sorted(map(sorted, served.values())) == [["a"], ["b"], ["c"]]

    run("cache_aware", check, "a", "b", "c")


# --- context_migration -----------------------------------------------------------------------------------------------


def test_a_context_moves_to_the_engine_of_the_next_turn() -> None:
    async def check(world: World) -> None:
        assert await serve(world) == [
            "a start_generate 0",
            "b prep_recv end=None",
            "a remote_send b 0 92",
            "b commit lease=201",
        ]
        # Prompt and answer are on b now, and it is there that the conversation goes on; it stays.
        assert await serve(world, [*PROMPT, 1, 2, *[5] * 20]) == ["b start_generate 0"]

    run("context_migration", check, "a-start", "b-next", target="next")


@pytest.mark.parametrize("busier", "ab")
def test_a_context_moves_to_who_has_less_to_do(busier: str) -> None:
    async def check(world: World) -> None:
        a, b = world.engines["a"], world.engines["b"]
        for engine in (a, b):
            del engine.answers[StartGenerate]
        first = world.generate(PROMPT)
        await world.settle()
        await a.tokens(1)
        # The same prompt goes where it is cached, and another one to the other.
        second = world.generate(PROMPT if busier == "a" else [9] * 90)
        await world.settle()
        assert (len(a.calls), len(b.calls)) == ((2, 0) if busier == "a" else (1, 1))
        before = len(world.log)
        await a.finish(2, call=0)
        assert ids_of(await read(first)) == [1, 2]
        await world.settle()
        moved = ["b prep_recv end=None", "a remote_send b 0 92", "b commit lease=201"]
        assert world.log[before:] == (moved if busier == "a" else [])
        second.cancel()

    run("context_migration", check, "a", "b")


def test_a_short_context_or_a_single_engine_moves_nothing() -> None:
    async def check(world: World) -> None:
        assert len(await serve(world, [1] * 10)) == 1
        world.core.leave("b", 1)
        assert len(await serve(world)) == 1

    run("context_migration", check, "a-start", "b-next", target="next")


def test_a_context_that_is_where_it_should_be_stays() -> None:
    async def check(world: World) -> None:
        assert await serve(world) == ["a start_generate 0"]

    run("context_migration", check, "a-next", "b-next", target="next")


def test_a_migration_that_fails_troubles_nobody() -> None:
    async def check(world: World) -> None:
        for engine in world.engines.values():
            engine.answers[RemoteSend] = lambda call: call.fail(TransferFailed("torn"))
        log = await serve(world)
        assert "b forgo lease=201 0 92" in log

    run("context_migration", check, "a-start", "b-next", target="next")


# --- every strategy, every call failing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [Busy("full"), TransferFailed("torn"), PeerLost("dead")], ids=lambda error: error.code
)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", [each.name for each in BUILT_IN])
def test_a_call_that_fails_is_made_up_for(name: str, number: int, error: MicroserveError) -> None:
    """Before the first token, nothing that a single engine does costs a request."""

    async def check(world: World) -> None:
        calls = 0

        def broken(
            engine: ScriptedEngine, answer: Callable[[IncomingCall], object]
        ) -> Callable[[IncomingCall], object]:
            def act(call: IncomingCall) -> object:
                nonlocal calls
                calls += 1
                if calls - 1 != number:
                    return answer(call)
                if isinstance(error, PeerLost):
                    engine.dead = True
                    world.network.kill(engine.bus.me)
                else:
                    call.fail(error)
                return None

            return act

        for engine in world.engines.values():
            engine.answers = {kind: broken(engine, answer) for kind, answer in engine.answers.items()}
        generation = world.generate(PROMPT)
        try:
            assert ids_of(await read(generation)) == [1, 2]
        except TransferFailed:
            # Said by an engine of a generation, which no engine does.
            assert isinstance(error, TransferFailed)
        await world.core.wait_idle()

    run(name, check, "a", "b", "c-next")


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("name", [each.name for each in BUILT_IN])
def test_a_client_that_leaves_at_any_moment_leaves_nothing(name: str, stage: int) -> None:
    async def check(world: World) -> None:
        for engine in world.engines.values():
            engine.answers = {}
        generation = world.generate(PROMPT)
        for _ in range(stage):
            await world.settle()
            for engine in world.engines.values():
                for call in engine.open:
                    if isinstance(call.body, PrepRecv):
                        engine.grant(call)
                    elif isinstance(call.body, RemoteSend):
                        engine.report(call)
                    elif isinstance(call.body, StartGenerate):
                        engine._use_up(call)
                        call.part(Tokens(ids=pack_tokens([1])))
        generation.cancel()
        await world.settle()
        assert generation.error is not None

    run(name, check, "a", "b", "c-next", **({"target": "next"} if name == "context_migration" else {}))
