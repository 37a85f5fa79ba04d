"""What `microserve status` shows."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from msgspec.structs import replace
from rich.console import Console
from tests.cluster import FAKE, Cluster, daemon_environ

from microserve.runtime.messages import EngineInfo, FleetEngine, Layout, Load, ModelInfo, StatusReply
from microserve.tools.fleet_view import (
    FleetTable,
    duration,
    headline,
    percent,
    plain_table,
    print_fitting,
    print_fleet,
    print_whole,
)
from microserve.tools.status import as_json

ENGINE = FleetEngine(
    info=EngineInfo(
        engine_id="gpu-a",
        epoch=7,
        endpoint="tcp://10.0.0.1:1",
        events_endpoint="tcp://10.0.0.1:2",
        model=ModelInfo(name="llama", revision="r", architecture="llama", vocab_size=10, max_context=100),
        layout=Layout(model_revision="r", dtype="float32", page_size=16, layers=1, kv_heads=1, head_dim=1),
        executor="torch",
        max_running=64,
    ),
    load=Load(
        running=3,
        waiting=2,
        free_pages=75,
        total_pages=100,
        generated_tokens=1234,
        prefix_hit_tokens=1,
        prefix_lookup_tokens=3,
    ),
    state="ready",
    charged=5,
    last_seen=0.44,
)
STATUS = StatusReply(
    router="r",
    epoch=1,
    version="0.1.0",
    uptime=3725.0,
    engines=[ENGINE],
    active_requests=5,
    queued_requests=1,
    requests_total=99,
    strategy="data_parallel@abc",
    http="http://127.0.0.1:8000",
)


def test_the_table() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(FleetTable(STATUS))
    title, row = out.getvalue().splitlines()
    titles = "engine state model executor requests running waiting KV used prefix hits tokens heard"
    assert " ".join(title.split()) == titles
    assert " ".join(row.split()) == "gpu-a ready llama torch 5 3/64 2 25% 33% 1234 0.4 s ago"


def test_the_headline() -> None:
    assert headline(STATUS) == (
        "router r · up 1h 2m · strategy data_parallel@abc · 5 running · 1 queued · 99 served · http://127.0.0.1:8000"
    )


def test_json_has_every_field() -> None:
    shown = json.loads(as_json(replace(STATUS, epoch=0x64C1)))
    assert (shown["router"], shown["epoch"]) == ("r", "64c1")
    (engine,) = shown["engines"]
    assert (engine["id"], engine["state"], engine["charged"]) == ("gpu-a", "ready", 5)
    assert engine["load"]["leased_pages"] == 0
    assert engine["info"]["model"]["name"] == "llama"
    assert engine["info"]["labels"] == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0s"), (59.9, "59s"), (60, "1m 0s"), (3599, "59m 59s"), (3600, "1h 0m"), (90000, "1d 1h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percentages() -> None:
    assert (percent(1, 3), percent(0, 0), percent(5, 5)) == ("33%", "-", "100%")


def test_against_a_live_router() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:

        def status(*more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-P", "-m", "microserve.tools", "status", "--router", cluster.router, *more]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, env=daemon_environ(), check=True)

        shown = json.loads(status("--json").stdout)
        assert [(engine["id"], engine["state"]) for engine in shown["engines"]] == [("e0", "ready")]
        head, title, row = status().stdout.splitlines()
        assert head.startswith("router r · up ")
        assert cluster.http in head
        assert title.startswith("engine")
        assert row.split()[:4] == ["e0", "ready", "tokens-only", "fake"]
        cluster.engines[0].terminate()
        cluster.engines[0].wait()
        assert "no engines; start one with `microserve engine`" in status().stdout


def test_a_narrow_terminal_cuts_no_name_and_no_number() -> None:
    out = io.StringIO()
    name = f"gpu-node.{'x' * 40}.example.com"
    table = plain_table("engine", "model", "heard")
    table.add_row(name, "llama", "0.4 s ago")
    console = Console(file=out, width=60)
    print_whole(console, table)
    head, row = (line.split() for line in out.getvalue().splitlines())
    assert (row[0], "…" in out.getvalue()) == (name, False)
    assert (head[-1], console.width) == ("heard", 60)


@pytest.mark.parametrize(
    ("width", "columns", "left_out"),
    [
        (120, "engine state model executor requests running waiting KV used prefix hits tokens heard", ""),
        (80, "engine state model requests running waiting KV used tokens heard", "executor, prefix hits"),
        (40, "engine state model running heard", "executor, requests, waiting, KV used, prefix hits, tokens"),
    ],
)
def test_a_narrow_terminal_gets_the_columns_that_fit_and_the_names_of_the_others(
    width: int, columns: str, left_out: str
) -> None:
    out = io.StringIO()
    print_fleet(Console(file=out, width=width), STATUS)
    head, row, *more = out.getvalue().splitlines()
    assert " ".join(head.split()) == columns
    assert max(len(head), len(row)) <= width
    assert row.split()[:2] == ["gpu-a", "ready"]
    assert more == ([f"left out to fit: {left_out}; --json has all"] if left_out else [])


def test_what_is_wanted_in_any_case_is_shown_whole() -> None:
    out = io.StringIO()
    name = "n" * 50
    print_fitting(Console(file=out, width=40), ("name", "what", "count>"), [[name, "w", "1"]], ("what",))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["name", "count"],
        [name, "1"],
        ["left", "out", "to", "fit:", "what;", "--json", "has", "all"],
    ]
