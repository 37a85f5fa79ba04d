"""`microserve events`: what happened, once and as it happens, across restarts of the router."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import FAKE, Cluster, daemon_environ, state_of
from tests.command_support import PROGRAM, command, usage_error

from microserve.runtime.messages import FleetEvent

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE = re.compile(r" *(\d+)  \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  (\w+) +(?:(\w+)@[0-9a-f]+)?(?:  )?(.*)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        cluster.client().set_strategy("prefill_decode")
        yield cluster


def as_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_and_json(cluster: Cluster) -> None:
    shown = command(cluster, "events", "--json")
    assert (shown.code, shown.err) == (0, "")
    events = as_json(shown.out)
    assert [set(event) for event in events] == [set(FleetEvent.__struct_fields__)] * len(events)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {"joined", "connected", "strategy"} <= {event["kind"] for event in events}
    assert events[0] | {"at": 0, "epoch": ""} == {
        "seq": 1,
        "at": 0,
        "kind": "joined",
        "engine": "e0",
        "epoch": "",
        "detail": "tokens-only",
    }
    lines = [LINE.fullmatch(line) for line in command(cluster, "events").out.splitlines()]
    assert [(int(line[1]), line[2], line[3] or "", line[4]) for line in lines if line is not None] == [
        (event["seq"], event["kind"], event["engine"], event["detail"]) for event in events
    ]


def test_an_epoch_is_one_text_in_lines_and_json(cluster: Cluster) -> None:
    """As in logs and metrics: a search for what one shows finds the others."""
    said = command(cluster, "events").out
    epochs = {event["epoch"] for event in as_json(command(cluster, "events", "--json").out) if event["engine"]}
    assert {each["info"]["epoch"] for each in command(cluster, "engines", "--json").json} == epochs
    assert [epoch for epoch in epochs if f"joined         e0@{epoch}  " in said] == list(epochs)


def test_after_and_limit(cluster: Cluster) -> None:
    count = len(as_json(command(cluster, "events", "--json").out))
    after = as_json(command(cluster, "events", "--json", "--after", "1").out)
    assert [event["seq"] for event in after] == list(range(2, count + 1))
    newest = as_json(command(cluster, "events", "--json", "--limit", "1").out)
    assert [event["seq"] for event in newest] == [count]
    shown = command(cluster, "events", "--after", str(count))
    assert (shown.code, shown.out, shown.err) == (0, "", "")


def test_wrong_usage_and_no_router(cluster: Cluster) -> None:
    assert usage_error(cluster, "events", "--after", "-1") == "--after: -1 is below 0"
    assert usage_error(cluster, "events", "--limit", "0") == "--limit: 0 is not between 1 and 1000"
    for more in ((), ("--follow",)):
        shown = command("tcp://127.0.0.1:1", "events", *more)
        assert (shown.code, shown.out) == (1, "")
        assert shown.err == (
            "microserve events: no router answers at tcp://127.0.0.1:1; start one with `microserve up`\n"
        )


def test_following_across_a_restart_of_the_router() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        follower = subprocess.Popen(
            [*PROGRAM, "events", "--follow", "--json", "--router", cluster.router],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=daemon_environ(),
        )
        assert follower.stdout is not None
        assert follower.stderr is not None

        def until(kind: str) -> dict[str, Any]:
            assert follower.stdout is not None
            for line in follower.stdout:
                event: dict[str, Any] = json.loads(line)
                if event["kind"] == kind:
                    return event
            raise AssertionError(f"it ended before it said {kind}")

        try:
            first = until("joined")
            cluster.client().set_strategy("prefill_decode")
            seen = until("strategy")
            assert seen["seq"] > first["seq"] == 1
            assert cluster.router_daemon is not None
            cluster.router_daemon.kill()
            assert "no router answers" in follower.stderr.readline()
            cluster.start_router()
            # The engine announces itself again, to a router that counts from 1.
            again = until("joined")
            assert (again["seq"], again["engine"]) == (1, "e0")
            assert "numbered from 1 again" in follower.stderr.readline()
            cluster.wait_for(lambda status: state_of(status, "e0") == "ready", "the engine to be ready")
        finally:
            follower.send_signal(signal.SIGINT)
            out, err = follower.communicate(timeout=60)
        assert follower.returncode == 130
        assert (err, "Traceback" in out) == ("", False)


def test_a_reader_that_leaves_ends_it_quietly(cluster: Cluster) -> None:
    follower = subprocess.Popen(
        [*PROGRAM, "events", "--follow", "--router", cluster.router],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=daemon_environ(),
    )
    assert follower.stdout is not None
    assert follower.stderr is not None
    assert "joined" in follower.stdout.readline()
    follower.stdout.close()
    client = cluster.client()
    client.engine("e0").drain()
    client.engine("e0").resume()
    assert follower.wait(60) == 0
    assert follower.stderr.read() == ""
    follower.stderr.close()
    client.close()
