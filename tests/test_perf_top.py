"""The engines that are only announced are to a router and an operator what engines are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from perf.announced import MODEL, Announced, name_of
from tests.cluster import Cluster

from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.messages import Load, StatusReply


async def seen(client: AsyncClient, holds: Callable[[StatusReply], bool]) -> StatusReply:
    async with asyncio.timeout(20):
        while True:
            status = await client.status()
            if holds(status):
                return status
            await asyncio.sleep(0.02)


def load_of(status: StatusReply) -> Load:
    """What the second engine said of itself."""
    return next(each.load for each in status.engines if each.info.engine_id == name_of(1))


def test_announced_engines_join_answer_and_leave() -> None:
    async def main(router: str) -> None:
        client = AsyncClient(router, connect_timeout=20.0)
        engines = [Announced(index, 3) for index in range(3)]
        try:
            for engine in engines:
                await engine.start(router)
            status = await seen(client, lambda it: [each.state for each in it.engines] == ["ready"] * 3)
            assert {each.info.engine_id for each in status.engines} == {"engine-000", "engine-001", "engine-002"}
            before = load_of(status)
            assert before.free_pages + before.owned_pages + before.leased_pages + before.cached_pages == 65_536
            # Every heartbeat says something else.
            await seen(client, lambda it: load_of(it).generated_tokens > before.generated_tokens)
            asked = client.engine(name_of(1))
            info = await asked.info()
            assert [(link.engine_id, link.state) for link in info.links] == [
                ("engine-000", "ready"),
                ("engine-002", "ready"),
            ]
            assert [each.pages for each in await asked.cache_prefixes(3)] == [320, 312, 304]
            with pytest.raises(InvalidRequest, match="CacheEvict means nothing"):
                await asked.cache_evict()
            answer = asyncio.create_task(client.generate([1, 2, 3], model=MODEL, max_tokens=2, ignore_eos=True))
            while not answer.done():
                for each in engines:
                    each.step()
                await asyncio.sleep(0.01)
            assert (await answer).usage.completion_tokens == 2
            gone = asyncio.create_task(client.generate([1], model=MODEL, max_tokens=9, request_id="gone"))
            await seen(client, lambda it: it.active_requests == 1)
            assert await client.abort("gone") == "freed"
            await asyncio.wait([gone])
            assert gone.exception() is not None
            await engines.pop().stop()
            assert len((await seen(client, lambda it: len(it.engines) < 3)).engines) == 2
        finally:
            for each in engines:
                await each.stop()
            await client.close()

    with Cluster(engines=0) as cluster:
        asyncio.run(main(cluster.router))
