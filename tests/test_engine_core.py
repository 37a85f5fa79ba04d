"""The parts of an engine, joined: what its `Stats` prove."""

from __future__ import annotations

import pytest
from tests.fleet_rig import Fleet, run_fleet

from microserve.kv.pages import PageState
from microserve.runtime.messages import Stats, StatsReply


@pytest.mark.parametrize(("pages", "states_matter"), [(20_000, True), (20_001, False)])
def test_stats_look_at_every_page_of_a_pool_that_is_not_large(pages: int, states_matter: bool) -> None:
    async def work(fleet: Fleet) -> None:
        engine = fleet["a"]
        allocator = engine.core.cache.allocator
        assert (await fleet.ask(engine, Stats(), StatsReply)).integrity == "ok"
        allocator._states[7] = PageState.CACHED
        reply = await fleet.ask(engine, Stats(), StatsReply)
        allocator._states[7] = PageState.FREE
        assert reply.integrity.startswith("pages by state are" if states_matter else "ok")

        allocator._counts[PageState.FREE] -= 1
        reply = await fleet.ask(engine, Stats(), StatsReply)
        allocator._counts[PageState.FREE] += 1
        assert reply.integrity.startswith("states add up to")

    run_fleet(work, "a", pages=pages, check=False)


def test_stats_of_a_large_pool_count_what_is_leased_and_cached() -> None:
    async def work(fleet: Fleet) -> None:
        engine = fleet["a"]
        address = await fleet.prep_recv(engine, list(range(1, 20)))
        lease = engine.core.receiving.leases.get(address.lease)
        pages = lease.pages
        for broken, said in ((pages[1:], "are LEASED, counted as"), (pages[::-1], "ok")):
            lease.pages = broken
            reply = await fleet.ask(engine, Stats(), StatsReply)
            assert said in reply.integrity
        lease.pages = pages
        await fleet.release(engine, address)

        cache = engine.core.cache
        for change, said in ((1, "are counted as evictable"), (-1, "are counted as evictable"), (0, "ok")):
            cache._evictable += change
            reply = await fleet.ask(engine, Stats(), StatsReply)
            cache._evictable -= change
            assert said in reply.integrity

    run_fleet(work, "a", pages=20_001, check=False)
