"""`microserve engines`: the fleet as a table, and one engine in every detail."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from tests.cluster import FAKE, Cluster, state_of
from tests.command_support import command, usage_error

from microserve.runtime.keys import new_identity
from microserve.runtime.messages import Load
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools import fleet_view

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = list(range(1, 50))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two engines that know each other; e0 has answered once and sent what it had to e1."""
    with Cluster(engines=1, engine_args=(*FAKE, "--labels", "zone=a[b]")) as cluster:
        client = cluster.client()
        client.generate(PROMPT, max_tokens=5, ignore_eos=True)
        cluster.add_engine("e1")
        address = client.engine("e1").prep_recv(PROMPT)
        client.engine("e0").remote_send(PROMPT, address)
        client.engine("e1").commit(address.lease)
        cluster.wait_for(
            lambda status: (
                [engine.load.cached_pages for engine in status.engines] == [3, 3]
                and all(engine.load.sent_bytes + engine.load.received_bytes for engine in status.engines)
            ),
            "heartbeats that tell of it",
        )
        yield cluster


def test_the_table(cluster: Cluster) -> None:
    shown = command(cluster, "engines")
    assert (shown.code, shown.err) == (0, "")
    title, *rows = shown.out.splitlines()
    assert title.split() == [
        *("engine", "state", "model", "requests", "running", "waiting"),
        *("free", "owned", "cached", "leased", "quarantined", "tokens", "hits", "sent", "received", "epoch", "up"),
    ]
    first, second = (row.split() for row in rows)
    assert first[13:17] == [*second[15:17], "0", "B"]
    assert first[:13] == ["e0", "ready", "tokens-only", "0", "0/64", "0", "8,189", "0", "3", "0", "0", "5", "49%"]
    assert second[:2] == ["e1", "ready"]


def test_eighty_columns_hold_the_table(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_view, "table_console", lambda: Console(file=sys.stdout, width=80, highlight=False))
    title, first, _second, more = command(cluster, "engines").out.splitlines()
    assert max(len(title), len(first)) <= 80
    assert title.split() == ["engine", "state", "model", "running", "waiting", "free", "cached", "tokens", "hits"]
    assert first.split()[:6] == ["e0", "ready", "tokens-only", "0/64", "0", "8,189"]
    assert more == "left out to fit: requests, owned, leased, quarantined, sent, received, epoch, up; --json has all"


def test_json_has_what_status_has(cluster: Cluster) -> None:
    found = command(cluster, "engines", "--json").json
    assert [(engine["id"], engine["state"], engine["charged"]) for engine in found] == [
        ("e0", "ready", 0),
        ("e1", "ready", 0),
    ]
    assert set(found[0]) == {"id", "state", "charged", "last_seen", "info", "load"}
    assert set(found[0]["load"]) == set(Load.__struct_fields__)
    assert found[0]["load"]["generated_tokens"] == 5


def test_one_engine_as_json(cluster: Cluster) -> None:
    found = command(cluster, "engines", "e0", "--json").json
    assert (found["id"], found["error"]) == ("e0", "")
    assert found["info"]["labels"] == {"zone": "a[b]"}
    assert found["load"]["cached_pages"] == 3
    [link] = found["links"]
    assert (link["engine_id"], link["state"], link["failures"]) == ("e1", "ready", 0)
    assert link["epoch"] == command(cluster, "engines", "e1", "--json").json["info"]["epoch"]
    assert f"\nepoch     {found['info']['epoch']}, up " in command(cluster, "engines", "e0").out
    assert link["sent_bytes"] == found["load"]["sent_bytes"] > 0
    assert command(cluster, "engines", "e1", "--json").json["load"]["received_bytes"] == link["sent_bytes"]
    assert link["gigabytes_per_second"] > 0
    assert found["stats"]["integrity"] == "ok"
    assert found["stats"]["values"]["transfer_pushes"] == 1


def test_one_engine_in_words(cluster: Cluster) -> None:
    shown = command(cluster, "engines", "e0")
    assert (shown.code, shown.err) == (0, "")
    facts = {line[:10].strip(): line[10:] for line in shown.out.splitlines()}
    assert (facts["engine"], facts["state"], facts["labels"]) == ("e0", "ready", "zone=a[b]")
    assert facts["load"] == "0 of 64 running, 0 waiting, 0 tokens to prefill, 0 requests of the router"
    assert facts["pages"] == "8,189 free, 0 owned, 3 cached, 0 leased, 0 quarantined of 8,192"
    assert facts["integrity"] == "ok"
    lines = [line.split() for line in shown.out.splitlines()]
    [link] = [line for line in lines if line[:2] == ["e1", "ready"]]
    assert link[-1] == "0"
    assert ["transfer_pushes", "1"] in lines


