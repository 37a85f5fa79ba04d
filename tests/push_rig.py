"""Engine processes that push KV over TCP, which is slow enough to do something while they do, and by hand.

Through shared memory a push is over within the call that begins it, and "during" would be nothing. Pages are of a
mebibyte, and a stopped receiver takes no more than its socket holds, so a push to it is surely under way when the
sender says so. The fake executor's tokens depend on every page: a torn or foreign one shows.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
from tests.cluster import Cluster, state_of
from tests.engine_calls import EngineCalls, Engines, open_engines

from microserve.engine.fake_executor import fake_model, fake_tokens
from microserve.engine.plan import SequenceStart
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import PeerError, TransferFailed, Unavailable
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from tests.cluster import Daemon

    from microserve.runtime.messages import KvAddress, SendReport, StatusReply

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
    """A receiver and a sender, as processes and as what they are called by; and another sender, where there is one."""

    def __init__(self, cluster: Cluster, engines: Engines) -> None:
        self.cluster = cluster
        self.engines = engines

    @property
    def receiver(self) -> EngineCalls:
        return self.engines["e0"]

    @property
    def sender(self) -> EngineCalls:
        return self.engines["e1"]

    @property
    def other(self) -> EngineCalls:
        return self.engines["e2"]

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
        alive = [engine for name, engine in sorted(self.engines.items()) if name in living]
        if len(alive) > 1 and alive[0] is self.receiver:
            for engine in alive:
                await engine.until_met(*living)
            prompt = prompt_of(PAGES, seed=100)
            kv = await self.receiver.prep_recv(prompt)
            assert (await alive[1].sending(prompt, kv)).bytes == PAGES << 20
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


def make_cluster(*args: str, engines: int = 2, router_args: Sequence[str] = ()) -> Cluster:
    return Cluster(
        engines,
        engine_args=(*ENGINE, *args),
        router_args=router_args,
        digests=True,
        page_kib=1024,
        environ={"UCX_TLS": "tcp"},
    )


def in_fleet(cluster: Cluster, work: Callable[[Rig], Awaitable[None]]) -> None:
    """Runs `work`, after which the engines that live have to be whole, and to move KV if they are two."""

    async def main() -> None:
        async with open_engines(await asyncio.to_thread(cluster.endpoints)) as engines:
            for engine in engines.values():
                await engine.evict()
                # Or nothing here would show what it is to show.
                assert {link.transport for link in (await engine.info()).links} == {"tcp"}
            rig = Rig(cluster, engines)
            await work(rig)
            await rig.check()

    asyncio.run(main())
