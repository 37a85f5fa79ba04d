"""Sends: what goes out when, what is reported, and who holds pages until when."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from tests.fleet_calls import PAGE, prompt_of
from tests.fleet_checks import LONG, PROMPT, answers, link_of, raises
from tests.fleet_rig import STEP, Fleet, run_fleet

from microserve.engine.kv_verbs import LocalWay
from microserve.engine.sending import prompt_digest
from microserve.engine.transfers import Push, Pushed
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import (
    Conflict,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    LayoutMismatch,
    StaleEpoch,
    TransferFailed,
)
from microserve.runtime.ids import Peer
from microserve.runtime.messages import Abort, Aborted, Claim, Claimed, SendReport, Stats, StatsReply

if TYPE_CHECKING:
    from tests.fleet_rig import FleetEngine


async def pushing(fleet: Fleet, engine: FleetEngine) -> None:
    """Returns when a push of `engine` is under way."""
    await fleet.until(lambda: any(send.pushing for send in engine.core.sends._live))


def test_what_gathers_during_a_push_goes_out_in_one() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG)
        sending = fleet.sending(a, LONG, kv)
        await asyncio.sleep(1.0)
        fleet.hub.let_go()
        report = await sending
        assert [pages for _, _, pages in fleet.hub.pushed] == [4, 26]
        assert (report.computed, report.reused, report.bytes) == (120, 0, 30 * PAGE * 8)
        assert 1.0 < report.seconds < 1.2
        assert 0.9 < report.push_seconds <= report.seconds
        await fleet.release(b, kv)

    run_fleet(work)


def test_a_range_within_a_lease_counts_for_itself() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await answers(fleet, a, LONG[:48])
        kv = await fleet.prep_recv(b, LONG)
        report = await fleet.remote_send(a, LONG, kv, begin=40, end=60)
        # 44 or 48 tokens are in the tree: those of the answer do not belong to the prompt.
        assert (report.computed, report.reused) == (12, 8)
        report = await fleet.remote_send(a, LONG, kv, begin=60, end=80)
        assert (report.computed, report.reused) == (20, 0)
        assert sum(pages for _, _, pages in fleet.hub.pushed) == 10
        await fleet.release(b, kv)

    run_fleet(work)


def test_the_way_is_made_ready_while_the_claim_is_under_way_when_all_is_cached() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        await fleet.remote_send(a, LONG, kv)
        assert fleet.hub.warmed == [], "it would be cold again by the time that the prompt is computed"
        await fleet.release(b, kv)
        kv = await fleet.prep_recv(b, LONG)
        report = await fleet.remote_send(a, LONG, kv)
        assert report.computed == 0
        assert [(one.split(":")[0], two.split(":")[0]) for one, two in fleet.hub.warmed] == [("a", "b")]
        await fleet.release(b, kv)

    run_fleet(work)


def test_decodes_go_on_during_a_send() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        generating = fleet.generating(a, PROMPT[:4], count=20)
        await asyncio.sleep(5 * STEP)
        kv = await fleet.prep_recv(b, LONG)
        sending = fleet.sending(a, LONG, kv)
        began = fleet.clock()
        await generating
        # One token a step, as if nothing else were computed.
        assert fleet.clock() - began < 22 * STEP
        await sending
        await fleet.release(b, kv)

    run_fleet(work)


def test_the_sender_itself_ends_a_send_in_time() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG)
        sending = fleet.sending(a, LONG, kv, budget=1.0, router="far")
        await pushing(fleet, a)
        # What the router says does not arrive, and its silence is not noticed yet.
        fleet.network.partition(Peer("router", "far", 1), a.peer)
        await asyncio.sleep(1.1)
        assert all(send.over for send in a.core.sends._live)
        fleet.hub.let_go()
        await fleet.until(lambda: not len(a.core.sends), limit=1.0)
        await asyncio.gather(sending, return_exceptions=True)
        await fleet.release(b, kv)

    run_fleet(work)


def test_an_aborted_send_is_answered_at_once() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG)
        sending = fleet.sending(a, LONG, kv, sub_id="s")
        await pushing(fleet, a)
        assert await fleet.ask(a, Abort(sub_id="s"), Aborted) == Aborted(outcome="freed")
        await asyncio.gather(sending, return_exceptions=True)
        assert len(a.core.sends) == 1
        assert a.core.verbs.live == 1
        fleet.hub.let_go()
        await fleet.until(lambda: not a.core.verbs.live, limit=1.0)
        assert await fleet.release(b, kv) == "freed"

    run_fleet(work)


def test_a_failed_push_makes_a_new_connection() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        assert a.core.transfers is not None
        disconnected: list[str] = []
        a.core.transfers.disconnect = lambda peer: disconnected.append(peer)  # type: ignore[method-assign]
        fleet.hub.failing.add((a.transport_name, b.transport_name))
        kv = await fleet.prep_recv(b, PROMPT)
        before = link_of(a, "b").client
        await raises(TransferFailed, fleet.remote_send(a, PROMPT, kv))
        fleet.hub.failing.clear()
        assert disconnected == [b.transport_name]
        await fleet.until(lambda: link_of(a, "b").state == "ready" and link_of(a, "b").client is not before)
        assert link_of(a, "b").describe(0).failures == 1
        await fleet.release(b, kv)

    run_fleet(work)


def test_a_push_that_may_still_be_written_keeps_its_claim() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines

        def give_up(order: Push) -> None:
            asyncio.get_running_loop().call_soon(order.done, Pushed("given up", 0, 0.0, certain=False))

        a.core.sends._push = give_up
        kv = await fleet.prep_recv(b, PROMPT)
        await raises(TransferFailed, fleet.remote_send(a, PROMPT, kv))
        await fleet.until(lambda: link_of(a, "b").state == "ready")
        await asyncio.sleep(5.0)
        assert await fleet.release(b, kv) == "quarantined"
        await asyncio.sleep(5.0)
        assert b.quarantined() == 13
        await a.kill()
        await fleet.until(lambda: not b.quarantined(), limit=2.0)

    run_fleet(work)


def test_notifications_are_looked_for_while_claims_are_open() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines

        async def expected() -> float:
            return (await fleet.ask(b, Stats(), StatsReply)).values["transfer_expected"]

        fleet.hub.hold()
        assert await expected() == 0
        kv = await fleet.prep_recv(b, PROMPT)
        sending = fleet.sending(a, PROMPT, kv)
        await pushing(fleet, a)
        assert await expected() == 1
        fleet.hub.let_go()
        await sending
        await asyncio.sleep(0.1)
        # The last notification may come after the word that the claim has ended.
        assert await expected() == 1
        await asyncio.sleep(0.5)
        assert await expected() == 0
        await fleet.release(b, kv)

    run_fleet(work)


def test_a_preparation_whose_caller_left_in_the_same_moment_is_given_back() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        b.frozen.clear()
        await asyncio.sleep(1.0)
        preparing = asyncio.create_task(fleet.prep_recv(b, PROMPT))
        await asyncio.sleep(0.1)
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        await asyncio.sleep(0.1)
        b.frozen.set()
        await asyncio.sleep(0.1)
        assert b.core.receiving.leases.statistics()["opened"] == 1
        assert b.leased() == 0

    run_fleet(work)


def test_a_step_that_fails_fails_its_send() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        launch, broken = a.executor.launch, [True]

        def launched(plan: Any) -> None:
            if plan.step > 3 and broken:
                broken.clear()
                raise ValueError("a device error")
            launch(plan)

        a.executor.launch = launched  # type: ignore[method-assign]
        await raises(InternalError, fleet.remote_send(a, LONG, kv))
        await fleet.until(lambda: not b.core.kv._grants, limit=1.0)
        assert await fleet.release(b, kv) == "freed"

    run_fleet(work)


def test_an_empty_range_asks_nobody() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        for begin, end in ((0, 0), (20, 20), (40, 8), (50, 50)):
            report = await fleet.remote_send(a, PROMPT, kv, begin=begin, end=end)
            assert report == SendReport(computed=0, reused=0, bytes=0, seconds=0.0)
        assert b.core.receiving.leases.statistics()["claims"] == 0
        await fleet.release(b, kv)

    run_fleet(work)


def test_what_cannot_be_sent_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        await raises(InvalidRequest, fleet.remote_send(a, [], kv))
        await raises(InvalidRequest, fleet.remote_send(a, [*PROMPT[:-1], 50], kv))
        await raises(ContextLengthExceeded, fleet.remote_send(a, prompt_of(1001), kv))
        await raises(LayoutMismatch, fleet.remote_send(a, PROMPT, replace(kv, layout=replace(kv.layout, layers=2))))
        await raises(StaleEpoch, fleet.remote_send(a, PROMPT, replace(kv, engine_id="a", epoch=5)))
        await raises(InvalidRequest, fleet.remote_send(a, PROMPT, replace(kv, endpoint="nowhere", engine_id="z")))
        await fleet.until(lambda: not len(a.core.sends), limit=1.0)
        await fleet.release(b, kv)

    run_fleet(work)


def test_an_address_may_lie_about_its_pages() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT, end=-1)
        forged = replace(kv, pages=unpack_tokens(kv.pages)[::-1].astype("<i4").tobytes())
        await fleet.remote_send(a, PROMPT, forged)
        # The claim says where to write.
        assert (await answers(fleet, b, PROMPT, kv=kv)).received_tokens == 49

    run_fleet(work)


@pytest.mark.parametrize("matched", [4, 16])
def test_an_address_may_be_wrong_about_where_its_lease_begins(matched: int) -> None:
    """What was sent counts as arrived where the claim says that it is; what is missing before it may come yet."""

    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        await fleet.remote_send(a, LONG, replace(kv, matched=matched))
        await fleet.until(lambda: b.core.receiving.statistics()["lease_arrived_pages"])
        assert b.core.receiving.statistics()["lease_arrived_pages"] == 30 - matched // 4
        await fleet.remote_send(a, LONG, kv, end=matched)
        assert (await answers(fleet, b, LONG, kv=kv)).received_tokens == 119

    run_fleet(work)


def test_two_sends_of_one_engine_do_not_share_a_claim() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        sends = [fleet.sending(a, LONG, kv) for _ in range(2)]
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {SendReport, Conflict}
        await fleet.release(b, kv)

    run_fleet(work)


def test_an_engine_without_a_transport_serves_alone() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        a.core.peers._transfers = None
        kv = await fleet.prep_recv(b, PROMPT)
        with pytest.raises(TransferFailed, match="has no transport for KV"):
            await fleet.remote_send(a, PROMPT, kv)
        await fleet.release(b, kv)
        await answers(fleet, a, PROMPT)
        assert a.core.transfers is not None
        a.core.peers._transfers = a.core.transfers

    run_fleet(work)


def test_a_claim_on_ourselves_that_nobody_waits_for_is_given_back() -> None:
    class Steps:
        asked: Any = None
        commands: list[Any] = []  # noqa: RUF012  # one instance

        def ask(self, function: Any, done: Any) -> None:
            self.asked = (function, done)

        def command(self, function: Any) -> None:
            self.commands.append(function)

    class Verbs:
        def __init__(self) -> None:
            self.ended: list[tuple[int, str]] = []

        def grant(self, body: Claim) -> Claimed:
            return Claimed(claim=3, term=1.0)

        def end_claim(self, claim: int, error: str) -> None:
            self.ended.append((claim, error))

    async def main() -> None:
        steps, verbs = Steps(), Verbs()
        way = LocalWay("a:1", steps, verbs)  # type: ignore[arg-type]
        body = Claim(lease=1, epoch=1, begin=0, end=4, engine_id="a", sender_epoch=1)
        claiming = asyncio.create_task(way.claim(body))
        await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.gather(claiming, return_exceptions=True)
        function, done = steps.asked
        done(function())
        for command in steps.commands:
            command()
        assert verbs.ended == [(3, "the send was given up")]

    asyncio.run(main())


def test_the_digest_is_of_the_tokens_as_they_travel() -> None:
    tokens = unpack_tokens(b"\1\0\0\0\2\0\0\0")
    assert prompt_digest(tokens) == prompt_digest(tokens.copy())
    assert prompt_digest(tokens) != prompt_digest(tokens[:1])
    assert len(prompt_digest(tokens[:0])) == 16
