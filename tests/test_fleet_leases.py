"""Leases that expire, fill up or are asked for twice; calls that are repeated; a wire that loses and delays."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from tests.fleet_calls import expected, next_sub_id, prompt_of, send_body
from tests.fleet_checks import LONG, PROMPT, answers, evict, link_of, raises
from tests.fleet_rig import Fleet, FleetEngine, run_fleet

from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LeaseNotFound,
    MicroserveError,
    PeerLost,
)
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
    Prepared,
    PrepRecv,
    SendReport,
)

if TYPE_CHECKING:
    from microserve.runtime.messages import KvAddress

# --- leases ---


def test_a_lease_expires() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        took = await fleet.until(lambda: not b.leased())
        assert 4.9 < took < 6.0
        assert [kind for kind, _ in b.events if kind != "peer"] == ["lease_expired"]
        await raises(LeaseNotFound, fleet.remote_send(a, PROMPT, kv))
        await raises(LeaseNotFound, fleet.generate(b, PROMPT, kv=kv))

    run_fleet(work, lease_term=5.0)


def test_what_a_lease_matched_whole_counts_as_without_a_lease() -> None:
    """The last token is computed in any case, and with it the page that it is in."""

    async def work(fleet: Fleet) -> None:
        _, b = fleet.engines
        prompt = prompt_of(48)
        assert (await answers(fleet, b, prompt)).usage.cached_tokens == 0
        cached = (await answers(fleet, b, prompt)).usage.cached_tokens
        kv = await fleet.prep_recv(b, prompt, end=-1)
        assert kv.matched == 48
        assert (await answers(fleet, b, prompt, kv=kv)).usage.cached_tokens == cached == 44
        await fleet.until(lambda: b.core.verbs.load().prefix_lookup_tokens == 3 * 48)
        assert b.core.verbs.load().prefix_hit_tokens == 2 * 44

    run_fleet(work)


def test_a_lease_expires_during_a_push() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, PROMPT)
        sending = fleet.sending(a, PROMPT, kv)
        await fleet.until(lambda: b.quarantined(), limit=7.0)
        assert {kind for kind, _ in b.events} >= {"lease_expired"}
        # Never by time alone.
        await asyncio.sleep(100.0)
        assert b.quarantined() == 13
        fleet.hub.let_go()
        assert isinstance(await asyncio.gather(sending, return_exceptions=True), list)
        await fleet.until(lambda: not b.quarantined(), limit=2.0)
        assert (await answers(fleet, b, PROMPT)).usage.cached_tokens == 0

    run_fleet(work, lease_term=5.0)


def test_a_claim_is_not_used_after_its_term() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, PROMPT)
        generating = fleet.generating(b, PROMPT, kv=kv)
        began = fleet.clock()
        await raises(DeadlineExceeded, fleet.remote_send(a, PROMPT, kv))
        assert 19.0 < fleet.clock() - began <= 20.0
        fleet.hub.let_go()
        assert (await generating)[0] == expected(PROMPT)

    run_fleet(work, lease_life=20.0)


@pytest.mark.parametrize(("share", "most"), [(0.5, 1), (0.9, 2)])
def test_two_engines_that_fill_each_other_with_leases(share: float, most: int) -> None:
    """Both have leased what they may. Where that leaves no room to compute what the other waits for, the sends are
    refused at once, and who waited is told so."""

    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        leased: set[tuple[int, int]] = set()
        outcomes: Counter[str] = Counter()

        async def send(sender: FleetEngine, receiver: FleetEngine, prompt: list[int], kv: KvAddress) -> None:
            asked = fleet.clock()
            try:
                await fleet.remote_send(sender, prompt, kv)
            except Busy:
                assert fleet.clock() - asked < 0.1
                outcomes["busy"] += 1
                await fleet.forgo(receiver, kv, kv.matched, kv.end)
            else:
                outcomes["sent"] += 1

        async def serve(sender: FleetEngine, receiver: FleetEngine, seed: int) -> None:
            prompt = prompt_of(40, seed=seed)
            kv = await fleet.prep_recv(receiver, prompt, end=-1, admit_by=20.0)
            leased.add((a.leased() // 10, b.leased() // 10))
            sending = asyncio.create_task(send(sender, receiver, prompt, kv))
            tokens, _ = await fleet.generate(receiver, prompt, kv=kv)
            assert tokens == expected(prompt)
            await sending

        pairs = [(a, b), (b, a)] * 12
        await asyncio.gather(*(serve(*pair, seed) for seed, pair in enumerate(pairs)))
        # Both at once, and never more than that.
        assert max(leased) == (most, most)
        assert outcomes.total() == len(pairs)
        assert bool(outcomes["busy"]) == (most == 2)

    run_fleet(work, pages=24, max_running=4, lease_share=share)


def test_a_prompt_that_leases_never_hold_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        await raises(InvalidRequest, fleet.prep_recv(fleet["b"], LONG, admit_by=5.0))

    run_fleet(work, pages=40)


def test_no_room_is_busy() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        held = await fleet.prep_recv(b, PROMPT)
        error = await raises(Busy, fleet.prep_recv(b, LONG[:40]))
        assert error.retry_after is not None
        began = fleet.clock()
        await raises(Busy, fleet.prep_recv(b, LONG[:40], admit_by=3.0))
        assert 2.9 < fleet.clock() - began < 3.2
        waiting = asyncio.create_task(fleet.prep_recv(b, LONG[:40], admit_by=3.0))
        await asyncio.sleep(1.0)
        await fleet.release(b, held)
        await fleet.release(b, await waiting)

    run_fleet(work, pages=32)


# --- retries ---


def test_a_retry_of_prep_recv_is_the_same_lease() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        body = PrepRecv(request_id="q", sub_id=next_sub_id(), prompt=pack_tokens(PROMPT))
        first, second = await asyncio.gather(fleet.ask(b, body, Prepared), fleet.ask(b, body, Prepared))
        third = await fleet.ask(b, body, Prepared)
        assert first == second == third
        assert len(b.core.receiving.leases) == 1
        await raises(Conflict, fleet.prep_recv(b, LONG, sub_id=body.sub_id))
        await raises(Conflict, fleet.generate(b, PROMPT, sub_id=body.sub_id))
        await fleet.release(b, first.address)
        # The answer that it had; what it names has ended, which whoever uses it hears.
        assert await fleet.ask(b, body, Prepared) == first
        assert len(b.core.receiving.leases) == 0
        await raises(LeaseNotFound, fleet.remote_send(fleet["a"], PROMPT, first.address))

    run_fleet(work)


def test_a_retry_of_remote_send_joins_it() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        body = send_body(LONG, kv)
        first = asyncio.create_task(fleet.ask(a, body, SendReport))
        await fleet.until(lambda: a.core.scheduler.running)
        second = asyncio.create_task(fleet.ask(a, body, SendReport, router="s"))
        await asyncio.sleep(0.02)
        first.cancel()
        report = await second
        assert report == await fleet.ask(a, body, SendReport)
        assert sum(pages for _, _, pages in fleet.hub.pushed) == 30
        await fleet.release(b, kv)

    run_fleet(work)


def test_a_retry_of_commit_has_the_same_answer() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        body = Commit(request_id="q", sub_id=next_sub_id(), lease=kv.lease, wait=5.0)
        waiting = [asyncio.create_task(fleet.ask(b, body, Committed)) for _ in range(2)]
        await fleet.remote_send(a, PROMPT, kv)
        answers_ = [await task for task in waiting] + [await fleet.ask(b, body, Committed)]
        assert [each.committed_until for each in answers_] == [48] * 3

    run_fleet(work)


def test_a_retry_of_start_generate_is_a_conflict() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT, end=-1)
        generating = fleet.generating(b, PROMPT, kv=kv, sub_id="once")
        await asyncio.sleep(0.05)
        await raises(Conflict, fleet.generate(b, PROMPT, kv=kv, sub_id="once"))
        await raises(Conflict, fleet.generate(b, PROMPT, kv=kv))
        await fleet.remote_send(a, PROMPT, kv)
        assert (await generating)[0] == expected(PROMPT)
        await raises(Conflict, fleet.generate(b, PROMPT, kv=kv, sub_id="once"))

    run_fleet(work)


def test_a_retry_after_a_lost_session_is_a_new_lease() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        body = PrepRecv(request_id="q", sub_id=next_sub_id(), prompt=pack_tokens(PROMPT))
        first = await fleet.ask(b, body, Prepared)
        (await fleet.client(b)).close("a blip")
        await fleet.until(lambda: not b.leased())
        second = await fleet.ask(b, body, Prepared)
        assert second.address.lease != first.address.lease
        await fleet.release(b, second.address)

    run_fleet(work)


def test_release_and_forgo_are_idempotent() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, PROMPT)
        assert await fleet.forgo(b, kv, 0, 48) == "freed"
        assert await fleet.forgo(b, kv, 0, 48) == "freed"
        assert await fleet.release(b, kv) == "freed"
        assert await fleet.release(b, kv) == "unknown"

    run_fleet(work)


def test_abort_is_idempotent() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        body = send_body(LONG, kv)
        sending = asyncio.create_task(fleet.ask(a, body, SendReport))
        await fleet.until(lambda: b.core.kv._grants)
        abort = Abort(sub_id=body.sub_id)
        assert [(await fleet.ask(a, abort, Aborted)).outcome for _ in range(3)] == ["freed", "unknown", "unknown"]
        await raises(Cancelled, sending)
        # The answer that it had is given again, and nothing begins.
        await raises(Cancelled, fleet.ask(a, body, SendReport))
        await fleet.until(lambda: not len(a.core.sends) and not b.core.kv._grants, limit=2.0)
        assert await fleet.release(b, kv) == "freed"

    run_fleet(work)


def test_the_cache_verbs_are_idempotent() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        await fleet.generate(b, PROMPT, count=1)
        prompt = pack_tokens(PROMPT)
        found = CacheMatched(tokens=48)
        for verb in (CacheMatch(prompt=prompt), CachePin(prompt=prompt, ttl=600.0)):
            assert [await fleet.ask(b, verb, CacheMatched) for _ in range(2)] == [found, found]
        assert [(await fleet.ask(b, CacheEvict(prompt=prompt), CacheEvicted)).pages for _ in range(2)] == [0, 0]
        # However often it was pinned, one end is enough.
        unpinned = [await fleet.ask(b, CacheUnpin(prompt=prompt), CacheMatched) for _ in range(2)]
        assert unpinned == [found, CacheMatched(tokens=0)]
        assert [(await fleet.ask(b, CacheEvict(prompt=prompt), CacheEvicted)).pages for _ in range(2)] == [12, 0]
        assert [(await fleet.ask(b, CacheEvict(), CacheEvicted)).pages for _ in range(2)] == [0, 0]

    run_fleet(work)


def test_a_hedged_second_sender_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        a, b, c = fleet.engines
        kv = await fleet.prep_recv(c, LONG, end=-1)
        first = fleet.sending(a, LONG, kv)
        second = fleet.sending(b, LONG, kv)
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert sorted(type(each).__name__ for each in outcomes) == ["Conflict", "SendReport"]
        assert (await answers(fleet, c, LONG, kv=kv)).received_tokens == 119
        # The one that was refused has computed for its own tree, at most.
        assert len({source for source, _, _ in fleet.hub.pushed}) == 1

    run_fleet(work, "a", "b", "c")


# --- the wire ---


def test_a_claim_whose_answer_is_lost_is_given_back() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        fleet.network.drop(b.peer, a.peer)
        error = await raises(PeerLost, fleet.remote_send(a, PROMPT, kv, budget=30.0))
        assert error.code == "peer_lost"
        await fleet.until(lambda: not b.core.kv._grants, limit=10.0)
        assert await fleet.release(b, kv) == "freed"
        assert b.quarantined() == 0

    run_fleet(work)


def test_the_session_between_engines_breaks_during_a_push() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        sending = fleet.sending(a, LONG, kv)
        await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        fleet.network.partition(a.peer, b.peer)
        link = link_of(a, "b")
        await fleet.until(lambda: link.state == "lost", limit=4.0)
        fleet.network.heal(a.peer, b.peer)
        fleet.hub.let_go()
        # Pushes need no session, and that the claim has ended is told over the next one.
        assert (await sending).computed == 119
        tokens, end = await generating
        assert (tokens, end.received_tokens) == (expected(LONG), 119)
        await fleet.until(lambda: not b.core.kv._grants, limit=10.0)

    run_fleet(work)


def test_engines_are_cut_off_from_each_other() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.network.partition(a.peer, b.peer)
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        began = fleet.clock()
        await raises(MicroserveError, fleet.remote_send(a, LONG, kv))
        assert fleet.clock() - began < 11.0
        tokens, end = await generating
        assert (tokens, end.recomputed_tokens) == (expected(LONG), 119)
        fleet.network.heal(a.peer, b.peer)
        await fleet.until(lambda: link_of(a, "b").state == "ready", limit=20.0)
        await evict(fleet, b)
        kv = await fleet.prep_recv(b, LONG, end=-1)
        assert (await fleet.remote_send(a, LONG, kv)).reused == 119
        await fleet.release(b, kv)

    run_fleet(work)


@pytest.mark.parametrize("fault", ["delay", "duplicate"])
def test_frames_are_late_or_come_twice(fault: str) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        for pair in ((a.peer, b.peer), (b.peer, a.peer)):
            if fault == "delay":
                fleet.network.delay(*pair, 0.3)
            else:
                fleet.network.duplicate(*pair)
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        outcome = (await asyncio.gather(fleet.sending(a, LONG, kv), return_exceptions=True))[0]
        tokens, end = await generating
        assert tokens == expected(LONG)
        assert isinstance(outcome, SendReport if fault == "delay" else PeerLost)
        assert end.received_tokens == (119 if fault == "delay" else 0)
        await fleet.until(lambda: not b.core.kv._grants, limit=10.0)

    run_fleet(work)


def test_a_stopped_receiver_keeps_nobody_waiting() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        b.frozen.clear()
        began = fleet.clock()
        await raises(MicroserveError, fleet.remote_send(a, LONG, kv))
        assert fleet.clock() - began < 6.0
        b.frozen.set()
        await asyncio.sleep(2.0)
        assert not b.core.kv._grants
        assert await fleet.release(b, kv) == "freed"

    run_fleet(work)
