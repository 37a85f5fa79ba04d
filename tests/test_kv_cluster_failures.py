"""Engines that die or stall while KV moves between them, as processes: no hang, no leak, no wrong token."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.cluster import daemon_environ
from tests.push_rig import LOST, OUTPUT, PAGES, Rig, expected, in_fleet, make_cluster, prompt_of
from tests.soak import FOLDER

from microserve.runtime.client import AsyncClient
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import DeadlineExceeded, LeaseNotFound, MicroserveError, StaleEpoch
from microserve.runtime.messages import Forgo, KvAddress, Released

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """For tests after which every process still lives."""
    with make_cluster() as running:
        yield running


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    with make_cluster() as running:
        yield running


# --- the sender --------------------------------------------------------------------------------------------------


def test_a_sender_that_dies_before_its_push(own_cluster: Cluster) -> None:
    """Its death is proven on the same host: the receiver waits no longer, and nobody has to tell it."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=1)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        sending = rig.sender.sending(prompt, kv)
        generating = asyncio.create_task(rig.receiver.generate(prompt, OUTPUT, kv=kv, kv_wait=60))
        await rig.until_claimed()
        rig.daemon(rig.sender).kill()
        with pytest.raises(LOST):
            await sending
        async with asyncio.timeout(15):
            tokens, done, _ = await generating
        assert tokens == expected(prompt)
        assert (done.received_tokens, done.recomputed_tokens) == (0, len(prompt))

    in_fleet(own_cluster, work)


def test_a_sender_that_dies_during_its_push(own_cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=2)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        async with rig.push_under_way(kv, prompt) as sending:
            rig.daemon(rig.sender).kill()
        with pytest.raises(LOST):
            await sending
        async with asyncio.timeout(15):
            tokens, done, _ = await rig.receiver.generate(prompt, OUTPUT, kv=kv, kv_wait=60)
        assert tokens == expected(prompt)
        assert (done.received_tokens, done.recomputed_tokens) == (0, len(prompt))

    in_fleet(own_cluster, work)


def test_a_sender_that_dies_after_its_push(own_cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=3)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        assert (await rig.sender.sending(prompt, kv)).bytes == PAGES << 20
        rig.daemon(rig.sender).kill()
        tokens, done, _ = await rig.receiver.generate(prompt, OUTPUT, kv=kv)
        assert tokens == expected(prompt)
        assert (done.received_tokens, done.recomputed_tokens) == (len(prompt), 0)

    in_fleet(own_cluster, work)


def test_a_sender_that_stalls_during_its_push(cluster: Cluster) -> None:
    """Its pages are not used for anything else until it has come back and said that its push is over."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=4)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        async with rig.push_under_way(kv, prompt) as sending:
            rig.daemon(rig.sender).pause()
        with contextlib.ExitStack() as stack:
            stack.callback(rig.daemon(rig.sender).resume)
            async with asyncio.timeout(10):
                tokens, done, _ = await rig.receiver.generate(prompt, OUTPUT, kv=kv, kv_wait=1.0)
            assert tokens == expected(prompt)
            assert (done.received_tokens, done.recomputed_tokens) == (0, len(prompt))
            load = (await rig.receiver.info()).load
            assert load.quarantined_pages == PAGES
            assert load.leased_pages == 0
        await asyncio.wait([sending])
        await rig.receiver.until(lambda info: info.load.quarantined_pages == 0)

    in_fleet(cluster, work)


def test_a_sender_that_stalls_and_is_killed(own_cluster: Cluster) -> None:
    """The proof of its death ends the quarantine."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=5)
        kv = await rig.receiver.prep_recv(prompt)
        async with rig.push_under_way(kv, prompt) as sending:
            rig.daemon(rig.sender).pause()
        assert await rig.receiver.release(kv) == "quarantined"
        assert (await rig.receiver.info()).load.quarantined_pages == PAGES
        rig.daemon(rig.sender).kill()
        with pytest.raises(LOST):
            await sending
        await rig.receiver.until(lambda info: info.load.quarantined_pages == 0)

    in_fleet(own_cluster, work)


