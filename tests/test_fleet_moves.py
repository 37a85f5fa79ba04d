"""KV that moves between complete engines: whatever the way, the answer is the one that a single engine gives."""

from __future__ import annotations

from functools import partial

import pytest
from tests.fleet_calls import PAGE, prompt_of
from tests.fleet_checks import LONG, PROMPT, answers
from tests.fleet_rig import Fleet, run_fleet

from microserve.runtime.messages import (
    Info,
    InfoReply,
    SendReport,
)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 50, 120])
@pytest.mark.parametrize("end", [-1, None])
def test_kv_moves_and_the_answer_is_the_same(length: int, end: int | None, depth: int) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        prompt = prompt_of(length)
        kv = await fleet.prep_recv(b, prompt, end=end)
        until = length if end is None else length - 1
        assert (kv.matched, kv.end) == (0, until)
        report = await fleet.remote_send(a, prompt, kv)
        assert (report.computed, report.reused) == (until, 0)
        assert report.bytes == -(-until // PAGE) * PAGE * 8
        end_ = await answers(fleet, b, prompt, kv=kv)
        assert (end_.received_tokens, end_.recomputed_tokens) == (until, 0)
        # What was computed stays in the sender's tree, and what came, in the receiver's.
        assert (await answers(fleet, a, prompt)).usage.cached_tokens == min(until, length - 1) // PAGE * PAGE
        assert fleet.hub.pushed == ([] if not until else [(a.transport_name, b.transport_name, -(-until // PAGE))]) or (
            until > 16
        )

    run_fleet(work, depth=depth)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 1.0])
def test_a_split_prompt_is_computed_on_both_sides(ratio: float) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        split = int(len(LONG) * (1 - ratio)) // PAGE * PAGE
        kv = await fleet.prep_recv(b, LONG, end=split)
        sending = fleet.sending(a, LONG, kv)
        end = await answers(fleet, b, LONG, kv=kv)
        assert (end.received_tokens, end.recomputed_tokens) == (split, 0)
        assert (await sending).computed == split

    run_fleet(work)


def test_two_senders_fill_one_lease() -> None:
    async def work(fleet: Fleet) -> None:
        a, b, c = fleet.engines
        kv = await fleet.prep_recv(c, LONG, end=-1)
        sends = [fleet.sending(a, LONG, kv, end=60), fleet.sending(b, LONG, kv, begin=60)]
        end = await answers(fleet, c, LONG, kv=kv)
        assert end.received_tokens == 119
        assert [(await send).computed for send in sends] == [60, 59]

    run_fleet(work, "a", "b", "c")


def test_an_engine_sends_to_itself() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        kv = await fleet.prep_recv(a, PROMPT, end=-1)
        assert (await fleet.remote_send(a, PROMPT, kv)).computed == 49
        assert (await answers(fleet, a, PROMPT, kv=kv)).received_tokens == 49

    run_fleet(work)


def test_chunks_are_pushed_while_the_next_are_computed() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        sending = fleet.sending(a, LONG, kv)

        def arrived(at_least: int = 0) -> int:
            pages = int(b.core.receiving.statistics()["lease_arrived_pages"])
            return pages if pages >= at_least else 0

        for pages in range(4, 28, 4):
            await fleet.until(partial(arrived, pages))
            # They are there, and their sender still computes.
            (send,) = a.core.sends._live
            assert (arrived(), send.computed) == (pages, None)
        assert (await sending).computed == 120
        assert [pages for _, _, pages in fleet.hub.pushed] == [4] * 7 + [2]
        assert await fleet.commit(b, kv) == 120

    run_fleet(work)


def test_a_slow_push_does_not_keep_the_next_chunks_from_being_computed() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG)
        sending = fleet.sending(a, LONG, kv)
        await fleet.until(lambda: any(send.computed for send in a.core.sends._live))
        assert fleet.hub.pushed == []
        fleet.hub.let_go()
        await sending
        # What had gathered meanwhile went out at once.
        assert [pages for _, _, pages in fleet.hub.pushed] == [4, 26]
        assert await fleet.commit(b, kv) == 120

    run_fleet(work)


def test_a_prefix_on_either_side_is_not_computed_again() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await answers(fleet, a, LONG[:40])
        await answers(fleet, b, LONG[:20])
        kv = await fleet.prep_recv(b, LONG, end=-1)
        assert kv.matched == 20
        report = await fleet.remote_send(a, LONG, kv)
        assert (report.computed, report.reused) == (119 - 40, 20)
        end = await answers(fleet, b, LONG, kv=kv)
        assert (end.received_tokens, end.usage.cached_tokens) == (99, 20)

    run_fleet(work)


def test_a_full_hit_needs_no_sender() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await answers(fleet, b, PROMPT)
        kv = await fleet.prep_recv(b, PROMPT, end=40)
        assert kv.matched == 48
        assert await fleet.remote_send(a, PROMPT, kv) == SendReport(computed=0, reused=0, bytes=0, seconds=0.0)
        end = await answers(fleet, b, PROMPT, kv=kv)
        assert (end.received_tokens, end.usage.cached_tokens) == (0, 48)
        assert fleet.hub.pushed == []

    run_fleet(work)


def test_a_conversation_is_migrated_before_its_next_turn() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await answers(fleet, a, PROMPT)
        kv = await fleet.prep_recv(b, PROMPT)
        sending = fleet.sending(a, PROMPT, kv)
        assert await fleet.commit(b, kv, wait=5.0) == 48
        assert (await sending).reused == 48
        assert (await answers(fleet, b, [*PROMPT, 3, 4, 5])).usage.cached_tokens == 48

    run_fleet(work)


def test_links_are_shown() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        await fleet.remote_send(a, PROMPT, kv)
        (sent,) = (await fleet.ask(a, Info(), InfoReply)).links
        (received,) = (await fleet.ask(b, Info(), InfoReply)).links
        assert (sent.engine_id, sent.state, sent.sent_bytes) == ("b", "ready", 13 * PAGE * 8)
        assert (received.engine_id, received.received_bytes, received.failures) == ("a", 13 * PAGE * 8, 0)
        await fleet.release(b, kv)
        assert ("peer", "b: local, 0 GB/s") in [(kind, detail) for kind, detail in a.events]

    run_fleet(work)
