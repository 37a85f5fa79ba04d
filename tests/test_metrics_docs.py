"""Every metric of a real router and a real engine stands in docs/metrics.md, and every one that stands there exists."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.cluster import FAKE, Cluster, free_ports
from tests.test_keys_cluster import ended

from microserve.runtime.api_keys import new_api_key
from microserve.runtime.errors import MicroserveError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = re.compile(r"^\| `(microserve_\w+)` \| (\w+) \| ([\w, ]*) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
Table = dict[str, tuple[str, str]]
"""Type, and labels, by name."""


@pytest.fixture(scope="module")
def scrapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a router and an engine say after a request that moved KV, and after one refusal of each kind."""
    file = tmp_path_factory.mktemp("keys") / "api_keys.toml"
    key = new_api_key(file, "ann", "serve")
    ports = free_ports(2)
    with Cluster(engines=0, router_args=("--api-keys-file", str(file), "--metrics-open")) as cluster:
        for name, port in zip(("a", "b"), ports, strict=True):
            cluster.add_engine(name, "--metrics-port", str(port), wait=False)
        cluster.wait_ready(2)
        client = cluster.client()
        client.set_strategy("prefill_decode", {"min_remote": 1, "early_first": 0})
        client.generate(list(range(200)), max_tokens=4, ignore_eos=True)
        for wrong in ({"model": "nobody"}, {"model": ""}):
            with contextlib.suppress(MicroserveError):
                client.generate([10**6], **wrong)  # type: ignore[arg-type]
        for headers in ({}, {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}):
            request = urllib.request.Request(f"{cluster.http}/v1/completions", b"?", headers)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            caught.value.close()
        assert read(f"http://127.0.0.1:{ports[0]}/ready") == '{"ready": true, "reasons": []}'
        assert read(f"http://127.0.0.1:{ports[0]}/health") == '{"status":"ok"}'
        until_pinged(cluster)
        yield {
            "router": read(f"{cluster.http}/metrics"),
            **{name: read(f"http://127.0.0.1:{port}/metrics") for name, port in zip(("a", "b"), ports, strict=True)},
        }


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        text: str = response.read().decode()
    return text


def until_pinged(cluster: Cluster) -> None:
    """Sessions are pinged when they are idle."""
    deadline = time.monotonic() + 20
    while any(engine.round_trip is None for engine in cluster.status().engines):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def found(text: str) -> Table:
    table: Table = {}
    for family in text_string_to_metric_families(text):
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = family.name + ("_total" if family.type == "counter" else "")
        table[name] = (family.type, ", ".join(labels))
    return table


def documented(prefix: str) -> Table:
    rows = DOCUMENTED.findall((ROOT / "docs" / "metrics.md").read_text())
    return {name: (kind, labels) for name, kind, labels, _, _ in rows if name.startswith(prefix)}


def test_the_table_is_what_is_served(scrapes: dict[str, str]) -> None:
    assert found(scrapes["router"]) == documented("microserve_router_")
    # Of events, an engine has had one at least.
    assert found(scrapes["a"]) == documented("microserve_engine_")
    assert len(documented("microserve_")) > 55


def test_figures_of_a_request_that_moved_kv(scrapes: dict[str, str]) -> None:
    def value(name: str, metric: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(scrapes[name])
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )

    engines = ("a", "b")
    [receiver] = [name for name in engines if value(name, "microserve_engine_received_bytes_total")]
    [sender] = [name for name in engines if name != receiver]
    sent = value(sender, "microserve_engine_sent_bytes_total")
    assert sent == value(receiver, "microserve_engine_received_bytes_total") > 0
    assert value(sender, "microserve_engine_peer_sent_bytes_total", peer=receiver) == sent
    assert value("router", "microserve_router_sent_bytes_total") == sent
    assert value(sender, "microserve_engine_push_seconds_total") > 0
    assert value(sender, "microserve_engine_prefilled_tokens_total") == 199
    assert value(receiver, "microserve_engine_generated_tokens_total") == 4
    assert value(receiver, "microserve_engine_ttft_seconds_count") == 1
    assert value(receiver, "microserve_engine_step_sequences_sum") == 4
    assert value(receiver, "microserve_engine_lease_events_total", event="consumed") == 1
    for name, verb in ((receiver, "prep_recv"), (sender, "remote_send"), (receiver, "start_generate")):
        assert value(name, "microserve_engine_sub_requests_total", verb=verb, outcome="ok") == 1
        assert value("router", "microserve_router_sub_requests_total", verb=verb, outcome="ok") == 1
    for name in engines:
        pages = [value(name, "microserve_engine_kv_pages", state=state) for state in ("owned", "leased", "quarantined")]
        assert (pages, value(name, "microserve_engine_integrity")) == ([0, 0, 0], 1)
        assert value(name, "microserve_engine_state", state="ready") == 1
    assert value("router", "microserve_router_refused_total", reason="invalid_request") == 1
    assert value("router", "microserve_router_call_errors_total", code="model_not_found") == 1
    assert value("router", "microserve_router_http_errors_total", code="invalid_api_key") == 1
    assert value("router", "microserve_router_unauthorized_total", reason="no key") == 1
    assert value("router", "microserve_router_strategy_share") == 1
    assert 0 < value("router", "microserve_router_engine_round_trip_seconds", engine="a") < 5


def test_rules_of_prometheus(scrapes: dict[str, str]) -> None:
    for text in scrapes.values():
        for family in text_string_to_metric_families(text):
            name = family.name
            assert re.fullmatch(r"microserve_(router|engine)_[a-z_]+", name)
            assert family.documentation.endswith(".")
            # Base units, and no unit but at the end.
            assert not re.search(
                r"milliseconds|microseconds|kilobytes|gigabytes|percent|_total$|_count$|_sum$|_bucket$", name
            )
            if family.type == "histogram":
                assert any(sample.labels.get("le") == "+Inf" for sample in family.samples) or not family.samples


def test_prometheus_finds_nothing_wrong(scrapes: dict[str, str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here, so nobody checks metrics")
    for text in scrapes.values():
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard: dict[str, Any] = json.loads((ROOT / "tools" / "grafana" / "microserve.json").read_text())
    known = set(documented("microserve_"))
    known |= {name + end for name in known for end in ("_bucket", "_sum", "_count")}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 25
    for expression in asked:
        names = set(re.findall(r"microserve_\w+", expression))
        assert names
        assert names <= known, expression
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))


def test_an_address_that_is_taken_or_open_stops_the_engine() -> None:
    port = free_ports(1)[0]
    code, said = ended("microserve.engine", "--executor", "fake", "--metrics-port", "0", "--metrics-host", "0.0.0.0")
    assert (code, "--insecure" in said) == (2, True)
    with contextlib.closing(socket.create_server(("127.0.0.1", port))):
        code, said = ended("microserve.engine", *FAKE, "--metrics-port", str(port))
    assert (code, f"cannot serve metrics at 127.0.0.1:{port}" in said) == (1, True)
