"""Leases and the prefix tree as callers see them: arguments, answers, and messages that make no sense."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.fleet_calls import PAGE, next_sub_id, prompt_of, send_body
from tests.fleet_checks import LONG, PROMPT, answers, link_of, raises
from tests.fleet_rig import Fleet, run_fleet

from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import (
    Conflict,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    LeaseNotFound,
    MicroserveError,
    NotFound,
    StaleEpoch,
)
from microserve.runtime.messages import (
    Abort,
    CacheEvict,
    CacheEvicted,
    CacheMatch,
    CacheMatched,
    CachePin,
    CachePrefixes,
    CacheUnpin,
    Claim,
    ClaimEnded,
    Commit,
    Forgo,
    KvAddress,
    Layout,
    ListModels,
    Meet,
    PeerAddress,
    PeerHello,
    Prefixes,
    PrepRecv,
    Release,
    RemoteSend,
    SamplingParams,
    StartGenerate,
    Stats,
    StatsReply,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def prepare(prompt: list[int] = PROMPT, **changes: Any) -> PrepRecv:
    return PrepRecv(request_id="q", sub_id=next_sub_id(), prompt=pack_tokens(prompt), **changes)


# --- leases ---


@pytest.mark.parametrize(
    ("end", "expected"), [(None, 50), (50, 50), (-1, 49), (-50, 0), (0, 0), (17, 17)], ids=lambda value: f"{value}"
)
def test_an_address_says_what_is_awaited(end: int | None, expected: int) -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, PROMPT, end=end)
        assert (kv.engine_id, kv.epoch, kv.endpoint, kv.layout) == ("b", 1, b.endpoint, b.core.info.layout)
        assert (kv.matched, kv.end) == (0, expected)
        pages = unpack_tokens(kv.pages)
        assert len(pages) == -(-expected // PAGE)
        assert len(set(pages.tolist())) == len(pages)
        await fleet.release(b, kv)

    run_fleet(work)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (prepare([]), "prompt"),
        (prepare([50]), "prompt"),
        (prepare([1, 2], end=3), "end"),
        (prepare([1, 2], end=-3), "end"),
        (prepare([1, 2], admit_by=math.inf), "admit_by"),
        (replace(prepare(), prompt=b"\1"), None),
        (replace(prepare(), sub_id=""), "sub_id"),
    ],
)
def test_a_preparation_that_makes_no_sense_is_refused(body: PrepRecv, param: str | None) -> None:
    async def work(fleet: Fleet) -> None:
        error = await raises(InvalidRequest, fleet.ask(fleet["b"], body, object))
        assert error.param == param
        assert fleet["b"].leased() == 0

    run_fleet(work)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        await raises(ContextLengthExceeded, fleet.prep_recv(fleet["b"], prompt_of(300)))

    run_fleet(work)


def test_room_is_kept_for_output() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, PROMPT, expect_tokens=14)
        assert b.leased() == 16
        await fleet.release(b, kv)
        kv = await fleet.prep_recv(b, PROMPT, expect_tokens=2**60)
        await fleet.release(b, kv)

    run_fleet(work)


def test_what_arrived_is_committed_and_the_rest_given_back() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        await fleet.remote_send(a, LONG, kv, end=60)
        assert await fleet.commit(b, kv) == 60
        await raises(LeaseNotFound, fleet.commit(b, kv))
        assert (await answers(fleet, b, LONG)).usage.cached_tokens == 60

    run_fleet(work)


def test_a_commit_waits_for_what_is_on_its_way_and_no_longer() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, LONG)
        began = fleet.clock()
        assert await fleet.commit(b, kv, wait=2.0) == 0
        assert 2.0 <= fleet.clock() - began < 2.1
        kv = await fleet.prep_recv(b, LONG)
        error = await raises(
            InvalidRequest,
            fleet.ask(b, Commit(request_id="q", sub_id="s", lease=kv.lease, wait=math.inf), object),
        )
        assert error.param == "wait"
        await fleet.release(b, kv)

    run_fleet(work)


def test_a_commit_that_overtakes_the_kv_waits_for_it() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG)
        committing = asyncio.create_task(fleet.commit(b, kv))
        await asyncio.sleep(1.0)
        await fleet.remote_send(a, LONG, kv)
        assert await committing == len(LONG)

    run_fleet(work)


def test_a_lease_in_use_is_a_conflict() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, PROMPT)
        committing = asyncio.create_task(fleet.commit(b, kv, wait=1.0))
        await asyncio.sleep(0.1)
        await raises(Conflict, fleet.commit(b, kv))
        await raises(Conflict, fleet.generate(b, PROMPT, kv=kv))
        assert await committing == 0

    run_fleet(work)


def test_unknown_leases_are_told_apart_from_wrong_ranges() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        unknown = replace(kv, lease=12345)
        assert await fleet.release(b, unknown) == "unknown"
        assert await fleet.forgo(b, unknown, 0, 48) == "unknown"
        await raises(LeaseNotFound, fleet.commit(b, unknown))
        await raises(LeaseNotFound, fleet.remote_send(a, PROMPT, unknown))
        await raises(InvalidRequest, fleet.forgo(b, kv, 3, 48))
        await raises(InvalidRequest, fleet.forgo(b, kv, 0, 52))
        client = link_of(a, "b").client
        assert client is not None
        for begin, end in ((0, 0), (8, 4), (-4, 8), (0, 52), (0, 2**40), (2, 8)):
            claim = Claim(lease=kv.lease, epoch=1, begin=begin, end=end, engine_id="a", sender_epoch=1)
            await raises(InvalidRequest, client.call(claim))
        await raises(
            StaleEpoch,
            client.call(Claim(lease=kv.lease, epoch=2, begin=0, end=48, engine_id="a", sender_epoch=1)),
        )
        await client.call(ClaimEnded(claim=99))
        await fleet.release(b, kv)

    run_fleet(work)


def test_an_abort_ends_a_preparation_that_waits() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        held = await fleet.prep_recv(b, LONG)
        waiting = asyncio.create_task(fleet.prep_recv(b, prompt_of(60, seed=1), admit_by=60.0, sub_id="w"))
        await asyncio.sleep(0.1)
        assert (await (await fleet.client(b)).call(Abort(sub_id="w"))).outcome == "freed"  # type: ignore[union-attr]
        await raises(MicroserveError, waiting)
        await fleet.release(b, held)
        await asyncio.sleep(0.5)
        assert b.leased() == 0

    run_fleet(work)


# --- prefix tree ---


def test_the_prefix_tree_is_looked_at_pinned_and_emptied() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        prompt = pack_tokens(PROMPT)
        assert await fleet.ask(a, CacheMatch(prompt=prompt), CacheMatched) == CacheMatched(tokens=0)
        await answers(fleet, a, PROMPT)
        assert await fleet.ask(a, CacheMatch(prompt=prompt), CacheMatched) == CacheMatched(tokens=48)
        assert await fleet.ask(a, CachePin(prompt=prompt, ttl=5.0), CacheMatched) == CacheMatched(tokens=48)
        assert (await fleet.ask(a, CacheEvict(), CacheEvicted)).pages <= 1
        (found,) = (await fleet.ask(a, CachePrefixes(count=5), Prefixes)).prefixes
        assert unpack_tokens(found.prompt).tolist()[:48] == PROMPT[:48]
        assert found.pinned
        assert await fleet.ask(a, CacheUnpin(prompt=prompt), CacheMatched) == CacheMatched(tokens=48)
        assert (await fleet.ask(a, CacheEvict(prompt=prompt), CacheEvicted)).pages >= 12
        assert await fleet.ask(a, CacheMatch(prompt=prompt), CacheMatched) == CacheMatched(tokens=0)

    run_fleet(work)


def test_a_pin_ends_by_itself_on_an_idle_engine() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        await answers(fleet, a, PROMPT)
        await fleet.ask(a, CachePin(prompt=pack_tokens(PROMPT), ttl=5.0), CacheMatched)
        assert a.core.cache.statistics().pinned > 0
        took = await fleet.until(lambda: a.core.cache.statistics().pinned == 0)
        assert 4.5 < took < 6.0

    run_fleet(work)


@pytest.mark.parametrize("kind", [CacheMatch, CacheUnpin, CacheEvict])
@pytest.mark.parametrize("prompt", [b"", b"\1\2", pack_tokens([50])])
def test_no_prompt_is_no_prefix(kind: Callable[..., Any], prompt: bytes) -> None:
    async def work(fleet: Fleet) -> None:
        await raises(InvalidRequest, fleet.ask(fleet["a"], kind(prompt=prompt), object))

    run_fleet(work)


def test_a_routers_verb_is_not_an_engines() -> None:
    async def work(fleet: Fleet) -> None:
        await raises(NotFound, (await fleet.client(fleet["a"])).call(ListModels()))

    run_fleet(work)


# --- fuzz ---

NAMES = st.sampled_from(["a", "a", "a", "b", "", "x" * 200])
SUB_IDS = st.sampled_from([f"s{n}" for n in range(12)] + [""])
LEASES = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 0, 2**63 - 1])
POSITIONS = st.sampled_from([0, 0, 16, 48, 60, 119, 119, 120, -1, -1, 7, 50, -130, 130, -(2**63), 2**62])
SECONDS = st.sampled_from([0.0, 0.05, 1.0, 1e300])
PROMPTS = st.sampled_from(
    [pack_tokens(PROMPT), pack_tokens(LONG), pack_tokens(LONG), pack_tokens(LONG[:16]), b"", b"\1", pack_tokens([99])]
)
LAYOUTS = st.builds(
    Layout,
    model_revision=st.sampled_from(["1", "1", "1", "2"]),
    dtype=st.just("fake"),
    page_size=st.sampled_from([PAGE, PAGE, PAGE, -1]),
    layers=st.just(1),
    kv_heads=st.just(1),
    head_dim=st.just(1),
)
ADDRESSES = st.builds(
    KvAddress,
    engine_id=NAMES,
    epoch=st.sampled_from([1, 1, 1, 0, 2, 2**63]),
    endpoint=st.sampled_from(["memory://1", "memory://2", "nowhere", "memory://9"]),
    lease=LEASES,
    matched=POSITIONS,
    end=POSITIONS,
    pages=st.binary(max_size=40),
    layout=LAYOUTS,
)
OPTIONAL = st.one_of(st.none(), SECONDS)
ENDS = st.one_of(st.none(), POSITIONS)
CLAIMS = st.builds(
    Claim,
    lease=LEASES,
    epoch=st.sampled_from([1, 1, 1, 2]),
    begin=POSITIONS,
    end=POSITIONS,
    engine_id=NAMES,
    sender_epoch=st.sampled_from([1, 1, 1, 2]),
    sub_id=SUB_IDS,
    digest=st.sampled_from([b"", b"x"]),
)
PEERS = st.builds(PeerAddress, engine_id=NAMES, epoch=st.integers(-1, 3), endpoint=st.sampled_from(["memory://1", "x"]))
BODIES = st.one_of(
    st.builds(
        PrepRecv,
        request_id=NAMES,
        sub_id=SUB_IDS,
        prompt=PROMPTS,
        end=ENDS,
        expect_tokens=st.sampled_from([0, 9, 2**62]),
        admit_by=OPTIONAL,
    ),
    st.builds(
        RemoteSend, request_id=NAMES, sub_id=SUB_IDS, prompt=PROMPTS, address=ADDRESSES, begin=POSITIONS, end=ENDS
    ),
    st.builds(
        StartGenerate,
        request_id=NAMES,
        sub_id=SUB_IDS,
        prompt=PROMPTS,
        begin=POSITIONS,
        lease=st.one_of(st.none(), LEASES),
        kv_wait=OPTIONAL,
        sampling=st.just(SamplingParams(max_tokens=3)),
    ),
    st.builds(Commit, request_id=NAMES, sub_id=SUB_IDS, lease=LEASES, wait=OPTIONAL),
    st.builds(Release, lease=LEASES),
    st.builds(Forgo, lease=LEASES, begin=POSITIONS, end=POSITIONS),
    st.builds(Abort, sub_id=SUB_IDS),
    CLAIMS,
    st.builds(ClaimEnded, claim=st.integers(0, 5), error=NAMES),
    st.builds(
        PeerHello,
        engine_id=NAMES,
        epoch=st.sampled_from([1, 1, 1, 2]),
        endpoint=st.sampled_from(["memory://1", "x"]),
        layout=LAYOUTS,
        transport=st.sampled_from(["loopback", "nixl"]),
        metadata=st.binary(max_size=20),
    ),
    st.builds(Meet, peers=st.lists(PEERS, max_size=3)),
    st.builds(CacheMatch, prompt=PROMPTS),
    st.builds(CachePin, prompt=PROMPTS, ttl=st.sampled_from([0.01, 3.0])),
    st.builds(CacheUnpin, prompt=PROMPTS),
    st.builds(CacheEvict, prompt=st.one_of(st.none(), PROMPTS)),
    st.builds(CachePrefixes, count=st.integers(1, 1000)),
)
SENT = st.lists(
    st.tuples(st.sampled_from(["router", "engine"]), BODIES, st.sampled_from([0.0, 0.03, 0.5])), max_size=25
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(sent=SENT)
def test_no_message_harms_an_engine(sent: list[tuple[str, Any, float]]) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        real = await fleet.prep_recv(b, LONG, end=-1)
        router = await fleet.client(b, "fuzz")
        calls: list[asyncio.Task[object]] = []
        for who, body, pause in sent:
            client = router if who == "router" else link_of(a, "b").client
            if client is None:
                continue
            if isinstance(body, RemoteSend) and body.address.lease == 1:
                body = replace(send_body(LONG, replace(real, pages=body.address.pages)), sub_id=body.sub_id)
            calls.append(asyncio.ensure_future(client.call(body, budget=20.0)))
            if pause:
                await asyncio.sleep(pause)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            # Each was answered, with an error of ours if with one, and never with a bug.
            assert not isinstance(outcome, BaseException) or isinstance(outcome, MicroserveError), outcome
            assert not isinstance(outcome, InternalError), outcome
        # The engine still does what it is for.
        assert (await fleet.ask(b, Stats(), StatsReply)).integrity == "ok"
        await fleet.release(b, real)
        router.close("done")
        # What was claimed in the name of "a" is ended in its name: nobody else may do it, and time does not.
        await fleet.until(lambda: link_of(a, "b").state == "ready")
        for claim in tuple(b.core.kv._keys):
            client = link_of(a, "b").client
            assert client is not None
            await client.call(ClaimEnded(claim=claim))
        pages = b.core.cache.statistics
        await fleet.until(lambda: not pages().leased and not pages().quarantined and not pages().pinned, limit=90.0)
        await answers(fleet, b, PROMPT)

    run_fleet(work, lease_term=5.0, lease_life=15.0)
