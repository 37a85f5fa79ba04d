"""Engine processes that are asked twice: by a second sender, by a caller who repeats himself, by each other."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from tests.push_rig import LOST, OUTPUT, PAGE, PAGES, Rig, expected, in_fleet, make_cluster, prompt_of

from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import Busy, Cancelled, Conflict, LeaseNotFound
from microserve.runtime.messages import (
    Abort,
    Aborted,
    CacheEvict,
    CacheEvicted,
    CacheMatch,
    CacheMatched,
    CachePin,
    CacheUnpin,
    Commit,
    Committed,
    Forgo,
    Prepared,
    PrepRecv,
    Released,
    RemoteSend,
    SendReport,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster
    from tests.engine_calls import EngineCalls

    from microserve.runtime.messages import KvAddress

SENT = PAGES << 20
UNHURRIED = ("--fake-prefill-us-per-token", "700")
"""A second sender is asked and refused before the first one pushes, on a busy machine, too."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """For tests after which every process still lives."""
    with make_cluster(*UNHURRIED, engines=3) as running:
        yield running


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    with make_cluster(*UNHURRIED, engines=3) as running:
        yield running


async def pushed(engine: EngineCalls) -> float:
    """Bytes that it has pushed so far."""
    return (await engine.stats())["transfer_pushed_bytes"]


# --- a second sender for a range that has one ----------------------------------------------------------------------


async def refused(rig: Rig, prompt: list[int], kv: KvAddress) -> None:
    """A second sender is asked for what the first has claimed; it is refused, and writes nothing."""
    before = await pushed(rig.other)
    with pytest.raises(Conflict):
        await rig.other.sending(prompt, kv)
    await rig.other.until_whole()
    assert await pushed(rig.other) == before


def test_a_hedged_second_sender_is_refused(cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=20)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        generating = asyncio.create_task(rig.receiver.generate(prompt, OUTPUT, kv=kv))
        sending = rig.sender.sending(prompt, kv)
        await rig.until_claimed()
        await refused(rig, prompt, kv)
        assert not sending.done()
        assert (await sending).bytes == SENT
        tokens, done, _ = await generating
        assert (tokens, done.received_tokens, done.recomputed_tokens) == (expected(prompt), len(prompt), 0)

    in_fleet(cluster, work)


def test_a_first_sender_that_stalls_after_the_second_was_refused(cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=21)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        sending = rig.sender.sending(prompt, kv)
        await rig.until_claimed()
        await refused(rig, prompt, kv)
        with contextlib.ExitStack() as stack:
            with rig.stopped(rig.receiver):
                await rig.until_pushing()
                stack.enter_context(rig.stopped(rig.sender))
            # The range is the first one's, whatever has become of it.
            await refused(rig, prompt, kv)
            async with asyncio.timeout(10):
                tokens, done, _ = await rig.receiver.generate(prompt, OUTPUT, kv=kv, kv_wait=0.5)
            assert tokens == expected(prompt)
            assert (done.received_tokens, done.recomputed_tokens) == (0, len(prompt))
            assert (await rig.receiver.info()).load.quarantined_pages == PAGES
            # What helps is another lease.
            await rig.receiver.evict()
            again = await rig.receiver.prep_recv(prompt)
            assert (await rig.other.sending(prompt, again)).bytes == SENT
            assert await rig.receiver.commit(again, wait=10) == len(prompt)
        await asyncio.wait([sending])
        await rig.receiver.until(lambda info: info.load.quarantined_pages == 0)

    in_fleet(cluster, work)


def test_a_first_sender_that_dies_after_the_second_was_refused(own_cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=22)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        generating = asyncio.create_task(rig.receiver.generate(prompt, OUTPUT, kv=kv, kv_wait=60))
        sending = rig.sender.sending(prompt, kv)
        await rig.until_claimed()
        await refused(rig, prompt, kv)
        with rig.stopped(rig.receiver):
            await rig.until_pushing()
            rig.daemon(rig.sender).kill()
        with pytest.raises(LOST):
            await sending
        async with asyncio.timeout(15):
            tokens, done, _ = await generating
        assert tokens == expected(prompt)
        assert (done.received_tokens, done.recomputed_tokens) == (0, len(prompt))

    in_fleet(own_cluster, work)


# --- calls that are repeated ---------------------------------------------------------------------------------------


def ids(name: str) -> dict[str, Any]:
    return {"request_id": name, "sub_id": name}


def test_each_verb_is_repeated(cluster: Cluster) -> None:
    """A lease from its beginning to its end, everything asked at least twice."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=23)
        receiver, sender = rig.receiver, rig.sender
        before = await pushed(sender)

        prepare = PrepRecv(**ids("prepare"), prompt=pack_tokens(prompt))
        prepared = await asyncio.gather(*(receiver.ask(prepare, Prepared) for _ in range(2)))
        assert prepared[0] == prepared[1] == await receiver.ask(prepare, Prepared)
        assert (await receiver.info()).load.leased_pages == PAGES
        kv = prepared[0].address

        send = RemoteSend(**ids("send"), prompt=pack_tokens(prompt), address=kv, begin=0, end=len(prompt))
        commit = Commit(**ids("commit"), lease=kv.lease, wait=30)
        committing = [asyncio.create_task(receiver.ask(commit, Committed)) for _ in range(2)]
        first = asyncio.create_task(sender.ask(send, SendReport))
        await rig.until_claimed()
        second = asyncio.create_task(sender.ask(send, SendReport))
        assert (await first).bytes == SENT
        assert await first == await second == await sender.ask(send, SendReport)
        assert await pushed(sender) - before == SENT

        ends = [*await asyncio.gather(*committing), await receiver.ask(commit, Committed)]
        assert [each.committed_until for each in ends] == [len(prompt)] * 3
        assert [await receiver.release(kv) for _ in range(2)] == ["unknown"] * 2
        with pytest.raises(Conflict):
            await receiver.ask(Commit(**ids("prepare"), lease=kv.lease), Committed)
        with pytest.raises(LeaseNotFound):
            await receiver.commit(kv)

    in_fleet(cluster, work)


