"""What an engine counts, how a scrape says it, and the small server that answers scrapes."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from tests.engine_rig import INSTANT, make_request
from tests.receiving_rig import KvRig
from tests.router_support import engine_info
from tests.test_engine_loop import Bench
from tests.test_engine_verbs import Bench as VerbBench
from tests.test_engine_verbs import generate

from microserve.engine import daemon
from microserve.engine.daemon import Engine, open_executor
from microserve.engine.exposition import Snapshot, render
from microserve.engine.loop import StepLoop
from microserve.engine.metrics import EngineMetrics
from microserve.runtime.bus import BusStatistics
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import ConfigError
from microserve.runtime.ids import Peer
from microserve.runtime.messages import Load, PeerLink, StatsReply
from microserve.runtime.metrics_http import MetricsHttp
from microserve.runtime.service import Lifecycle
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from microserve.engine.plan import StepResult

LIMIT = 10.0
"""Seconds after which a thread counts as stuck."""


class Metered(Bench):
    """A step loop, driven by the test, that counts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.metrics = EngineMetrics()
        self.rig.scheduler.admitted = self.metrics.admitted
        self.loop = StepLoop(
            self.rig.scheduler,
            self.executor,
            post=self.post,
            deliver=self.delivered.append,
            crashed=self.crashes.append,
            metrics=self.metrics,
            clock=self.rig.clock,
        )


@dataclass
class Scrape:
    """What one scrape says. `links`, `load` and `stats` are what the engine knows as it comes."""

    metrics: EngineMetrics = field(default_factory=EngineMetrics)
    load: Load = field(default_factory=Load)
    links: list[PeerLink] = field(default_factory=list)
    stats: StatsReply | None = field(default_factory=lambda: StatsReply(values={}))

    def values(self) -> dict[tuple[str, tuple[str, ...]], float]:
        bus = BusStatistics()
        text = render(self.metrics, Snapshot(engine_info(), self.load, self.links, self.stats, bus, "1")).decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = {
            (sample.name.removeprefix("microserve_engine_"), tuple(sample.labels.values())): sample.value
            for sample in samples
        }
        assert len(found) == len(samples), "two samples of one name and the same labels"
        return found


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_every_step_is_counted_once_with_its_batch_and_its_prompts(depth: int) -> None:
    bench = Metered(depth=depth)
    for length in (3, 5):
        bench.loop.submit(make_request([length] * length, max_tokens=4, ignore_eos=True))
    bench.turns()
    for length in (7, 9):
        bench.loop.submit(make_request([length] * length, max_tokens=1, ignore_eos=True))
        bench.turns()
    metrics, steps = bench.metrics, bench.rig.scheduler.load().steps
    assert steps == 6
    assert sum(metrics.step_seconds.counts) == sum(metrics.step_sequences.counts) == steps
    assert metrics.step_sequences.total == 4 * 2 + 2
    assert (sum(metrics.step_prompt_tokens.counts), metrics.step_prompt_tokens.total) == (3, 3 + 5 + 7 + 9)


def test_a_step_takes_as_long_as_the_executor_does() -> None:
    bench = Metered()
    collect = bench.executor.collect

    def slow() -> StepResult:
        bench.rig.clock.advance(0.25)
        return collect()

    bench.executor.collect = slow  # type: ignore[method-assign]
    bench.loop.submit(make_request([1], max_tokens=3, ignore_eos=True))
    bench.turns()
    assert bench.metrics.step_seconds.total == pytest.approx(3 * 0.25)


def test_a_generation_waits_for_a_place_once_whatever_becomes_of_it() -> None:
    bench = Metered(max_running=1)
    first, second = (make_request([n], max_tokens=2, ignore_eos=True) for n in (1, 2))
    bench.loop.submit(first)
    bench.loop.submit(second)
    bench.loop.turn()
    bench.rig.clock.advance(3.0)
    bench.turns()
    wait = bench.metrics.allocation["start_generate"]
    assert (sum(wait.counts), wait.total) == (2, 3.0)


def test_outcomes_of_sub_requests_and_how_long_those_took_that_began() -> None:
    async def main() -> None:
        async with VerbBench() as bench:
            stream = bench.stream([1, 2, 3], max_tokens=3, ignore_eos=True)
            await bench.turn(0)
            bench.rig.clock.advance(0.5)
            await bench.finish(stream)
            assert (await bench.refused(generate([1], sub_id=""))).code == "invalid_request"
            metrics = bench.core.metrics
            assert metrics.outcomes == {("start_generate", "ok"): 1, ("start_generate", "invalid_request"): 1}
            # What was refused at once says nothing of how long anything takes.
            took = metrics.calls["start_generate"]
            assert (sum(took.counts), took.total) == (1, 0.5)
            assert (sum(metrics.ttft.counts), metrics.ttft.total) == (1, 0.5)

    asyncio.run(main())


