"""What the TUI shows, without a terminal: rates, bars, sparklines, timelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from tests.test_tools_status import ENGINE, STATUS

from microserve.runtime.messages import Load, PeerLink, RequestInfo, SubRequestInfo
from microserve.tools.tui.model import (
    FleetTrack,
    LinkTrack,
    brought,
    cut,
    fitting,
    matches,
    nbytes,
    number,
    pool_bar,
    pool_words,
    seconds,
    sparkline,
    timeline,
)

if TYPE_CHECKING:
    from microserve.runtime.messages import StatusReply


def seen(tokens: int, *, epoch: int = 7, router_epoch: int = 1, sent: int = 0) -> StatusReply:
    load = replace(ENGINE.load, generated_tokens=tokens, sent_bytes=sent)
    engine = replace(ENGINE, info=replace(ENGINE.info, epoch=epoch), load=load)
    return replace(STATUS, epoch=router_epoch, engines=[engine])


def test_rates_are_between_two_looks_of_one_incarnation() -> None:
    track = FleetTrack()
    track.see(seen(100), 10.0)
    assert (track.track("gpu-a").rates.tokens, track.tokens) == (0.0, 0.0)
    track.see(seen(150, sent=4000), 12.0)
    rates = track.track("gpu-a").rates
    assert (rates.tokens, rates.sent, track.tokens) == (25.0, 2000.0, 25.0)
    # The same heartbeat again says nothing; one that stays the same for long says that nothing happens.
    track.see(seen(150, sent=4000), 13.0)
    assert track.track("gpu-a").rates.tokens == 25.0
    track.see(seen(150, sent=4000), 14.0)
    assert track.track("gpu-a").rates.tokens == 0.0
    assert list(track.track("gpu-a").history) == [25.0, 0.0]


def test_a_restart_of_an_engine_or_of_the_router_begins_anew() -> None:
    track = FleetTrack()
    track.see(seen(1000), 1.0)
    track.see(seen(2000), 2.0)
    track.see(seen(5, epoch=8), 3.0)
    assert (track.track("gpu-a").rates.tokens, list(track.track("gpu-a").history)) == (0.0, [])
    track.see(seen(10, epoch=8), 4.0)
    track.see(seen(20, epoch=8, router_epoch=2), 5.0)
    assert (track.tokens, list(track.history)) == (0.0, [0.0])
    track.see(replace(STATUS, epoch=2, engines=[]), 6.0)
    with pytest.raises(KeyError):
        track.track("gpu-a")


def test_rates_of_links() -> None:
    link = PeerLink(engine_id="b", epoch=1, state="ready", sent_bytes=100, received_bytes=10)
    track = LinkTrack()
    track.see(("a", 1), [link], 1.0)
    assert track.rates == {"b": (0.0, 0.0)}
    track.see(("a", 1), [replace(link, sent_bytes=300, received_bytes=20)], 3.0)
    assert track.rates == {"b": (100.0, 5.0)}
    track.see(("a", 2), [replace(link, sent_bytes=900)], 4.0)
    assert track.rates == {"b": (0.0, 0.0)}


def test_a_sparkline() -> None:
    assert sparkline([0, 1, 2, 4, 8], 10) == "▁▂▃▅█"
    assert sparkline([0, 1, 2, 4, 8], 2) == "▅█"
    assert sparkline([4], 5, top=8) == "▅"
    assert (sparkline([0, 0], 5), sparkline([], 5)) == ("▁▁", "")


@pytest.mark.parametrize(
    ("pages", "bar"),
    [
        ({}, "··········"),
        ({"owned_pages": 50, "cached_pages": 20}, "█████▒▒···"),
        ({"owned_pages": 1, "leased_pages": 1, "quarantined_pages": 1, "cached_pages": 1}, "█▓╳▒······"),
        ({"owned_pages": 96, "leased_pages": 2, "cached_pages": 2}, "████████▓▒"),
        ({"owned_pages": 50, "cached_pages": 49, "quarantined_pages": 1}, "████╳▒▒▒▒▒"),
    ],
)
def test_a_bar_of_pages(pages: dict[str, Any], bar: str) -> None:
    load = Load(total_pages=100, free_pages=100 - sum(pages.values()), **pages)
    assert pool_bar(load, 10).plain == bar


def test_all_of_the_last_minute_in_a_few_blocks() -> None:
    track = FleetTrack()
    tokens = 0
    for second in range(63):
        tokens += 60 if second > 50 else 30
        track.see(seen(tokens), float(second))
    engine = track.track("gpu-a")
    assert len(engine.history) == 60
    # Means of five each, and of what has come since; what happened 51 to 62 seconds after the start is at the end.
    assert engine.minute(12) == [30.0] * 9 + [60.0] * 3
    assert engine.minute(60) == list(engine.history)


def test_names_are_cut_in_the_middle() -> None:
    assert cut("engine-0", 8) == "engine-0"
    assert cut("gpu-node-17.example.com", 11) == "gpu-n…e.com"
    assert cut("日本日本日本", 6) == "日 …本"


def test_pages_in_words() -> None:
    load = Load(total_pages=2000, free_pages=1500, owned_pages=400, leased_pages=60, quarantined_pages=1)
    assert pool_words(load) == "2,000 pages: 400 owned, 60 leased, 1 quarantined, 0 cached, 1,500 free"
    assert pool_bar(Load(), 4).plain == "----"


def test_numbers_for_people() -> None:
    assert [number(each) for each in (0, 7, 7.26, 950.4, 1234, 35_000, 1_200_000, 2e9)] == [
        *("0", "7", "7.3", "950", "1.2k", "35k", "1.2M", "2.0G"),
    ]
    assert [nbytes(each) for each in (0, 999, 2_100_000, 4e9)] == ["0 B", "999 B", "2.1 MB", "4.0 GB"]
    assert [seconds(each) for each in (None, 0.00085, 0.0123, 1.234, 99.96, 1234)] == [
        *("-", "850µs", "12.3ms", "1.23s", "100s", "1234s"),
    ]


def test_a_filter_wants_every_word_somewhere() -> None:
    assert matches("", "x")
    assert matches("READY gpu", "gpu-a", "ready")
    assert not matches("ready gpu", "gpu-a", "draining")


REQUEST = RequestInfo(
    request_id="q",
    model="m",
    strategy="s@1",
    state="running",
    age=2.0,
    prompt_tokens=1000,
    engines=["b"],
    first_token=1.0,
    sub_requests=[
        SubRequestInfo(
            verb="prep_recv", engine="b", begin=0, end=999, started=0.0, ended=0.02, outcome="ok", matched=16
        ),
        SubRequestInfo(
            verb="remote_send", engine="a", begin=16, end=999, started=0.0, ended=1.0, outcome="ok",
            computed=900, reused=83, bytes=2_000_000,
        ),
        SubRequestInfo(verb="start_generate", engine="b", begin=999, end=1000, started=0.5),
    ],
)  # fmt: skip


def test_a_timeline() -> None:
    lines = [line.plain for line in timeline(REQUEST, 82)]
    # 6 for names, 16 for verbs, 40 for words: 20 are left for 2 seconds.
    assert [line[:7] for line in lines[1:4]] == ["b      ", "a      ", "b      "]
    bars = [line[22:42] for line in lines[1:4]]
    assert bars == ["█" + "·" * 19, "█" * 10 + "·" * 10, "·" * 5 + "▓" * 15]
    assert [line[43:] for line in lines[1:4]] == [
        "20ms [0,999) matched 16",
        "1s [16,999) computed 900 reused 83 2.0 MB",
        "- [999,1000) running",
    ]
    assert lines[4].index("▲") == 22 + 10
    assert lines[0].rstrip().endswith("2s")


def test_a_sub_request_that_failed_says_how() -> None:
    failed = replace(REQUEST.sub_requests[1], outcome="transfer_failed", computed=0, reused=0, bytes=0)
    assert brought(failed) == "1s [16,999) transfer_failed"
    nothing = timeline(replace(REQUEST, sub_requests=[], first_token=None), 80)
    assert nothing[1].plain == "nothing was asked of an engine yet"


def test_a_line_is_cut_between_its_parts() -> None:
    assert fitting(["a router", "up 3 s", "where"], 22) == "a router · up 3 s"
    assert fitting(["a router", "up 3 s", "where"], 25) == "a router · up 3 s · where"
    assert fitting(["a router"], 3) == "a router"
    assert fitting(["路由", "up"], 8) == "路由"
