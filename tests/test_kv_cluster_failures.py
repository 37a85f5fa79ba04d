"""Engines that die or stall while KV moves between them, as processes: no hang, no leak, no wrong token.

KV goes over TCP: through shared memory a push is over within the call that begins it, and "during" would be nothing.
Pages are of a mebibyte, and a stopped receiver takes no more than its socket holds, so a push to it is surely under way
when the sender says so. The fake executor's tokens depend on every page: a torn or foreign one shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from tests.cluster import Cluster, daemon_environ, state_of
from tests.engine_calls import EngineCalls, Engines, open_engines

from microserve.engine.fake_executor import fake_model, fake_tokens
from microserve.engine.plan import SequenceStart
from microserve.runtime.codec import pack_tokens
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import (
    DeadlineExceeded,
    LeaseNotFound,
    MicroserveError,
    PeerError,
    StaleEpoch,
    TransferFailed,
    Unavailable,
)
from microserve.runtime.messages import Forgo, KvAddress, Released, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from tests.cluster import Daemon

    from microserve.runtime.messages import SendReport, StatusReply

PAGE = 16
PAGES = 64
OUTPUT = 5
MODEL = fake_model(EngineConfig(model="tokens-only", executor="fake"))
LOST = (PeerError, Unavailable, TransferFailed)
"""What a send ends with when one of its ends has gone."""

ENGINE = (
    *("--executor", "fake", "--model", "tokens-only", "--transport", "nixl", "--kv-pages", "256"),
    # A prompt takes half a second: time enough to do something between its claim and its push.
    *("--fake-decode-base-us", "1000", "--fake-prefill-us-per-token", "500", "--step-tokens", "4096"),
)


class Rig:
    """A receiver and a sender, as processes and as what they are called by."""

    def __init__(self, cluster: Cluster, engines: Engines) -> None:
        self.cluster = cluster
        self.engines = engines

    @property
    def receiver(self) -> EngineCalls:
        return self.engines["e0"]

    @property
    def sender(self) -> EngineCalls:
        return self.engines["e1"]

    def daemon(self, engine: EngineCalls) -> Daemon:
        """The living process of that name."""
        return next(each for each in self.cluster.engines if each.name == engine.name and each.alive)

    @contextmanager
    def stopped(self, engine: EngineCalls) -> Iterator[None]:
        """SIGSTOP, until the end of the block."""
        daemon = self.daemon(engine)
        daemon.pause()
        try:
            yield
        finally:
            daemon.resume()

    async def until_claimed(self) -> None:
        await self._until(self.receiver, "lease_open_claims")

    async def until_pushing(self) -> None:
        await self._until(self.sender, "transfer_active")

    @staticmethod
    async def _until(engine: EngineCalls, gauge: str) -> None:
        async with asyncio.timeout(10):
            # Each asking takes a round trip, so this does not spin.
            while not (await engine.stats())[gauge]:
                pass

    @asynccontextmanager
    async def push_under_way(
        self, kv: KvAddress, prompt: list[int], budget: float = 60.0
    ) -> AsyncIterator[asyncio.Task[SendReport]]:
        """A push that has begun, and cannot end before the block does: its receiver is stopped."""
        sending = self.sender.sending(prompt, kv, budget=budget)
        await self.until_claimed()
        with self.stopped(self.receiver):
            await self.until_pushing()
            yield sending

    async def back(self, name: str) -> None:
        """An engine that was killed is started again, under its name."""
        before = (await asyncio.to_thread(self.cluster.endpoints))[name]
        await asyncio.to_thread(self.cluster.add_engine, name, wait=False)

        def anew(status: StatusReply) -> bool:
            return state_of(status, name) == "ready" and self.cluster.endpoints()[name] != before

        await asyncio.to_thread(self.cluster.wait_for, anew, f"a new {name} to be ready")
        await self.engines.connect(name, (await asyncio.to_thread(self.cluster.endpoints))[name])

    async def check(self) -> None:
        """What went wrong has left nothing behind."""
        living = {daemon.name for daemon in self.cluster.engines if daemon.alive}
        alive = [engine for name, engine in self.engines.items() if name in living]
        if len(alive) == 2:
            await self.engines.until_met()
            prompt = prompt_of(PAGES, seed=100)
            kv = await self.receiver.prep_recv(prompt)
            assert (await self.sender.sending(prompt, kv)).bytes == PAGES << 20
            tokens, done, _ = await self.receiver.generate(prompt, OUTPUT, kv=kv)
            assert (tokens, done.received_tokens, done.recomputed_tokens) == (expected(prompt), len(prompt), 0)
        for engine in alive:
            await engine.until_whole()


def prompt_of(pages: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng([pages, seed]).integers(0, 30_000, pages * PAGE).tolist()
    return found


def expected(prompt: list[int]) -> list[int]:
    tokens = np.array(prompt, dtype=np.int32)
    start = SequenceStart(0, tokens, len(tokens), SamplingParams(), 0, MODEL.eos_token_ids)
    return fake_tokens(tokens, start, MODEL, count=OUTPUT)


def make_cluster(*args: str) -> Cluster:
    return Cluster(2, engine_args=(*ENGINE, *args), digests=True, page_kib=1024, environ={"UCX_TLS": "tcp"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """For tests after which every process still lives."""
    with make_cluster() as running:
        yield running


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    with make_cluster() as running:
        yield running


def in_fleet(cluster: Cluster, work: Callable[[Rig], Awaitable[None]]) -> None:
    """Runs `work`, after which the engines that live have to be whole, and to move KV if they are two."""

    async def main() -> None:
        async with open_engines(await asyncio.to_thread(cluster.endpoints)) as engines:
            for engine in engines.values():
                await engine.evict()
            rig = Rig(cluster, engines)
            await work(rig)
            await rig.check()

    asyncio.run(main())


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
            # Asked while it is stopped; answered when it goes on, before the push can have ended.
            released = asyncio.create_task(rig.receiver.release(kv))
            await asyncio.sleep(0)
        assert await released in ("quarantined", "freed")
        with contextlib.suppress(MicroserveError):
            await sending
        await rig.receiver.until_whole()

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


def test_a_router_that_dies_between_prep_recv_and_remote_send(cluster: Cluster) -> None:
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
        router.kill()
        await router.communicate()
        # Long before its term of half a minute is over.
        await rig.receiver.until(lambda info: info.load.leased_pages == 0, limit=10)
        with pytest.raises(LeaseNotFound):
            await rig.sender.sending(prompt, address)

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