def test_a_prepared_receive_tells_how_long_it_waited_for_pages() -> None:
    metrics = EngineMetrics()
    metrics.call_ended("PrepRecv", "ok", 2.0)
    metrics.call_ended("PrepRecv", "busy", 7.0)
    metrics.call_ended("RemoteSend", "ok", 1.0)
    assert metrics.allocation["prep_recv"].total == 2.0
    assert {verb: series.total for verb, series in metrics.calls.items()} == {"prep_recv": 9.0, "remote_send": 1.0}


def test_pages_in_quarantine_grow_older_while_nothing_happens() -> None:
    rig = KvRig()

    async def main() -> None:
        async with VerbBench() as bench:
            bench.core.receiving = rig.receiving
            lease = rig.lease(range(13))
            rig.receiving.claim(lease.id, 7, 0, 13, ("s", 1), rig.clock())
            assert rig.receiving.release(lease.id, rig.clock()) == "quarantined"
            # No turn since then.
            bench.rig.clock.advance(rig.clock() - bench.rig.clock() + 25.0)
            assert bench.core.statistics().values["lease_quarantine_seconds"] == 25.0
            rig.receiving.sender_dead("s", 1, rig.clock())
            assert bench.core.statistics().values["lease_quarantine_seconds"] == 0.0

    asyncio.run(main())


# --- scrapes ----------------------------------------------------------------------------------------------------------


def test_a_scrape_says_what_the_load_says() -> None:
    load = Load(
        running=1,
        waiting=2,
        queued_tokens=3,
        free_pages=4,
        owned_pages=5,
        cached_pages=6,
        leased_pages=7,
        quarantined_pages=8,
        total_pages=30,
        generated_tokens=9,
        prefilled_tokens=10,
        prefix_hit_tokens=11,
        prefix_lookup_tokens=12,
        preemptions=13,
        steps=14,
        sent_bytes=15,
        received_bytes=16,
        push_failures=17,
        state="degraded",
    )
    values = Scrape(load=load).values()
    plain = ("running", "waiting", "queued_tokens")
    assert [values[name, ()] for name in plain] == [1, 2, 3]
    states = ("free", "owned", "cached", "leased", "quarantined")
    assert [values["kv_pages", (state,)] for state in states] == [4, 5, 6, 7, 8]
    counters = ("generated_tokens", "prefilled_tokens", "prefix_hit_tokens", "prefix_lookup_tokens", "preemptions")
    assert [values[f"{name}_total", ()] for name in counters] == [9, 10, 11, 12, 13]
    moved = ("steps", "sent_bytes", "received_bytes", "push_failures")
    assert [values[f"{name}_total", ()] for name in moved] == [14, 15, 16, 17]
    known = ("starting", "ready", "degraded", "draining")
    assert [values["state", (state,)] for state in known] == [0, 0, 1, 0]


def test_what_the_step_thread_alone_knows_is_left_out_when_it_is_silent() -> None:
    stats = StatsReply(
        values={"lease_open": 3.0, "lease_quarantine_seconds": 70.0, "lease_expired": 2.0}, integrity="a page is lost"
    )
    values = Scrape(stats=stats).values()
    assert (values["leases", ()], values["quarantine_age_seconds", ()], values["integrity", ()]) == (3, 70, 0)
    assert values["lease_events_total", ("expired",)] == 2
    silent = {name for name, _ in Scrape(stats=None).values()}
    assert {"running", "kv_pages"} <= silent
    assert not {"leases", "claims", "lease_events_total", "quarantine_age_seconds", "integrity"} & silent


def test_of_a_peer_that_has_started_anew_the_newest_incarnation_counts() -> None:
    old = PeerLink(engine_id="b", epoch=9, state="lost", transport="shm", sent_bytes=900, failures=4)
    new = PeerLink(
        engine_id="b",
        epoch=10,
        state="ready",
        transport="shm",
        gigabytes_per_second=2.5,
        sent_bytes=100,
        sent_seconds=0.5,
        received_bytes=7,
    )
    other = PeerLink(engine_id="a", epoch=11, state="connecting")
    for links in ([old, new, other], [other, new, old]):
        values = Scrape(links=links).values()
        names = ("sent_bytes_total", "push_seconds_total", "received_bytes_total", "push_failures_total", "ready")
        assert [values[f"peer_{name}", ("b",)] for name in names] == [100, 0.5, 7, 0, 1]
        assert values["peer_ready", ("a",)] == 0
        assert values["peer_bytes_per_second", ("b", "shm")] == 2.5e9


