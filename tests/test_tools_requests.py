"""`microserve requests`: what runs, what ran, what was asked of engines for it, and ending it."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from tests.cluster import FAKE, Cluster
from tests.command_support import Terminal, command, usage_error

from microserve.runtime.errors import Cancelled
from microserve.runtime.messages import RequestInfo, SubRequestInfo
from microserve.tools import fleet_view
from microserve.tools import requests as requests_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.client import Client, Stream

LONG = 30_000
"""Tokens that nobody waits for: half a minute."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    labels = ("--labels", "prefill=1,decode=1")
    with Cluster(engines=2, engine_args=(*FAKE, *labels), router_args=("--strategy", "prefill_decode")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Client:
    made = cluster.client()
    # Now: what it opens belongs to no test.
    made.models()
    return made


def running(client: Client, name: str) -> Stream:
    """A request that has begun to answer."""
    stream = client.stream(list(range(1, 60)), max_tokens=LONG, ignore_eos=True, request_id=name)
    next(stream)
    return stream


def test_what_runs_and_what_ran(cluster: Cluster, client: Client) -> None:
    client.generate([1, 2, 3], max_tokens=4, ignore_eos=True, request_id="done")
    with running(client, "one"), running(client, "two [red]\x1b[31m"):
        found = command(cluster, "requests", "--json").json
        assert set(found) == {"active", "requests", "recent"}
        assert found["active"] == 2
        assert [each["request_id"] for each in found["requests"]] == ["one", "two [red]\x1b[31m"]
        first = found["requests"][0]
        assert set(first) == set(RequestInfo.__struct_fields__)
        assert (first["state"], first["prompt_tokens"], first["ended"]) == ("running", 59, None)
        assert found["recent"] == []
        shown = command(cluster, "requests", "--recent", "1")
        title, *rows = shown.out.splitlines()
        assert title.split() == [
            *("request", "state", "time", "TTFT", "prompt", "cached", "output", "engines", "strategy", "model")
        ]
        # Names that callers chose are shown, and neither obeyed by the terminal nor read as markup.
        assert [row[:18].rstrip() for row in rows] == ["one", "two [red]\\x1b[31m", "done"]
        done = rows[2].split()
        assert (done[1], done[4:7], done[-1]) == ("ok", ["3", "0", "4"], "tokens-only")
        assert command(cluster, "requests", "--recent", "1", "--json").json["recent"][0]["request_id"] == "done"


def test_eighty_columns_hold_the_table(cluster: Cluster, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "request-" + "x" * 38
    client.generate([1, 2, 3], max_tokens=4, ignore_eos=True, request_id=name)
    monkeypatch.setattr(fleet_view, "table_console", lambda: Console(file=sys.stdout, width=80, highlight=False))
    title, row, more = command(cluster, "requests", "--recent", "1").out.splitlines()
    assert max(len(title), len(row)) <= 80, (title, row)
    assert title.split() == ["request", "state", "time", "output", "engines"]
    assert row.split()[:2] == [name, "ok"]
    assert more == "left out to fit: TTFT, prompt, cached, strategy, model; --json has all"


def test_one_request_and_its_timeline(cluster: Cluster, client: Client) -> None:
    with running(client, "seen"):
        [found] = command(cluster, "requests", "seen", "--json").json
        assert [set(sub) for sub in found["sub_requests"]] == [set(SubRequestInfo.__struct_fields__)] * len(
            found["sub_requests"]
        )
        assert found["sub_requests"][-1]["verb"] == "start_generate"
        shown = command(cluster, "requests", "seen")
        assert (shown.code, shown.err) == (0, "")
        head, title, *subs = shown.out.splitlines()
        assert head.startswith("seen · running · model tokens-only · strategy prefill_decode@")
        titles = ["verb", "engine", "range", "start", "took", "matched", "computed", "reused", "moved", "outcome"]
        assert title.split() == titles
        assert len(subs) == len(found["sub_requests"])
        assert subs[-1].split()[0] == "start_generate"
        assert subs[-1].split()[-2] == "running"


def test_a_timeline_to_the_letter() -> None:
    subs = [
        SubRequestInfo(
            verb="prep_recv", engine="b", begin=0, end=1089, started=0.0, ended=0.01, outcome="ok", matched=16
        ),
        SubRequestInfo(
            verb="remote_send",
            engine="a",
            begin=16,
            end=1089,
            started=0.0,
            ended=0.5,
            outcome="ok",
            computed=1057,
            reused=16,
            bytes=2_500_000,
        ),
        SubRequestInfo(
            verb="start_generate", engine="b", begin=1089, end=1090, started=0.5, ended=1.0, outcome="peer_lost"
        ),
    ]
    request = RequestInfo(
        request_id="q",
        model="m",
        strategy="s@1",
        state="peer_lost",
        age=60.0,
        prompt_tokens=1090,
        output_tokens=2,
        cached_tokens=16,
        engines=["b"],
        first_token=0.5,
        ended=1.0,
        error="engine b\x07 is gone",
        sub_requests=subs,
    )
    out = io.StringIO()
    requests_command.show_one(Console(file=out, width=1000, markup=False, highlight=False), request)
    head, error, *lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert head == (
        "q · peer_lost · model m · strategy s@1 · 1,090 prompt tokens, 16 cached, 2 output · "
        "first token after 500ms · took 1s"
    )
    assert error == r"engine b\x07 is gone"
    assert lines == [
        "verb engine range start took matched computed reused moved outcome",
        f"prep_recv b [0, 1,089) 0µs 10ms 16 - - - ok {'█' + '·' * 29}",
        f"remote_send a [16, 1,089) 0µs 500ms - 1,057 16 2.5 MB ok {'█' * 15 + '·' * 15}",
        f"start_generate b [1,089, 1,090) 500ms 500ms - - - - peer_lost {'·' * 15 + '█' * 15}",
    ]


def test_an_abort_is_a_clean_error_for_the_caller(cluster: Cluster, client: Client) -> None:
    first, second = running(client, "a1"), running(client, "a2")
    shown = command(cluster, "requests", "abort", "--yes", "a1", "a1")
    assert (shown.code, shown.out, shown.err) == (0, "a1: aborted\n", "")
    with pytest.raises(Cancelled, match="ended by an operator"):
        list(first)
    shown = command(cluster, "requests", "abort", "a1", "a2", "--yes", "--json")
    assert shown.code == 1
    assert json.loads(shown.out) == [
        {"request_id": "a1", "outcome": "unknown"},
        {"request_id": "a2", "outcome": "freed"},
    ]
    assert shown.err == "microserve requests: a1 does not run\n"
    with pytest.raises(Cancelled):
        list(second)
    [found] = command(cluster, "requests", "a2", "--json").json
    assert (found["state"], found["error"]) == ("cancelled", "the request was ended by an operator")


def test_what_is_not_there_and_wrong_usage(cluster: Cluster) -> None:
    shown = command(cluster, "requests", "never\x1b")
    assert (shown.code, shown.out) == (1, "")
    told = r"there is no request 'never\x1b'; the last 256 that ended are remembered"
    assert shown.err == f"microserve requests: {told}\n"
    for words, told in (
        (("abort", "x"), "there is nobody to ask: say --yes"),
        (("abort",), "abort: which REQUEST_ID?"),
        (("x", "y"), "`abort REQUEST_ID...` ends requests; without `abort`, one REQUEST_ID at a time"),
        (("--recent", "257"), "--recent: 257 is not between 0 and 256"),
        (("--recent", "x"), "argument --recent: invalid int value: 'x'"),
    ):
        assert usage_error(cluster, "requests", *words) == told
    shown = command("tcp://127.0.0.1:1", "requests")
    assert (shown.code, shown.out, len(shown.err.splitlines())) == (1, "", 1)


@pytest.mark.parametrize(
    ("keys", "code", "told"),
    [
        ("\n", 1, "nothing was done"),
        ("no\n", 1, "nothing was done"),
        ("\x04", 1, "nothing was done"),
        ("\x03", 130, ""),
        ("y\n", 0, "asked: aborted"),
    ],
)
def test_on_a_terminal_it_asks(cluster: Cluster, client: Client, keys: str, code: int, told: str) -> None:
    stream = running(client, "asked")
    with stream, Terminal(cluster, "requests", "abort", "asked") as terminal:
        terminal.until("Abort request asked? Callers get an error. [y/N] ")
        terminal.type(keys)
        assert terminal.end() == code
        assert told in terminal.shown
        assert "Traceback" not in terminal.shown
        if code == 0:
            with pytest.raises(Cancelled):
                list(stream)
        else:
            next(stream)