def test_a_lease_that_is_released_during_a_push(cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=6)
        kv = await rig.receiver.prep_recv(prompt)
        async with rig.push_under_way(kv, prompt) as sending:
            rig.daemon(rig.sender).pause()
        with contextlib.ExitStack() as stack:
            stack.callback(rig.daemon(rig.sender).resume)
            assert await rig.receiver.release(kv) == "quarantined"
            assert await rig.receiver.release(kv) == "unknown"
            load = (await rig.receiver.info()).load
            assert (load.quarantined_pages, load.leased_pages) == (PAGES, 0)
        await asyncio.wait([sending])
        with contextlib.suppress(MicroserveError):
            sending.result()
        await rig.receiver.until(lambda info: info.load.quarantined_pages == 0)

    in_fleet(cluster, work)


def test_a_lease_that_expires_during_a_push() -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=8)
        kv = await rig.receiver.prep_recv(prompt)
        async with rig.push_under_way(kv, prompt) as sending:
            rig.daemon(rig.sender).pause()
        with contextlib.ExitStack() as stack:
            stack.callback(rig.daemon(rig.sender).resume)
            info = await rig.receiver.until(lambda info: info.load.leased_pages == 0)
            assert info.load.quarantined_pages == PAGES
            with pytest.raises(LeaseNotFound):
                await rig.receiver.generate(prompt, OUTPUT, kv=kv)
        await asyncio.wait([sending])
        with contextlib.suppress(MicroserveError):
            sending.result()
        await rig.receiver.until(lambda info: info.load.quarantined_pages == 0)
        # The session of the test may have ended in the sender's silence.
        await rig.engines.connect("e1", (await asyncio.to_thread(rig.cluster.endpoints))["e1"])

    # Shorter than the silence after which the engines would take each other for lost.
    with make_cluster("--lease-term", "2") as cluster:
        in_fleet(cluster, work)


# --- the receiver --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [False, True], ids=["not yet claimed", "claimed"])
def test_a_receiver_that_dies_before_a_push(own_cluster: Cluster, claimed: bool) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=13)
        kv = await rig.receiver.prep_recv(prompt)
        if claimed:
            sending = rig.sender.sending(prompt, kv)
            await rig.until_claimed()
            rig.daemon(rig.receiver).kill()
        else:
            rig.daemon(rig.receiver).kill()
            sending = rig.sender.sending(prompt, kv)
        async with asyncio.timeout(15):
            with pytest.raises(LOST):
                await sending
        assert (await rig.sender.stats())["transfer_pushed_bytes"] == 0
        await rig.sender.until_whole()
        await rig.back("e0")

    in_fleet(own_cluster, work)


def test_a_receiver_that_stalls_before_a_push(cluster: Cluster) -> None:
    """It cannot grant the claim. One that it grants when it has come back is given back at once."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=14)
        kv = await rig.receiver.prep_recv(prompt)
        before = (await rig.sender.stats())["transfer_pushed_bytes"]
        with rig.stopped(rig.receiver):
            async with asyncio.timeout(8):
                with pytest.raises((DeadlineExceeded, *LOST)):
                    await rig.sender.sending(prompt, kv)
            await rig.sender.until_whole()
        assert (await rig.sender.stats())["transfer_pushed_bytes"] == before
        # The session of the test may have ended in its silence, and the lease with it.
        await rig.engines.connect("e0", (await asyncio.to_thread(rig.cluster.endpoints))["e0"])
        await rig.receiver.release(kv)
        await rig.receiver.until_whole()

    in_fleet(cluster, work)


def test_a_receiver_that_dies_during_a_push_and_the_address_of_its_past(own_cluster: Cluster) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=9)
        kv = await rig.receiver.prep_recv(prompt)
        async with rig.push_under_way(kv, prompt) as sending:
            rig.daemon(rig.receiver).kill()
            async with asyncio.timeout(15):
                with pytest.raises(LOST):
                    await sending
        await rig.sender.until_whole()
        await rig.back("e0")
        await rig.engines.until_met()
        before = await asyncio.to_thread(rig.cluster.page_digests, "e0", pages=range(PAGES))
        with pytest.raises(StaleEpoch):
            await rig.sender.sending(prompt, kv)
        assert await asyncio.to_thread(rig.cluster.page_digests, "e0", pages=range(PAGES)) == before
        assert (await rig.receiver.info()).load.leased_pages == 0

    in_fleet(own_cluster, work)


def test_a_receiver_that_stalls_during_a_push(cluster: Cluster) -> None:
    """The send ends when its time is over; its pages are kept until nothing reads them."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=10)
        kv = await rig.receiver.prep_recv(prompt)
        async with rig.push_under_way(kv, prompt, budget=2.0) as sending:
            with pytest.raises((DeadlineExceeded, *LOST)):
                await sending
            stats = await rig.sender.stats()
            assert (stats["transfer_active"], stats["cache_locks"]) == (1, 1)
            assert await rig.sender.evict() == 0
        # The session of the test may have ended in its silence.
        await rig.engines.connect("e0", rig.cluster.endpoints()["e0"])
        await rig.receiver.until_whole()
        await rig.sender.until_whole()

    in_fleet(cluster, work)


