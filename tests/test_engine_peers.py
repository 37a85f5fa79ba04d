"""Engines that meet, lose and find each other; what they say of their links, and whom they take for dead."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from tests.fleet_calls import PAGE, expected
from tests.fleet_checks import LONG, PROMPT, answers, link_of, raises
from tests.fleet_rig import Fleet, run_fleet

from microserve.engine.peers import FORGET, FORGET_DEBT, layout_difference
from microserve.kv.transfer.base import LinkReport
from microserve.runtime.errors import InvalidRequest, LayoutMismatch, PeerLost, StaleEpoch, TransferFailed
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    Info,
    InfoReply,
    Layout,
    Meet,
    Ok,
    PeerAddress,
    PeerHello,
    PeerWelcome,
)
from microserve.runtime.rpc import connect

if TYPE_CHECKING:
    from tests.fleet_rig import FleetEngine

LAYOUT = Layout(model_revision="1", dtype="fake", page_size=PAGE, layers=1, kv_heads=1, head_dim=1)


def hello(name: str = "x", epoch: int = 1, **changes: Any) -> PeerHello:
    values: dict[str, Any] = {
        "endpoint": f"memory://{name}",
        "layout": LAYOUT,
        "transport": "loopback",
        "metadata": b"",
        "host": "elsewhere",
        "pid": 5,
        "pid_started": 6,
    }
    return PeerHello(engine_id=name, epoch=epoch, **(values | changes))


async def introduce(fleet: Fleet, to: FleetEngine, body: PeerHello, me: Peer | None = None) -> Any:
    """Says hello as another engine would. The reply, over a session that stays open."""
    bus = fleet.network.bus(me or Peer("engine", body.engine_id, body.epoch))
    client = await connect(bus, to.endpoint)
    return await client.call(body)


def test_layouts_are_compared_field_by_field() -> None:
    assert layout_difference(LAYOUT, LAYOUT) == ""
    other = replace(LAYOUT, dtype="bfloat16", tp_size=2)
    assert layout_difference(LAYOUT, other) == "dtype: fake here, bfloat16 there; tp_size: 1 here, 2 there"


def test_engines_that_were_told_of_each_other_are_connected_both_ways() -> None:
    async def work(fleet: Fleet) -> None:
        for engine in fleet.engines:
            links = (await fleet.ask(engine, Info(), InfoReply)).links
            assert [link.engine_id for link in links] == sorted({"a", "b", "c"} - {engine.name})
            assert {(link.epoch, link.state, link.transport) for link in links} == {(1, "ready", "local")}

    run_fleet(work, "a", "b", "c")


def test_one_that_was_told_is_enough() -> None:
    async def work(fleet: Fleet) -> None:
        c = await fleet.add("c")
        await fleet.ask(c, Meet(peers=[fleet["a"].address]), Ok)
        await fleet.until(lambda: fleet["a"].core.peers.get("c") is not None)
        await fleet.until(lambda: link_of(fleet["a"], "c").state == "ready")

    run_fleet(work)


def test_a_send_makes_a_link_that_nobody_asked_for() -> None:
    async def work(fleet: Fleet) -> None:
        c = await fleet.add("c")
        kv = await fleet.prep_recv(c, PROMPT, end=-1)
        await fleet.remote_send(fleet["a"], PROMPT, kv)
        assert (await answers(fleet, c, PROMPT, kv=kv)).received_tokens == 49

    run_fleet(work)


def test_a_hello_is_answered_with_who_we_are() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        welcome = await introduce(fleet, a, hello())
        assert isinstance(welcome, PeerWelcome)
        assert (welcome.engine_id, welcome.epoch, welcome.layout, welcome.transport) == ("a", 1, LAYOUT, "loopback")
        assert welcome.pid == a.pid

    run_fleet(work)


def test_nobody_speaks_for_another() -> None:
    async def work(fleet: Fleet) -> None:
        for me in (Peer("router", "x", 1), Peer("engine", "y", 1), Peer("engine", "x", 2)):
            await raises(InvalidRequest, introduce(fleet, fleet["a"], hello(), me))

    run_fleet(work)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"layout": replace(LAYOUT, page_size=32)}, LayoutMismatch, "between a and x: page_size: 4 at a, 32 at x"),
        ({"transport": "nixl"}, TransferFailed, "transport: loopback at a, nixl at x"),
        ({"transport": ""}, TransferFailed, "transport: loopback at a, none at x"),
    ],
)
def test_a_hello_of_another_kind_is_refused(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    async def work(fleet: Fleet) -> None:
        with pytest.raises(kind, match=words):
            await introduce(fleet, fleet["a"], hello(**changes))
        assert fleet["a"].core.peers.get("x") is None

    run_fleet(work)


def test_an_older_incarnation_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        await introduce(fleet, a, hello(epoch=5))
        fleet.network.kill(Peer("engine", "x", 5))
        await fleet.network.settle()
        await raises(StaleEpoch, introduce(fleet, a, hello(epoch=4)))
        kv = await fleet.prep_recv(a, PROMPT)
        stale = replace(kv, engine_id="x", epoch=4)
        await raises(StaleEpoch, fleet.remote_send(a, PROMPT, stale))
        await fleet.release(a, kv)

    run_fleet(work)


def test_a_rumour_of_a_newer_incarnation_does_not_displace_the_one_that_answers() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        before = link_of(a, "b")
        kv = await fleet.prep_recv(b, PROMPT, end=-1)
        rumour = replace(kv, epoch=99)
        await raises(StaleEpoch, fleet.remote_send(a, PROMPT, rumour))
        await fleet.ask(a, Meet(peers=[replace(b.address, epoch=77)]), Ok)
        await asyncio.sleep(1.0)
        assert link_of(a, "b") is before
        assert before.state == "ready"
        await fleet.remote_send(a, PROMPT, kv)
        assert (await answers(fleet, b, PROMPT, kv=kv)).received_tokens == 49

    run_fleet(work)


def test_a_restarted_engine_takes_the_place_of_the_old() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await b.kill()
        again = await fleet.add("b", epoch=2)
        await fleet.meet()
        assert [link.epoch for link in (await fleet.ask(a, Info(), InfoReply)).links] == [2]
        kv = await fleet.prep_recv(again, PROMPT, end=-1)
        await fleet.remote_send(a, PROMPT, kv)
        assert (await answers(fleet, again, PROMPT, kv=kv)).received_tokens == 49

    run_fleet(work)


def test_a_peer_that_comes_back_is_found_again() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.network.partition(a.peer, b.peer)
        await fleet.until(lambda: link_of(a, "b").state == "lost")
        (shown,) = (await fleet.ask(a, Info(), InfoReply)).links
        assert shown.detail != ""
        fleet.network.heal(a.peer, b.peer)
        took = await fleet.until(lambda: link_of(a, "b").state == "ready")
        assert took < 15.0

    run_fleet(work)


def test_a_send_to_a_lost_peer_does_not_wait_for_the_next_attempt() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT, end=-1)
        fleet.network.partition(a.peer, b.peer)
        await asyncio.sleep(61.0)
        # An attempt has just failed, and the next is seconds away.
        link = link_of(a, "b")
        await fleet.until(lambda: link.client is None)
        fleet.network.heal(a.peer, b.peer)
        began = fleet.clock()
        await fleet.remote_send(a, PROMPT, kv)
        assert fleet.clock() - began < 1.0
        assert (await answers(fleet, b, PROMPT, kv=kv)).received_tokens == 49

    run_fleet(work, lease_term=500.0)


@pytest.mark.parametrize("state", ["ready", "refused"])
def test_a_peer_that_is_proven_dead_is_forgotten_at_once(state: str) -> None:
    async def work(fleet: Fleet) -> None:
        a, _ = fleet.engines
        c = await fleet.add("c", revision="1" if state == "ready" else "2")
        await fleet.ask(a, Meet(peers=[c.address]), Ok)
        await fleet.ask(c, Meet(peers=[a.address]), Ok)
        await fleet.until(lambda: link_of(a, "c").state == state)
        await fleet.until(lambda: a.core.peers._known.get("c") is not None)
        await c.kill()
        assert await fleet.until(lambda: a.core.peers.get("c") is None) < 3.0

    run_fleet(work)


def test_that_a_peer_is_dead_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await b.kill()
        await fleet.until(lambda: a.core.peers.get("b") is None)
        # Somebody who has not heard of it still names the dead one: it is neither dialled nor listed.
        await fleet.ask(a, Meet(peers=[b.address]), Ok)
        assert a.core.peers.get("b") is None
        await raises(PeerLost, a.core.peers.reach(b.address))
        await fleet.add("b", epoch=2)
        await fleet.meet()
        assert link_of(a, "b").epoch == 2

    with caplog.at_level(logging.INFO):
        run_fleet(work)
    assert [record.getMessage() for record in caplog.records].count("peer is dead") == 1


def test_a_peer_that_stays_away_is_forgotten() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        await b.kill(silently=True, seen=False)
        await fleet.until(lambda: link_of(a, "b").state == "lost")
        took = await fleet.until(lambda: a.core.peers.get("b") is None, limit=FORGET + 60)
        assert FORGET - 10 < took < FORGET + 20

    run_fleet(work)


def test_a_peer_that_waits_for_our_word_is_kept_for_longer() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.network.partition(a.peer, b.peer)
        link_of(a, "b").end_claim(7, "")
        await asyncio.sleep(FORGET + 60)
        assert link_of(a, "b").owes
        fleet.network.heal(a.peer, b.peer)
        await fleet.until(lambda: not link_of(a, "b").owes, limit=20.0)
        assert FORGET_DEBT > FORGET + 60

    run_fleet(work)


def test_nonsense_is_not_dialled() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        for endpoint in ("", "nowhere", "tcp://", "tcp://a\nb", "http://x", "tcp://" + "x" * 600):
            peer = PeerAddress(engine_id="x", epoch=1, endpoint=endpoint)
            await raises(InvalidRequest, fleet.ask(a, Meet(peers=[peer]), Ok))
        crowd = [PeerAddress(engine_id=f"x{n}", epoch=1, endpoint="memory://x") for n in range(5000)]
        await raises(InvalidRequest, fleet.ask(a, Meet(peers=crowd), Ok))
        assert len(a.core.peers.links()) == 1

    run_fleet(work)


def test_a_connection_that_fails_is_tried_again() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        assert a.core.transfers is not None
        reports = [LinkReport("local", error="no way")] * 3
        connect_ = a.core.transfers.connect

        def failing(peer: str, metadata: bytes, done: Any) -> None:
            if reports:
                asyncio.get_running_loop().call_soon(done, reports.pop())
            else:
                connect_(peer, metadata, done)

        a.core.transfers.connect = failing  # type: ignore[method-assign]
        c = await fleet.add("c")
        await fleet.ask(a, Meet(peers=[c.address]), Ok)
        await fleet.until(lambda: link_of(a, "c").state == "lost", limit=1.0)
        assert "no way" in link_of(a, "c").describe(0).detail
        await fleet.until(lambda: link_of(a, "c").state == "ready", limit=5.0)
        assert not reports

    run_fleet(work)


def test_a_dead_sender_is_noticed_though_its_session_went_first() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold(a.transport_name)
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv, kv_wait=100.0)
        sending = fleet.sending(a, LONG, kv)
        await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        died_at = fleet.clock()
        await a.kill(seen=False)
        await asyncio.sleep(20.0)
        assert not generating.done()
        # Now its parent has collected it, and /proc shows it.
        fleet.dead.add(a.pid)
        tokens, _ = await generating
        assert tokens == expected(LONG)
        assert 20.0 < fleet.clock() - died_at < 22.0
        await asyncio.gather(sending, return_exceptions=True)

    run_fleet(work)