def test_release_and_forgo_are_repeated(cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        kv = await rig.receiver.prep_recv(prompt_of(PAGES, seed=24))
        forgo = Forgo(lease=kv.lease, begin=0, end=PAGE)
        assert [(await rig.receiver.ask(forgo, Released)).outcome for _ in range(2)] == ["freed"] * 2
        assert [await rig.receiver.release(kv) for _ in range(3)] == ["freed", "unknown", "unknown"]
        assert (await rig.receiver.ask(forgo, Released)).outcome == "unknown"

    in_fleet(cluster, work)


def test_abort_is_repeated(cluster: Cluster) -> None:
    """A send that is aborted before its push ends its claim; asked for again, it does not begin again."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=25)
        kv = await rig.receiver.prep_recv(prompt)
        before = await pushed(rig.sender)
        send = RemoteSend(**ids("aborted"), prompt=pack_tokens(prompt), address=kv, begin=0, end=len(prompt))
        sending = asyncio.create_task(rig.sender.ask(send, SendReport))
        await rig.until_claimed()
        outcomes = [(await rig.sender.ask(Abort(sub_id="aborted"), Aborted)).outcome for _ in range(3)]
        assert outcomes == ["freed", "unknown", "unknown"]
        with pytest.raises(Cancelled):
            await sending
        with pytest.raises(Cancelled):
            await rig.sender.ask(send, SendReport)
        await rig.sender.until_whole()
        assert await pushed(rig.sender) == before
        assert [await rig.receiver.release(kv) for _ in range(2)] == ["freed", "unknown"]

    in_fleet(cluster, work)


def test_the_cache_verbs_are_repeated(cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(4, seed=26)
        data = pack_tokens(prompt)
        engine = rig.receiver
        await engine.generate(prompt, 1)
        matched = CacheMatched(tokens=len(prompt))
        for verb in (CacheMatch(prompt=data), CachePin(prompt=data, ttl=60.0)):
            assert [await engine.ask(verb, CacheMatched) for _ in range(2)] == [matched] * 2
        assert [await engine.evict() for _ in range(2)] == [0, 0]
        # Pins are no count: one end is enough for however many.
        unpinned = [await engine.ask(CacheUnpin(prompt=data), CacheMatched) for _ in range(2)]
        assert unpinned == [matched, CacheMatched(tokens=0)]
        evict = CacheEvict(prompt=data)
        assert [(await engine.ask(evict, CacheEvicted)).pages for _ in range(2)] == [4, 0]

    in_fleet(cluster, work)


# --- engines that wait for each other ------------------------------------------------------------------------------


def test_two_engines_that_fill_each_other_with_leases(cluster: Cluster) -> None:
    """Both have leased what they may, and each of them has to compute what the other waits for."""

    async def work(rig: Rig) -> None:
        ways = [(rig.sender, rig.receiver), (rig.receiver, rig.sender)]
        leases: list[tuple[EngineCalls, EngineCalls, list[int], KvAddress]] = []
        for number in range(2):
            for direction, (sender, receiver) in enumerate(ways):
                prompt = prompt_of(PAGES - 1, seed=30 + 2 * number + direction)
                leases.append((sender, receiver, prompt, await receiver.prep_recv(prompt, expect_tokens=PAGE)))
        for engine in (rig.sender, rig.receiver):
            assert (await engine.info()).load.leased_pages == 2 * PAGES
            with pytest.raises(Busy):
                await engine.prep_recv(prompt_of(PAGES - 1, seed=40))

        async def serve(sender: EngineCalls, receiver: EngineCalls, prompt: list[int], kv: KvAddress) -> None:
            sending = sender.sending(prompt, kv)
            tokens, done, _ = await receiver.generate(prompt, OUTPUT, kv=kv)
            assert (tokens, done.received_tokens, done.recomputed_tokens) == (expected(prompt), len(prompt), 0)
            assert (await sending).bytes == (PAGES - 1) << 20

        async with asyncio.timeout(20):
            await asyncio.gather(*(serve(*lease) for lease in leases))
        # And whoever had been refused has room again.
        for engine in (rig.sender, rig.receiver):
            await engine.release(await engine.prep_recv(prompt_of(PAGES - 1, seed=40)))

    in_fleet(cluster, work)
