"""What engines refuse each other, and why; nothing changes by it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from tests.fleet_checks import LONG, PROMPT, answers, link_of, raises
from tests.fleet_rig import Fleet, run_fleet

from microserve.runtime.errors import (
    Cancelled,
    Conflict,
    Draining,
    InvalidRequest,
    LayoutMismatch,
    TransferFailed,
)
from microserve.runtime.messages import (
    Claim,
    Claimed,
    ClaimEnded,
    Drain,
    Ok,
    Resume,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"begin": 2}, "does not stand at pages"),
        ({"begin": 4, "end": 10}, "does not stand at pages"),
        ({"begin": 0, "end": 50}, "is not within the address"),
        ({"begin": 51}, "begin must lie between"),
        ({"end": 51}, "end must lie between"),
    ],
)
def test_wrong_ranges_are_refused(changes: dict[str, int], words: str) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT, end=-2)
        with pytest.raises(InvalidRequest, match=words):
            await fleet.remote_send(a, PROMPT, kv, **changes)
        assert len(a.core.sends) == 0
        await fleet.release(b, kv)

    run_fleet(work)


def test_another_prompt_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        other = [*PROMPT[:-3], 1, 2, 3]
        kv = await fleet.prep_recv(b, PROMPT)
        with pytest.raises(InvalidRequest, match="not the one that the lease was prepared for"):
            await fleet.remote_send(a, other, kv)
        with pytest.raises(InvalidRequest, match="not the one that the lease was prepared for"):
            await fleet.generate(b, other, kv=kv)
        await fleet.release(b, kv)
        assert fleet.hub.pushed == []

    run_fleet(work)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"page_size": 8}, "page_size: 4 here, 8 there"),
        # Of other weights, KV would be taken for what it is not, and no page would show it.
        ({"revision": "2"}, "model_revision: 1 here, 2 there"),
    ],
)
def test_pages_of_another_layout_do_not_move(options: dict[str, Any], difference: str) -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        c = await fleet.add("c", **options)
        await fleet.meet()
        kv = await fleet.prep_recv(c, PROMPT)
        with pytest.raises(LayoutMismatch, match=f": {difference}$"):
            await fleet.remote_send(a, PROMPT, kv)
        link = link_of(a, "c")
        assert link.state == "refused"
        field = difference.partition(":")[0]
        assert any("refused" in detail and field in detail for _, detail in a.events)
        # A forged address does not help: the engines compare for themselves.
        forged = replace(kv, layout=a.core.info.layout)
        await raises(LayoutMismatch, fleet.remote_send(a, PROMPT[:48], forged, end=48))
        await fleet.release(c, kv)

    run_fleet(work)


def test_a_required_link_is_required() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        picky = await fleet.add("c", require_link="cuda_ipc")
        await fleet.meet()
        kv = await fleet.prep_recv(a, PROMPT)
        with pytest.raises(TransferFailed, match="KV would go over local; cuda_ipc is required"):
            await fleet.remote_send(picky, PROMPT, kv)
        await fleet.release(a, kv)

    run_fleet(work)


def test_a_draining_engine_finishes_what_was_prepared() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        await fleet.ask(b, Drain(), Ok)
        await raises(Draining, fleet.prep_recv(b, PROMPT))
        await raises(Draining, fleet.remote_send(b, PROMPT, kv))
        await raises(Draining, fleet.generate(b, PROMPT))
        sending = fleet.sending(a, LONG, kv)
        assert (await answers(fleet, b, LONG, kv=kv)).received_tokens == 119
        await sending
        await fleet.ask(b, Resume(), Ok)
        await answers(fleet, b, PROMPT)

    run_fleet(work)


def test_a_claim_is_its_senders_own() -> None:
    async def work(fleet: Fleet) -> None:
        a, b, c = fleet.engines
        kv = await fleet.prep_recv(c, PROMPT)
        claim = Claim(lease=kv.lease, epoch=1, begin=0, end=48, engine_id="a", sender_epoch=1, sub_id="s")
        ours, other = a.core.peers.get("c"), b.core.peers.get("c")
        assert ours is not None
        assert other is not None
        assert ours.client is not None
        assert other.client is not None
        await raises(InvalidRequest, other.client.call(claim))
        granted = await ours.client.call(claim)
        assert isinstance(granted, Claimed)
        assert await ours.client.call(claim) == granted
        await raises(Conflict, ours.client.call(replace(claim, sub_id="other")))
        ended = ClaimEnded(claim=granted.claim)
        await raises(InvalidRequest, other.client.call(ended))
        await raises(InvalidRequest, (await fleet.client(c)).call(ended))
        assert await ours.client.call(ended) == Ok()
        assert await ours.client.call(ended) == Ok()
        await fleet.release(c, kv)

    run_fleet(work, "a", "b", "c")


def test_an_aborted_wait_ends_its_lease() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        await asyncio.sleep(0.1)
        generating.cancel()
        await asyncio.gather(generating, return_exceptions=True)
        await fleet.until(lambda: not b.leased(), limit=1.0)
        committing = asyncio.create_task(fleet.commit(b, await fleet.prep_recv(b, LONG), wait=60.0))
        await asyncio.sleep(0.1)
        committing.cancel()
        await asyncio.gather(committing, return_exceptions=True)
        await fleet.until(lambda: not b.leased(), limit=1.0)

    run_fleet(work)


def test_a_released_lease_fails_whoever_uses_it() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        await asyncio.sleep(0.1)
        assert await fleet.release(b, kv) == "freed"
        await raises(Cancelled, generating)

    run_fleet(work)
