"""KV that moves between engine processes over NIXL: the same bytes arrive, and the answer is the same, token for token.

Three engines with a small random model in float32. What an engine answers alone is the reference; every placement of
the work, over prompts around the page size and up to 3,000 tokens, with and without cached prefixes, has to answer the
same.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.cluster import FAKE, Cluster
from tests.engine_calls import Answer, Engines, is_whole, open_engines
from tests.soak import FOLDER

from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.runtime.client import AsyncClient
from microserve.runtime.errors import TransferFailed
from microserve.runtime.messages import Drain, Ok, Resume

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from microserve.runtime.messages import SettingValue

PAGE = 16
LENGTHS = (1, 15, 16, 17, 100, 3000)
OUTPUT = 6
CONTEXT = 3200
LABELS = {"e0": "decode", "e1": "prefill", "e2": "prefill"}
LOGPROB_ERROR = 1e-4
"""What the order of summation in float32 may change; a few wrong tokens among thousands change more."""


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Prompts of different lengths or seeds have no page in common."""
    found: list[int] = np.random.default_rng([length, seed]).integers(0, 250, length).tolist()
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), scale=0.25, max_position_embeddings=CONTEXT)
    router = ("--strategy-folder", str(FOLDER))
    with Cluster(0, engine_args=engine_arguments(folder), router_args=router, digests=True) as running:
        for name, label in LABELS.items():
            running.add_engine(name, "--labels", f"{label}=yes", wait=False)
        running.wait_ready(len(LABELS))
        yield running


def engine_arguments(folder: Path) -> list[str]:
    return [
        *("--executor", "torch", "--model", str(folder), "--dtype", "float32", "--threads", "1"),
        *("--kv-pages", "600", "--transport", "nixl", "--step-tokens", "512"),
    ]


def in_fleet(cluster: Cluster, work: Callable[[Engines], Awaitable[None]]) -> None:
    """Runs `work` with the engines, cold before it; afterwards they have to be whole."""

    async def main() -> None:
        async with open_engines(cluster.endpoints()) as engines:
            await chill(engines)
            await work(engines)
            for engine in engines.values():
                await engine.until_whole()

    asyncio.run(main())


async def chill(engines: Engines) -> None:
    for engine in engines.values():
        await engine.evict()


# --- placements: programs as strategies have them, by hand ---------------------------------------------------------


async def alone(engines: Engines, prompt: list[int]) -> Answer:
    return await engines["e0"].generate(prompt, OUTPUT)


