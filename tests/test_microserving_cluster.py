"""The engines' verbs from outside, by HTTP and as the README's program, with real engines that move KV."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import Cluster, daemon_environ
from tests.engine_calls import open_engines
from tests.http_support import events_of

from microserve.runtime.models import DEMO

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = "/microserving/v1"
README = Path(__file__).parents[1] / "README.md"
TEXT = "Tell me a story about a fox. " * 8
PAGE = 16
OUTPUT = 12
SAMPLING = {"max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    engine = ("--executor", "torch", "--model", DEMO, "--threads", "1", "--kv-pages", "256")
    with Cluster(2, engine_args=(*engine, "--transport", "nixl", "--dtype", "float32")) as running:
        yield running


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """The engines have met and are cold before each test; afterwards every page is free or cached."""

    async def chill() -> None:
        async with open_engines(await asyncio.to_thread(cluster.endpoints)) as engines:
            for engine in engines.values():
                await engine.until_whole()
                await engine.evict()

    asyncio.run(chill())
    yield
    asyncio.run(chill())


def ask(cluster: Cluster, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body of one request."""
    connection = HTTPConnection(cluster.http.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, ROOT + path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def post(cluster: Cluster, engine: str, verb: str, body: Any, status: int = 200) -> Any:
    found, answer = ask(cluster, "POST", f"/engines/{engine}/{verb}", body)
    assert found == status, answer
    return json.loads(answer)


def test_kv_moves_by_http(cluster: Cluster) -> None:
    listed = json.loads(ask(cluster, "GET", "/engines")[1])["engines"]
    assert {(each["info"]["engine_id"], each["state"]) for each in listed} == {("e0", "ready"), ("e1", "ready")}
    alone = post(cluster, "e1", "start_generate", {"text": TEXT, "sampling": SAMPLING})
    length = alone["usage"]["prompt_tokens"]
    assert length > 3 * PAGE
    post(cluster, "e1", "cache_evict", {})

    address = post(cluster, "e0", "prep_recv", {"text": TEXT, "end": -1, "expect_tokens": OUTPUT})
    assert (address["engine_id"], address["matched"], address["end"]) == ("e0", 0, length - 1)
    report = post(cluster, "e1", "remote_send", {"text": TEXT, "address": address})
    assert (report["computed"], report["reused"]) == (length - 1, 0)
    assert report["bytes"] > 0
    body = {"text": TEXT, "begin": -1, "lease": address["lease"], "sampling": SAMPLING}
    answer = post(cluster, "e0", "start_generate", body)
    assert answer["tokens"] == alone["tokens"]
    assert (answer["received_tokens"], answer["recomputed_tokens"]) == (length - 1, 0)
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", OUTPUT)
    assert post(cluster, "e1", "cache_match", {"text": TEXT}) == {"tokens": (length - 1) // PAGE * PAGE}
    (link,) = json.loads(ask(cluster, "GET", "/engines/e1")[1])["links"]
    assert (link["engine_id"], link["state"], link["failures"]) == ("e0", "ready", 0)
    assert link["sent_bytes"] >= report["bytes"]


def test_tokens_stream_over_http_while_kv_comes(cluster: Cluster) -> None:
    """The engine waits for KV, not the caller: the stream is opened before anything has been sent."""
    alone = post(cluster, "e0", "start_generate", {"text": TEXT, "sampling": SAMPLING})
    post(cluster, "e0", "cache_evict", {})
    address = post(cluster, "e0", "prep_recv", {"text": TEXT, "end": -1})
    connection = HTTPConnection(cluster.http.removeprefix("http://"), timeout=60)
    try:
        body = {"text": TEXT, "begin": -1, "lease": address["lease"], "sampling": SAMPLING, "stream": True}
        connection.request("POST", f"{ROOT}/engines/e0/start_generate", json.dumps(body))
        assert post(cluster, "e1", "remote_send", {"text": TEXT, "address": address})["bytes"] > 0
        response = connection.getresponse()
        assert response.headers["content-type"].startswith("text/event-stream")
        *parts, end, done = events_of(response.read())
    finally:
        connection.close()
    assert [token for part in parts for token in part["tokens"]] == alone["tokens"]
    assert (end["tokens"], end["received_tokens"], end["recomputed_tokens"], done) == ([], address["end"], 0, "[DONE]")


def test_what_an_engine_refuses_is_told_by_http(cluster: Cluster) -> None:
    address = post(cluster, "e0", "prep_recv", {"text": TEXT})
    other = post(cluster, "e1", "remote_send", {"text": TEXT + "No.", "address": address, "begin": 0}, 400)["error"]
    assert (other["code"], other["type"]) == ("invalid_request", "invalid_request_error")
    assert "not the one that the lease was prepared for" in other["message"]
    unaligned = post(cluster, "e1", "remote_send", {"text": TEXT, "address": address, "begin": 3}, 400)["error"]
    assert "does not stand at pages" in unaligned["message"]
    stale = address | {"epoch": address["epoch"] + 1}
    assert post(cluster, "e1", "remote_send", {"text": TEXT, "address": stale}, 409)["error"]["code"] == "stale_epoch"
    # Nothing of this has used the lease up.
    assert post(cluster, "e1", "remote_send", {"text": TEXT, "address": address})["bytes"] > 0
    assert (
        post(cluster, "e0", "commit", {"lease": address["lease"]})["committed_until"] == address["end"] // PAGE * PAGE
    )
    gone = post(cluster, "e0", "start_generate", {"text": TEXT, "lease": address["lease"]}, 404)["error"]
    assert gone["code"] == "lease_not_found"
    assert post(cluster, "e0", "release", {"lease": address["lease"]}) == {"outcome": "unknown"}


def test_the_program_of_the_readme(cluster: Cluster) -> None:
    (program,) = [
        each for each in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "prep_recv(prompt" in each
    ]
    assert program.count("AsyncClient()") == 1
    program = program.replace("AsyncClient()", f"AsyncClient({cluster.router!r})")
    ran = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=daemon_environ(),
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    found = re.fullmatch(r"SendReport\(computed=(\d+), reused=0, bytes=(\d+), .*\) (\d+) \S.*\n", ran.stdout, re.S)
    assert found is not None, ran.stdout
    computed, nbytes, received = map(int, found.groups())
    assert computed == received > 3 * PAGE
    assert nbytes > 0
