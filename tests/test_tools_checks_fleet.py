"""What `microserve doctor` makes of what routers and engines say, and of HTTP."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace
from tests.machine_support import only, told
from tests.router_support import engine_info

import microserve
from microserve.runtime.errors import (
    ConfigError,
    Forbidden,
    MicroserveError,
    PeerLost,
    ProtocolError,
    Unauthorized,
    VersionMismatch,
)
from microserve.runtime.messages import (
    FleetEngine,
    InfoReply,
    Load,
    PeerLink,
    StatsReply,
    StatusReply,
)
from microserve.tools.checks.fleet import (
    Seen,
    judge_engine,
    judge_fleet,
    judge_layouts,
    judge_routers,
    unanswered,
)
from microserve.tools.checks.http import Answer, check_http, judge_ready, judge_time

if TYPE_CHECKING:
    from microserve.runtime.messages import EngineInfo

ENDPOINT = "tcp://127.0.0.1:7700"


def engine(name: str = "a", *, state: str = "ready", info: EngineInfo | None = None) -> FleetEngine:
    return FleetEngine(info=info or engine_info(name), load=Load(state=state), state=state, charged=0, last_seen=0.1)


def status(*engines: FleetEngine, router: str = "r", version: str = microserve.__version__) -> StatusReply:
    return StatusReply(
        router=router,
        epoch=1,
        version=version,
        uptime=1.0,
        engines=list(engines),
        active_requests=0,
        queued_requests=0,
        requests_total=0,
        strategy="data_parallel@1",
    )


def says(*links: PeerLink, state: str = "ready") -> InfoReply:
    return InfoReply(info=engine_info("a"), load=Load(state=state), links=list(links))


def link(state: str, **more: str | float | int) -> PeerLink:
    return PeerLink(engine_id="b", epoch=1, state=state, **more)  # type: ignore[arg-type]


# --- routers -------------------------------------------------------------------------------------------------------


def test_a_fleet_that_is_well() -> None:
    seen = Seen(ENDPOINT, status(engine()), infos={"a": says()}, stats={"a": StatsReply(values={})})
    assert told(judge_fleet([seen])) == [
        ("ok", f"router r answers at {ENDPOINT}, version {microserve.__version__}, 1 engine"),
        ("ok", f"router r and this are of version {microserve.__version__}"),
        ("ok", "engine a answers: m, fake, 0 running"),
    ]


def test_a_router_without_engines_and_of_another_version() -> None:
    found = judge_fleet([Seen(ENDPOINT, status(version="9.9.9"))])
    assert [(each.check, each.status) for each in found] == [
        ("router", "ok"),
        ("versions", "note"),
        ("engines", "note"),
    ]
    assert found[1].message == f"router r is of version 9.9.9, and this is {microserve.__version__}"
    assert ENDPOINT in found[2].advice


def test_routers_that_do_not_do_the_same() -> None:
    other = replace(status(engine("a"), engine("b"), router="s"), strategy="balanced@2")
    assert told(judge_routers([status(engine("a")), other])) == [
        ("note", "routers serve by different strategies: data_parallel@1 on r, balanced@2 on s"),
        ("note", "router r does not know b, which others do"),
    ]
    assert judge_routers([status(engine("a")), status(engine("a"), router="s")]) == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (PeerLost(f"no router answers at {ENDPOINT}"), "`microserve up`"),
        (Unauthorized("r refused our key"), "--key-file"),
        (Forbidden("not you"), "--key-file"),
        (VersionMismatch("the listener speaks version 2, we speak 1"), "install the same version"),
        (ConfigError("k is not a key file"), "--key-file"),
        (ProtocolError("nonsense"), "see the router's log"),
    ],
)
def test_why_a_router_did_not_answer(error: MicroserveError, advice: str) -> None:
    found = unanswered(ENDPOINT, error)
    assert (found.status, advice in found.advice) == ("problem", True)
    assert found.message.count(ENDPOINT) == 1


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "expected"),
    [("ready", "ok"), ("draining", "note"), ("connecting", "note"), ("silent", "problem"), ("degraded", "problem")],
)
def test_engines_by_their_state(state: str, expected: str) -> None:
    found = only(judge_engine(engine(state=state), None, None))
    assert (found.check, found.status, bool(found.advice)) == ("engines", expected, expected != "ok")


def test_an_engine_that_does_not_answer_or_may_not_be_asked() -> None:
    lost = only(judge_engine(engine(), None, None, "does not answer within 1.8 s"))
    assert (lost.status, lost.message) == ("problem", "engine a does not answer within 1.8 s")
    assert only(judge_engine(engine(), None, None, "may not be asked: no")).status == "note"


def test_an_engine_in_disorder_and_one_of_another_protocol() -> None:
    found = judge_engine(engine(), says(), StatsReply(values={}, integrity="3 pages are gone"))
    assert told(found)[1] == ("problem", "engine a finds its pages in disorder: 3 pages are gone")
    other = engine_info("a", layout=replace(engine_info("a").layout, protocol=9))
    assert [each.check for each in judge_engine(engine(info=other), None, None)] == ["engines", "versions"]


@pytest.mark.parametrize(
    ("given", "expected", "message"),
    [
        (
            link("ready", transport="cuda_ipc", gigabytes_per_second=363.0),
            "ok",
            "can send KV to b (cuda_ipc, 363.0 GB/s)",
        ),
        (link("ready", transport="shm", failures=2), "note", "link of engine a to b: 2 pushes have failed"),
        (link("refused", detail="page_size: 16 here, 32 there"), "problem", "refused: page_size: 16 here, 32 there"),
        (link("lost", detail="gone"), "note", "link of engine a to b is lost: gone"),
        (link("connecting"), "note", "link of engine a to b is connecting"),
    ],
)
def test_links(given: PeerLink, expected: str, message: str) -> None:
    found = [each for each in judge_engine(engine(), says(given), None) if each.check == "links"][-1]
    assert (found.status, message in found.message, bool(found.advice)) == (expected, True, expected != "ok")


def test_layouts_that_agree_and_that_do_not() -> None:
    layout = engine_info().layout
    a, b, c = (
        engine_info("a"),
        engine_info("b"),
        engine_info("c", layout=replace(layout, page_size=32, dtype="bfloat16")),
    )
    alone = engine_info("d", model="other", layout=replace(layout, page_size=64))
    assert told(judge_layouts([a, b, alone])) == [("ok", "2 engines of m agree: 16 tokens a page, float32")]
    wrong = only(judge_layouts([a, b, c, alone]))
    assert (wrong.check, wrong.status) == ("layouts", "problem")
    assert wrong.message == (
        "engines of m exchange no KV: dtype is float32 on a, b and bfloat16 on c; page_size is 16 on a, b and 32 on c"
    )


# --- HTTP ----------------------------------------------------------------------------------------------------------


def answer(status: int = 200, body: bytes = b"{}", date: float | None = 999.0, expires: float | None = None) -> Answer:
    return Answer(status, body, date, 1000.0, expires)


def test_http_that_takes_requests() -> None:
    found = check_http("r", "http://127.0.0.1:8000", ENDPOINT, 1.0, lambda _url, _seconds: answer())
    assert told(found) == [
        ("ok", "router r takes requests at http://127.0.0.1:8000"),
        ("ok", "the clock of router r agrees with ours"),
    ]


def test_http_that_does_not() -> None:
    busy = answer(503, b'{"ready":false,"reasons":["no engine is ready"]}')
    found = only(judge_ready("r", "http://h:1", busy))
    assert (found.status, found.message) == ("problem", "router r takes no requests at http://h:1: no engine is ready")
    assert only(judge_ready("r", "http://h:1", answer(404, b"<html>"))).status == "note"


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "problem", "does not answer HTTP at http://10.0.0.1:80"),
        (TimeoutError(), "problem", "TimeoutError"),
        (ssl.SSLCertVerificationError("self-signed"), "note", "its certificate is not trusted here"),
    ],
)
def test_http_that_cannot_be_reached(error: OSError, expected: str, words: str) -> None:
    def refuse(_url: str, _seconds: float) -> Answer:
        if isinstance(error, ssl.SSLCertVerificationError):
            error.verify_message = "self-signed"
        raise error

    found = only(check_http("r", "http://10.0.0.1:80", ENDPOINT, 1.0, refuse))
    assert (found.status, words in found.message, bool(found.advice)) == (expected, True, True)
    elsewhere = only(check_http("r", "http://127.0.0.1:80", "tcp://10.0.0.1:7700", 1.0, refuse))
    assert (elsewhere.status, "own machine alone" in elsewhere.message) == ("ok", True)


def test_a_certificate_that_ends_soon() -> None:
    _, soon = judge_ready("r", "https://h:1", answer(expires=1000.0 + 3 * 86400))
    assert (soon.status, soon.message) == ("note", "the certificate of https://h:1 ends in 3 days")
    assert len(judge_ready("r", "https://h:1", answer(expires=1000.0 + 90 * 86400))) == 1


def test_clocks_that_differ() -> None:
    assert judge_time("r", answer(date=None)) == []
    assert only(judge_time("r", answer(date=1059.0))).message == "the clock of router r is 60 s ahead of ours"
    assert only(judge_time("r", answer(date=989.0))).message == "the clock of router r is 10 s behind ours"