async def split_between(engines: Engines, prompt: list[int], split: int | None, *senders: str) -> Answer:
    """The senders share [matched, split) in whole pages; e0 computes the rest and decodes.

    Nothing that is cached is computed: neither what the receiver had before, nor what a sender had of its range, of
    the page that the range ends in either.
    """
    receiver = engines["e0"]
    cached = {name: await engines[name].match(prompt) for name in {receiver.name, *senders}}
    kv = await receiver.prep_recv(prompt, split, expect_tokens=OUTPUT)
    assert kv.matched == cached[receiver.name]
    first = min(kv.matched, kv.end)
    pages = -(-(kv.end - first) // PAGE)
    bounds = [first + PAGE * (pages * share // len(senders)) for share in range(len(senders))] + [kv.end]
    sending = [
        (engines[name].sending(prompt, kv, begin, end), end - begin, min(cached[name], end) - begin)
        for name, begin, end in zip(senders, bounds, bounds[1:], strict=False)
        if begin < end
    ]
    answer = await receiver.generate(prompt, OUTPUT, kv=kv)
    for each, length, reusable in sending:
        report = await each
        assert report.bytes > 0
        assert (report.reused, report.computed) == (max(0, reusable), length - max(0, reusable))
    assert answer.done.recomputed_tokens == 0
    assert answer.done.received_tokens == kv.end - first
    return answer


async def one_prefill(engines: Engines, prompt: list[int]) -> Answer:
    return await split_between(engines, prompt, -1, "e1")


async def other_prefill(engines: Engines, prompt: list[int]) -> Answer:
    """With `one_prefill`, two prefill engines for one that decodes."""
    return await split_between(engines, prompt, -1, "e2")


async def two_senders(engines: Engines, prompt: list[int]) -> Answer:
    return await split_between(engines, prompt, None, "e1", "e2")


async def to_itself(engines: Engines, prompt: list[int]) -> Answer:
    return await split_between(engines, prompt, -1, "e0")


def balanced(ratio: float) -> Callable[[Engines, list[int]], Awaitable[Answer]]:
    async def run(engines: Engines, prompt: list[int]) -> Answer:
        split = min(round(len(prompt) * (1 - ratio) / PAGE), len(prompt) // PAGE) * PAGE
        return await split_between(engines, prompt, split, "e1")

    return run


async def cache_aware(engines: Engines, prompt: list[int]) -> Answer:
    """Where most of it is cached."""
    matched = {name: await engine.match(prompt) for name, engine in engines.items()}
    best = max(matched, key=lambda name: matched[name])
    return await engines[best].generate(prompt, OUTPUT)


PLACEMENTS: dict[str, Callable[[Engines, list[int]], Awaitable[Answer]]] = {
    "alone": alone,
    "one prefill": one_prefill,
    "other prefill": other_prefill,
    "two senders": two_senders,
    "to itself": to_itself,
    "cache aware": cache_aware,
    **{f"balanced {ratio}": balanced(ratio) for ratio in (0.0, 0.1, 0.37, 1.0)},
}

WARM: dict[str, tuple[tuple[str, ...], float]] = {
    "cold": ((), 0),
    "receiver warm": (("e0",), 0.5),
    "sender warm": (("e1", "e2"), 0.5),
    "all warm": (("e0", "e1", "e2"), 0.5),
    "receiver has all": (("e0",), 1),
    "sender has all": (("e1", "e2"), 1),
    "all have all": (("e0", "e1", "e2"), 1),
}
"""Engines that have the beginning of the prompt in their prefix tree, and how much of it: a whole page at least."""


@pytest.mark.parametrize(
    ("length", "warm"),
    # A prompt without a whole page leaves nothing in a prefix tree.
    [(length, warm) for length in LENGTHS for warm in WARM if length >= PAGE or warm == "cold"],
)
def test_every_placement_gives_the_same_tokens(cluster: Cluster, length: int, warm: str) -> None:
    async def work(engines: Engines) -> None:
        prompt = prompt_of(length)
        expected = await alone(engines, prompt)
        assert len(expected.tokens) == OUTPUT
        tokens: dict[str, list[int]] = {}
        names, part = WARM[warm]
        beginning = prompt[: max(PAGE, int(length * part))]
        for name, placement in PLACEMENTS.items():
            await chill(engines)
            for engine in names:
                await engines[engine].generate(beginning, 1)
                assert await engines[engine].match(prompt) == len(beginning) // PAGE * PAGE >= PAGE
            answer = await placement(engines, prompt)
            tokens[name] = answer.tokens
            # The likeliest token may be the same after all, had KV of a long prompt been wrong in places.
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_ERROR), name
        assert tokens == dict.fromkeys(PLACEMENTS, expected.tokens)

    in_fleet(cluster, work)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_conversation_that_moves_goes_on_the_same(cluster: Cluster, length: int) -> None:
    async def work(engines: Engines) -> None:
        first, second = engines["e0"], engines["e1"]
        prompt = prompt_of(length)
        answer = await first.generate(prompt, OUTPUT)
        turn = [*prompt, *answer.tokens, 7, 7, 7]
        expected = await first.generate(turn, OUTPUT)
        history = turn[:-3]
        kv = await second.prep_recv(history)
        await first.sending(history, kv)
        committed = await second.commit(kv, wait=10)
        assert committed == len(history) // PAGE * PAGE == await second.match(history)
        tokens, done, logprobs = await second.generate(turn, OUTPUT)
        assert tokens == expected.tokens
        assert logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_ERROR)
        assert done.usage.cached_tokens == committed

    in_fleet(cluster, work)


@pytest.mark.parametrize("senders", [("e1",), ("e1", "e2")], ids=["one sender", "two senders"])
@pytest.mark.parametrize(
    ("length", "warm"), [(length, warm) for length in LENGTHS for warm in sorted({0, length // PAGE // 2})]
)
def test_pages_arrive_byte_for_byte(cluster: Cluster, length: int, warm: int, senders: tuple[str, ...]) -> None:
    """The last page, too, which is not whole, and of which no prefix tree knows."""

    async def digests(name: str, **question: Sequence[int]) -> list[str]:
        return await asyncio.to_thread(cluster.page_digests, name, **question)

    async def work(engines: Engines) -> None:
        # Of another test, a page might hold the same from before.
        prompt = prompt_of(length, seed=1000 + 10 * warm + len(senders))
        receiver = engines["e0"]
        if warm:
            await receiver.generate(prompt[: warm * PAGE], 1)
        kv = await receiver.prep_recv(prompt)
        assert kv.matched == warm * PAGE
        pages = np.frombuffer(kv.pages, dtype=np.int32).tolist()
        assert len(pages) == -(-length // PAGE) - warm
        before = await digests("e0", pages=pages)
        bounds = [*(kv.matched + PAGE * (len(pages) * share // len(senders)) for share in range(len(senders))), length]
        sent: list[str] = []
        for name, begin, end in zip(senders, bounds, bounds[1:], strict=False):
            await digests(name, pushed=())
            if begin < end:
                await engines[name].sending(prompt, kv, begin, end)
            sent += await digests(name, pushed=())
        assert len(sent) == len(pages) > 0
        # The sender's word says that the pages were written; the receiver's own notification may be a moment later.
        whole = length // PAGE
        assert await receiver.commit(kv, wait=10) == whole * PAGE
        arrived = await digests("e0", pages=pages)
        assert arrived == sent
        assert all(one != other for one, other in zip(before, arrived, strict=True))
        kept = await digests("e0", prompt=prompt)
        assert kept[warm:] == sent[: whole - warm]
        # Who has sent the end of the prompt has computed all of it, and had it from nobody.
        assert kept == await digests(senders[-1], prompt=prompt)

    in_fleet(cluster, work)


# --- the same through the router, the strategy set live ------------------------------------------------------------

MOVES: dict[str, SettingValue] = {"cache_aware": False, "min_remote": 1}
STRATEGIES: dict[str, tuple[str, dict[str, SettingValue], int]] = {
    "data parallel": ("data_parallel", {}, 0),
    "cache aware": ("cache_aware", {}, 0),
    "1P1D": ("one_pair", {}, 1),
    "2P1D": ("prefill_decode", {**MOVES, "early_first": 0}, 2),
    "cache-aware 2P1D": ("prefill_decode", {}, 2),
    "first token early": ("prefill_decode", MOVES, 2),
    "split between two senders": ("shared", {}, 2),
    "migrated before it is served": ("migrated", {}, 1),
    **{f"balanced {ratio}": ("balanced", {"ratio": ratio}, 2 if ratio < 1 else 0) for ratio in (0.0, 0.1, 0.37, 1.0)},
}
"""Name, settings, and how many engines at least have to send KV of cold prompts."""


async def pushed(engines: Engines) -> Counter[str]:
    """Bytes by engine."""
    return Counter({name: int((await engine.stats())["transfer_pushed_bytes"]) for name, engine in engines.items()})


@pytest.mark.parametrize("case", STRATEGIES)
def test_every_strategy_gives_the_same_tokens(cluster: Cluster, case: str) -> None:
    name, settings, senders = STRATEGIES[case]
    # The router remembers what it has sent where in another case, and does not hear that it was evicted.
    seed = 10 + list(STRATEGIES).index(case)

    async def work(engines: Engines) -> None:
        sent: Counter[str] = Counter()
        async with AsyncClient(cluster.router) as client:
            (active,) = (await client.set_strategy(name, settings=settings)).active
            for length in LENGTHS:
                prompt = prompt_of(length, seed)
                first = await alone(engines, prompt)
                second = await engines["e0"].generate(turn := [*prompt, *first.tokens, 7, 7, 7], OUTPUT)
                await chill(engines)
                before = await pushed(engines)
                # Cold, with hits from the first time, and the turn that follows.
                for asked, expected in ((prompt, first), (prompt, first), (turn, second)):
                    answer = await client.generate(asked, max_tokens=OUTPUT, temperature=0, ignore_eos=True)
                    assert list(answer.token_ids) == expected.tokens, length
                    assert answer.strategy == active.version
                moved = await pushed(engines) - before
                assert moved or not senders or length < 100
                sent += moved
                for engine in engines.values():
                    await engine.until(lambda info: is_whole(info.load))
                    await engine.evict()
        assert len(sent) >= senders
        if name in ("prefill_decode", "balanced"):
            # Each of the engines that prefill has done so, and never the one that decodes.
            assert set(sent) == ({"e1", "e2"} if senders else set())

    in_fleet(cluster, work)


@pytest.mark.parametrize("length", [length for length in LENGTHS if length + OUTPUT > PAGE])
def test_a_context_is_where_its_next_turn_is_served(cluster: Cluster, length: int) -> None:
    """`context_migration` moves it after the answer; the next turn has nowhere else to go."""

    async def work(engines: Engines) -> None:
        async with AsyncClient(cluster.router) as client:
            await client.set_strategy("context_migration", settings={"target": "decode", "min_tokens": 1})
            for seed in itertools.count(3):
                assert seed < 6, "a prefill engine is picked longest ago, sooner or later"
                prompt = prompt_of(length, seed=seed)
                expected = await alone(engines, prompt)
                history = [*prompt, *expected.tokens]
                turn = [*history, 7, 7, 7]
                following = await alone(engines, turn)
                await chill(engines)
                before = await pushed(engines)
                answer = await client.generate(prompt, max_tokens=OUTPUT, temperature=0, ignore_eos=True)
                assert list(answer.token_ids) == expected.tokens
                await engines["e0"].until(lambda info: is_whole(info.load))
                if answer.engine != "e0":
                    break
            moved = len(history) // PAGE * PAGE
            async with asyncio.timeout(10):
                while await engines["e0"].match(history) != moved:
                    pass
            assert set(await pushed(engines) - before) == {answer.engine}
            for name in ("e1", "e2"):
                await engines[name].ask(Drain(), Ok)
            try:
                await until_ready(client, {"e0"})
                answer = await client.generate(turn, max_tokens=OUTPUT, temperature=0, ignore_eos=True)
                assert (answer.engine, answer.usage.cached_tokens) == ("e0", moved)
                assert list(answer.token_ids) == following.tokens
            finally:
                for name in ("e1", "e2"):
                    await engines[name].ask(Resume(), Ok)
                await until_ready(client, set(LABELS))

    in_fleet(cluster, work)


async def until_ready(client: AsyncClient, names: set[str]) -> None:
    """Until the router picks among these and no others."""
    async with asyncio.timeout(10):
        while {each.info.engine_id for each in (await client.status()).engines if each.state == "ready"} != names:
            pass


def test_what_is_known_of_the_links(cluster: Cluster) -> None:
    async def work(engines: Engines) -> None:
        for engine in engines.values():
            info = await engine.info()
            assert {link.engine_id for link in info.links} == set(engines) - {engine.name}
            for link in info.links:
                assert (link.state, link.transport) == ("ready", "shm")
                assert link.gigabytes_per_second > 0

    in_fleet(cluster, work)


def test_a_link_that_is_not_what_was_required_is_refused() -> None:
    async def work(cluster: Cluster) -> None:
        async with open_engines(await asyncio.to_thread(cluster.endpoints), met=False) as engines:
            picky, other = engines["picky"], engines["e0"]
            info = await picky.until(lambda info: [link.state for link in info.links] == ["refused"])
            (link,) = info.links
            assert (link.engine_id, link.transport) == ("e0", "shm")
            why = "KV would go over shm; cuda_ipc is required"
            assert link.detail == why
            prompt = prompt_of(100)
            kv = await other.prep_recv(prompt)
            with pytest.raises(TransferFailed, match=why):
                await picky.sending(prompt, kv)
            assert (await picky.stats())["transfer_pushed_bytes"] == 0
            assert await other.release(kv) == "freed"
            for engine in engines.values():
                await engine.until_whole()

    with Cluster(0, engine_args=(*FAKE, "--transport", "nixl")) as cluster:
        cluster.add_engine("e0", wait=False)
        cluster.add_engine("picky", "--require-link", "cuda_ipc", wait=False)
        cluster.wait_ready(2)
        asyncio.run(work(cluster))