# --- serving ----------------------------------------------------------------------------------------------------------


async def ask(url: str, method: str = "GET") -> tuple[int, str]:
    def read() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=LIMIT) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(read)


def test_every_page_and_every_refusal_of_the_small_server() -> None:
    async def main() -> None:
        reasons: list[str] = []
        broken = False

        async def metrics() -> bytes:
            if broken:
                raise ZeroDivisionError("a bug")
            return b"up 1\n"

        http = MetricsHttp(metrics, lambda: reasons)
        await http.start("127.0.0.1", 0)
        try:
            assert await ask(f"{http.url}/metrics") == (200, "up 1\n")
            assert await ask(f"{http.url}/metrics", "HEAD") == (200, "")
            assert await ask(f"{http.url}/health") == (200, '{"status":"ok"}')
            assert await ask(f"{http.url}/ready") == (200, '{"ready": true, "reasons": []}')
            reasons.append("the engine is draining")
            assert await ask(f"{http.url}/ready") == (503, '{"ready": false, "reasons": ["the engine is draining"]}')
            assert (await ask(f"{http.url}/metrics", "POST"))[0] == 405
            assert (await ask(f"{http.url}/else"))[0] == 404
            broken = True
            assert (await ask(f"{http.url}/metrics"))[0] == 500
            assert (await ask(f"{http.url}/health"))[0] == 200
            http.metrics = None
            assert await ask(f"{http.url}/metrics") == (503, '{"error": "the engine is draining"}')
        finally:
            await http.close()
            await http.close()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "no-such-host.invalid"])
def test_a_host_that_is_none_is_a_configuration_error(host: str) -> None:
    async def nothing() -> bytes:
        return b""

    async def main() -> None:
        with pytest.raises(ConfigError, match="metrics_host"):
            await MetricsHttp(nothing, list).start(host, 0)

    asyncio.run(main())


def test_keys_of_the_bus_do_not_open_metrics_to_other_machines() -> None:
    async def main() -> None:
        config = EngineConfig(model="m", executor="fake", metrics_host="0.0.0.0", metrics_port=0)
        with pytest.raises(ConfigError, match="no keys guard /metrics") as caught:
            await daemon.serve(config, "e1", Lifecycle())
        assert "set key_file" not in caught.value.message

    asyncio.run(main())


def test_an_engine_that_drains_or_hangs_is_not_ready_and_still_scraped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_STATS_LIMIT", 0.05)

    async def main() -> None:
        config = EngineConfig(model="m", executor="fake", fake=INSTANT, routers=("tcp://127.0.0.1:9",))
        bus = ZmqBus(Peer("engine", "e1", 1))
        engine = Engine(config, "e1", 1, open_executor(config), None, bus)
        http = MetricsHttp(engine.metrics, engine.not_ready)
        stuck, free = threading.Event(), threading.Event()

        def hang() -> None:
            stuck.set()
            free.wait(LIMIT)

        try:
            await engine.start()
            await http.start("127.0.0.1", 0)
            assert await ready(http) == (200, [])
            assert "microserve_engine_leases 0.0" in (await ask(f"{http.url}/metrics"))[1]
            engine.verbs.drain()
            assert await ready(http) == (503, ["the engine is draining"])
            engine.verbs.resume()
            assert await ready(http) == (200, [])
            engine.core.steps.command(hang)
            await asyncio.to_thread(stuck.wait, LIMIT)
            engine.configure(replace(config, step_timeout=0.0))
            assert await ready(http) == (503, ["the step thread hangs"])
            assert (await ask(f"{http.url}/health"))[0] == 200
            status, text = await ask(f"{http.url}/metrics")
            assert (status, "microserve_engine_leases" in text) == (200, False)
            assert "microserve_engine_running 0.0" in text
        finally:
            free.set()
            await http.close()
            await engine.stop()
            await bus.close()

    asyncio.run(main())


async def ready(http: MetricsHttp) -> tuple[int, list[str]]:
    status, text = await ask(f"{http.url}/ready")
    answer = json.loads(text)
    assert answer["ready"] is (status == 200)
    return status, answer["reasons"]
