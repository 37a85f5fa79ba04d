"""A thousand requests under strategies that change twice a second, a third of them cancelled at a random moment.

Every request ends once, with exactly its tokens; afterwards every page of every engine is free or cached.
"""

from __future__ import annotations

import asyncio

import pytest
from tests.cluster import FAKE, Cluster
from tests.engine_calls import open_engines
from tests.simulation import ROUTER, Deployment
from tests.soak import FOLDER, Soak
from tests.virtual_time import run_virtual

from microserve.router.strategies.files import run_file
from microserve.runtime.config import FakeConfig
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.zmq_bus import ZmqBus

COUNT = 1000


@pytest.mark.parametrize("pages", [128, 512], ids=["short of pages", "pages enough"])
def test_a_thousand_requests_in_virtual_time(pages: int) -> None:
    """With engines that check every page they read."""
    file = FOLDER / "soak.py"
    strategies = run_file(file, file.read_text())
    assert isinstance(strategies, list)

    async def main() -> None:
        async with Deployment(
            {"a": {}, "b": {}, "c": {}},
            fake=FakeConfig(decode_base_us=20_000, decode_us_per_sequence=100, prefill_us_per_token=50),
            seconds_per_page=0.002,
            strategies=strategies,
            router={"strategy": "alone"},
            kv_pages=pages,
            max_running=16,
            step_tokens=128,
            seed=pages,
        ) as deployment:
            soak = Soak(COUNT, in_flight=24, seed=pages)
            await deployment.network.bus(Peer("client", "soak", 1)).dial(ROUTER, soak.recorder)
            await soak.run(600)
            soak.check(most_refused=0.02 if pages > 128 else 0.5)
            await deployment.settle_whole()
            for engine in deployment.engines.values():
                # Every engine had KV moved into its pool, under claims that other engines had on it.
                assert engine.core.receiving.statistics()["lease_arrived_pages"] > 0

    run_virtual(main())


def test_a_thousand_requests_of_processes() -> None:
    async def main(cluster: Cluster) -> None:
        async with open_engines(cluster.endpoints()) as engines:
            bus = ZmqBus(Peer("client", "soak", new_epoch()))
            try:
                soak = Soak(COUNT, in_flight=32, seed=1)
                await bus.dial(cluster.router, soak.recorder)
                await soak.run(60)
            finally:
                await bus.close()
            soak.check()
            for engine in engines.values():
                await engine.until_whole()
                assert (await engine.stats())["lease_arrived_pages"] > 0

    # Slow enough that every strategy of the mix has its half second.
    slow = [*FAKE, "--fake-decode-base-us", "25000"]
    router = ("--strategy", "alone", "--strategy-folder", str(FOLDER))
    with Cluster(3, engine_args=slow, router_args=router) as cluster:
        asyncio.run(main(cluster))
