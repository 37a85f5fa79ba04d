"""The strategy changes under 200 concurrent streams: nobody notices, and nobody is served by a mix of two."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import httpx
from tests.cluster import FAKE, Cluster
from tests.engine_calls import open_engines
from tests.router_support import folder_with_tokenizer
from tests.soak import FOLDER, reference

from microserve.runtime.client import AsyncClient

if TYPE_CHECKING:
    from pathlib import Path

STREAMS = 200
TOKENS = 60
CHANGES = 8
POOLS = "ab"
POOLED = """
from microserve import strategy

@strategy
async def pooled(request, fleet, *, pool: str = "a"):
    async for chunk in fleet.pick(f"pool={pool}").start_generate():
        yield chunk
"""


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


def test_no_request_of_several_choices_is_served_by_a_mix(tmp_path: Path) -> None:
    """Half of the requests is another version's. Engines tell which one served each of a request's choices."""

    async def ask(web: httpx.AsyncClient, number: int) -> tuple[str, frozenset[str]]:
        body = {"model": "m", "prompt": [[1, 2, 3], [4, 5]], "n": 3, "max_tokens": 3, "ignore_eos": True}
        answer = await web.post("/v1/completions", json=body, headers={"x-request-id": f"r{number}"})
        assert len(answer.json()["choices"]) == 6
        return answer.headers["x-microserve-strategy"], frozenset(answer.headers["x-microserve-engine"].split(","))

    async def main(cluster: Cluster) -> None:
        async with AsyncClient(cluster.router) as client, httpx.AsyncClient(base_url=cluster.http, timeout=60) as web:
            versions = {
                pool: await set_pool(client, pool, share, strategy="pooled") for pool, share in (("a", 1.0), ("b", 0.5))
            }
            served = Counter(await asyncio.gather(*(ask(web, number) for number in range(60))))
            assert served.keys() == {(versions[pool], frozenset({f"e-{pool}"})) for pool in POOLS}

    strategies = tmp_path / "strategies"
    strategies.mkdir()
    (strategies / "pooled.py").write_text(POOLED)
    engines = (*FAKE[:-2], "--model", folder_with_tokenizer(tmp_path), "--model-name", "m")
    router = ("--strategy", "pooled", "--strategy-folder", str(strategies))
    with Cluster(0, engine_args=engines, router_args=router) as cluster:
        for pool in POOLS:
            cluster.add_engine(f"e-{pool}", "--labels", f"pool={pool}", wait=False)
        cluster.wait_ready(len(POOLS))
        asyncio.run(main(cluster))


async def set_pool(client: AsyncClient, pool: str, share: float = 1.0, *, strategy: str = "pair") -> str:
    """The version that serves so much from now on."""
    reply = await client.set_strategy(strategy, settings={"pool": pool}, share=share)
    return reply.active[-1].version