def test_what_is_not_there(cluster: Cluster) -> None:
    for form in ((), ("--json",)):
        shown = command(cluster, "engines", "e7", *form)
        assert (shown.code, shown.out) == (1, "")
        assert shown.err == "microserve engines: there is no engine 'e7'; there are: e0, e1\n"
    shown = command("tcp://127.0.0.1:1", "engines")
    assert (shown.code, shown.out) == (1, "")
    assert shown.err == ("microserve engines: no router answers at tcp://127.0.0.1:1; start one with `microserve up`\n")
    assert usage_error(cluster, "engines", "e0", "e1") == "unrecognized arguments: e1"


def test_an_engine_that_does_not_answer_is_shown_as_the_router_sees_it() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        assert command(cluster, "engines", "e0").code == 0
        cluster.engines[0].pause()
        try:
            cluster.wait_for(lambda status: state_of(status, "e0") == "silent", "the engine to be silent")
            shown = command(cluster, "engines", "e0")
            assert (shown.code, shown.err) == (1, "")
            assert shown.out.splitlines()[1].split() == ["state", "silent"]
            assert shown.out.splitlines()[-1].startswith("it does not answer: ")
            shown = command(cluster, "engines", "e0", "--json")
            assert shown.code == 1
            assert '"stats": null' in shown.out
        finally:
            cluster.engines[0].resume()
        cluster.wait_ready(1)


def test_nobody_there() -> None:
    with Cluster(engines=0) as cluster:
        assert command(cluster, "engines").out == "no engines; start one with `microserve engine`\n"
        assert command(cluster, "engines", "--json").json == []
        assert command(cluster, "engines", "x").err.endswith("there are: none\n")


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, role in (("r", "router"), ("e0", "engine"), ("me", "client"), ("root", "admin")):
        new_identity(tmp_path, name, role, new_key_pair)
    key = {name: str(tmp_path / f"{name}.key") for name in ("r", "e0", "me", "root")}
    monkeypatch.setenv("MICROSERVE_KEY_FILE", key["root"])
    args = (*FAKE, "--key-file", key["e0"])
    with Cluster(engines=1, engine_args=args, router_args=("--key-file", key["r"])) as cluster:
        monkeypatch.delenv("MICROSERVE_KEY_FILE")
        # Whoever may send requests may look at engines, and at nothing of others' requests; nothing is changed.
        looks: list[tuple[str, ...]] = [("status",), ("engines",), ("engines", "e0")]
        for words in looks:
            shown = command(cluster, *words, "--key-file", key["me"])
            assert (shown.code, shown.err) == (0, ""), words
        refused = {
            ("requests",): "ListRequests",
            ("requests", "abort", "x", "--yes"): "AbortRequest",
            ("events",): "ListEvents",
            ("drain", "e0", "--yes"): "Drain on an engine",
            ("resume", "e0"): "Resume on an engine",
            ("cache", "list", "e0"): "CachePrefixes on an engine",
            ("cache", "match", "e0", "--tokens", "1"): "CacheMatch on an engine",
            ("cache", "pin", "e0", "--tokens", "1"): "CachePin on an engine",
            ("cache", "evict", "e0", "--all", "--yes"): "CacheEvict on an engine",
        }
        for words, verb in refused.items():
            shown = command(cluster, *words, "--key-file", key["me"])
            assert (shown.code, shown.out) == (1, ""), words
            assert (
                shown.err
                == f"microserve {words[0]}: a key of role client may not call {verb}; that takes one of role admin\n"
            )
        for words in (("requests",), ("events",), ("resume", "e0")):
            assert command(cluster, *words, "--key-file", key["root"]).code == 0, words
        shown = command(cluster, "engines", "--key-file", str(tmp_path / "none.key"))
        assert (shown.code, len(shown.err.splitlines())) == (2, 1)
        shown = command(cluster, "engines")
        assert (shown.code, len(shown.err.splitlines())) == (1, 1)
