"""The strategy changes under 200 concurrent streams: nobody notices, and nobody is served by a mix of two."""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.cluster import FAKE, Cluster
from tests.engine_calls import open_engines
from tests.soak import FOLDER, reference

from microserve.runtime.client import AsyncClient

STREAMS = 200
TOKENS = 60
CHANGES = 8
POOLS = "ab"


def test_a_switch_under_200_streams() -> None:
    """Two pools of a prefill and a decode engine each; a version of the strategy uses one of them, and nothing else."""

    async def stream(client: AsyncClient, number: int) -> tuple[str, str]:
        """The version that served it, and the engine that decoded."""
        prompt = [number, *range(40)]
        tokens: list[int] = []
        stream = client.stream(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
        async for delta in stream:
            tokens += delta.token_ids
        assert tokens == reference(prompt, TOKENS)
        return stream.completion.strategy, stream.completion.engine

    async def main(cluster: Cluster) -> None:
        async with open_engines(cluster.endpoints()) as engines, AsyncClient(cluster.router) as client:
            versions = {pool: await set_pool(client, pool) for pool in POOLS}
            assert len(set(versions.values())) == 2
            served: list[tuple[str, str]] = []
            one_more = asyncio.Event()
            numbers = iter(range(1_000_000))
            going = True

            async def keep_one() -> None:
                """One stream after the other, for as long as the strategy changes."""
                while going:
                    served.append(await stream(client, next(numbers)))
                    one_more.set()

            async with asyncio.TaskGroup() as group:
                for _ in range(STREAMS):
                    group.create_task(keep_one())
                for change in range(CHANGES):
                    enough = len(served) + STREAMS
                    await set_pool(client, POOLS[change % 2])
                    async with asyncio.timeout(60):
                        while len(served) < enough:
                            one_more.clear()
                            await one_more.wait()
                going = False
            assert Counter(served).keys() == {(versions[pool], f"decode-{pool}") for pool in POOLS}
            assert min(Counter(served).values()) >= STREAMS
            for name, engine in engines.items():
                await engine.until_whole()
                sent = {link.engine_id for link in (await engine.info()).links if link.sent_bytes}
                role, pool = name.split("-")
                assert sent == ({f"decode-{pool}"} if role == "prefill" else set())

    router = ("--strategy", "pair", "--strategy-folder", str(FOLDER))
    with Cluster(0, engine_args=FAKE, router_args=router) as cluster:
        for pool in POOLS:
            for role in ("prefill", "decode"):
                cluster.add_engine(f"{role}-{pool}", "--labels", f"{role}={pool}", "--max-running", "256", wait=False)
        cluster.wait_ready(2 * len(POOLS))
        asyncio.run(main(cluster))


async def set_pool(client: AsyncClient, pool: str) -> str:
    """The version that serves from now on."""
    reply = await client.set_strategy("pair", settings={"pool": pool})
    (active,) = reply.active
    return active.version