# --- the router ----------------------------------------------------------------------------------------------------


def test_a_router_that_dies_while_its_strategy_has_prepared_and_not_sent() -> None:
    async def work(rig: Rig) -> None:
        prompt, cluster = prompt_of(PAGES, seed=13), rig.cluster
        async with AsyncClient(cluster.router) as client:
            asking = asyncio.create_task(client.generate(prompt, max_tokens=OUTPUT))
            await rig.receiver.until(lambda info: info.load.leased_pages >= PAGES)
            assert cluster.router_daemon is not None
            cluster.router_daemon.kill()
            with pytest.raises(LOST):
                await asking
        await rig.receiver.until(lambda info: info.load.leased_pages == 0, limit=10)
        # The next one, of the same name, is served by both.
        await asyncio.to_thread(cluster.start_router)
        await asyncio.to_thread(cluster.wait_ready, 2)

    with make_cluster(router_args=("--strategy-folder", str(FOLDER), "--strategy", "prepares")) as own:
        in_fleet(own, work)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stalls"])
def test_a_router_that_ends_between_prep_recv_and_remote_send(cluster: Cluster, end: signal.Signals) -> None:
    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=11)
        endpoint = (await asyncio.to_thread(cluster.endpoints))["e0"]
        router = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tests.doomed_router", endpoint, pack_tokens(prompt).hex()),
            stdout=asyncio.subprocess.PIPE,
            env=daemon_environ(),
        )
        assert router.stdout is not None
        address = msgspec.msgpack.decode(bytes.fromhex((await router.stdout.readline()).decode()), type=KvAddress)
        assert (await rig.receiver.info()).load.leased_pages >= PAGES
        router.send_signal(end)
        try:
            # Long before its term of half a minute is over.
            await rig.receiver.until(lambda info: info.load.leased_pages == 0, limit=10)
            with pytest.raises(LeaseNotFound):
                await rig.sender.sending(prompt, address)
        finally:
            if end != signal.SIGKILL:
                router.kill()
            await router.communicate()

    in_fleet(cluster, work)


def test_forgone_while_its_sender_stalls(cluster: Cluster) -> None:
    """What a router does when a send has failed: the receiver computes at once, whatever it would have waited."""

    async def work(rig: Rig) -> None:
        prompt = prompt_of(PAGES, seed=12)
        kv = await rig.receiver.prep_recv(prompt, expect_tokens=OUTPUT)
        with contextlib.ExitStack() as stack:
            sending = rig.sender.sending(prompt, kv)
            generating = asyncio.create_task(rig.receiver.generate(prompt, OUTPUT, kv=kv, kv_wait=60))
            await rig.until_claimed()
            stack.enter_context(rig.stopped(rig.sender))
            outcome = await rig.receiver.ask(Forgo(lease=kv.lease, begin=0, end=len(prompt)), Released)
            assert outcome.outcome == "quarantined"
            async with asyncio.timeout(10):
                tokens, done, _ = await generating
            assert (tokens, done.recomputed_tokens) == (expected(prompt), len(prompt))
        await asyncio.wait([sending])

    in_fleet(cluster, work)
