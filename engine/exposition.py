"""An engine's figures, as Prometheus reads them. Read when a scrape comes; nothing here runs otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from microserve.engine.metrics import EngineMetrics
    from microserve.runtime.bus import BusStatistics
    from microserve.runtime.messages import EngineInfo, Load, PeerLink, StatsReply
    from microserve.runtime.series import Series

PREFIX = "microserve_engine_"
_STATES = ("starting", "ready", "degraded", "draining")
_PAGES = ("free", "owned", "cached", "leased", "quarantined")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is read when a scrape comes. `stats` is None when the step thread did not answer in time."""

    info: EngineInfo
    load: Load
    links: list[PeerLink]
    stats: StatsReply | None
    bus: BusStatistics
    version: str


def render(metrics: EngineMetrics, snapshot: Snapshot) -> bytes:
    """One scrape, in Prometheus' text format."""
    # A collector is all that rendering asks of a registry.
    return generate_latest(EngineCollector(metrics, snapshot))


class EngineCollector(Collector):
    """One scrape. Made for it, and thrown away."""

    def __init__(self, metrics: EngineMetrics, snapshot: Snapshot) -> None:
        self._metrics = metrics
        self._now = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from self._identity()
        yield from self._calls()
        yield from self._steps()
        yield from self._pages()
        yield from self._transfers()
        yield from self._rest()

    def _identity(self) -> Iterator[Metric]:
        info = self._now.info
        described = _gauge("info", "What it is; always 1.", "engine", "epoch", "model", "executor", "version")
        described.add_metric([info.engine_id, f"{info.epoch:x}", info.model.name, info.executor, self._now.version], 1)
        state = _gauge("state", "1 for the state that it is in.", "state")
        for name in _STATES:
            state.add_metric([name], self._now.load.state == name)
        yield from (described, state)
        yield _plain("start_time_seconds", "Unix time of its start.", info.started_at)

    def _calls(self) -> Iterator[Metric]:
        metrics = self._metrics
        ended = _counter("sub_requests", "Sub-requests that ended, by verb and outcome.", "verb", "outcome")
        for (verb, outcome), count in list(metrics.outcomes.items()):
            ended.add_metric([verb, outcome], count)
        yield ended
        yield _histogram("sub_request_seconds", "Time from a sub-request to its answer.", metrics.calls, "verb")
        yield _histogram("ttft_seconds", "Time from start_generate to its first token.", {"": metrics.ttft})
        yield _histogram(
            "allocation_wait_seconds", "Time until there were pages and a place for it.", metrics.allocation, "verb"
        )

    def _steps(self) -> Iterator[Metric]:
        load, metrics = self._now.load, self._metrics
        yield _plain("running", "Requests that are computed.", load.running)
        yield _plain("waiting", "Requests that wait for pages, a place, or KV.", load.waiting)
        yield _plain("queued_tokens", "Prompt tokens that are still to be computed.", load.queued_tokens)
        for name, text, count in (
            ("steps", "Steps.", load.steps),
            ("generated_tokens", "Tokens generated.", load.generated_tokens),
            ("prefilled_tokens", "Prompt tokens computed.", load.prefilled_tokens),
            ("prefix_lookup_tokens", "Prompt tokens looked up in the prefix tree.", load.prefix_lookup_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix tree.", load.prefix_hit_tokens),
            ("preemptions", "Requests that had to give their pages back, to be computed again.", load.preemptions),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=count)
        yield _histogram("step_seconds", "Time of a step, as the step thread sees it.", {"": metrics.step_seconds})
        yield _histogram("step_sequences", "Sequences in a step: the batch.", {"": metrics.step_sequences})
        yield _histogram(
            "step_prompt_tokens", "Prompt tokens of a step that has any.", {"": metrics.step_prompt_tokens}
        )

    def _pages(self) -> Iterator[Metric]:
        load = self._now.load
        pages = _gauge("kv_pages", "KV pages, by state.", "state")
        for state in _PAGES:
            pages.add_metric([state], getattr(load, f"{state}_pages"))
        yield pages
        stats = self._now.stats
        if stats is None:
            return
        values = stats.values
        yield _plain("leases", "Leases that are open.", values.get("lease_open", 0))
        yield _plain(
            "claims", "Claims that are open: ranges that a sender may write.", values.get("lease_open_claims", 0)
        )
        happened = _counter("lease_events", "What happened to leases.", "event")
        for event in ("opened", "consumed", "committed", "closed", "expired"):
            happened.add_metric([event], values.get(f"lease_{event}", 0))
        yield happened
        age = values.get("lease_quarantine_seconds", 0.0)
        yield _plain("quarantine_age_seconds", "How long the oldest page in quarantine has been there.", age)
        yield _plain("integrity", "1 while the accounting of pages is whole.", float(stats.integrity == "ok"))

    def _transfers(self) -> Iterator[Metric]:
        load = self._now.load
        # By name, in order of epoch: of a peer that has started anew, the newest incarnation counts. Two samples of
        # one name and the same labels would be no valid scrape.
        newest = {link.engine_id: link for link in sorted(self._now.links, key=lambda each: each.epoch)}
        links = sorted(newest.values(), key=lambda each: each.engine_id)
        yield CounterMetricFamily(PREFIX + "sent_bytes", "KV pushed to other engines.", value=load.sent_bytes)
        yield CounterMetricFamily(PREFIX + "received_bytes", "KV that arrived.", value=load.received_bytes)
        yield CounterMetricFamily(PREFIX + "push_failures", "Pushes that failed.", value=load.push_failures)
        if self._now.stats is not None:
            seconds = self._now.stats.values.get("transfer_push_seconds", 0.0)
            yield CounterMetricFamily(PREFIX + "push_seconds", "Time spent in pushes.", value=seconds)
        counters: Mapping[str, tuple[str, str]] = {
            "peer_sent_bytes": ("sent_bytes", "KV pushed to a peer that is known now."),
            "peer_push_seconds": ("sent_seconds", "Time spent in pushes to a peer that is known now."),
            "peer_received_bytes": ("received_bytes", "KV that arrived from a peer that is known now."),
            "peer_push_failures": ("failures", "Pushes to a peer that is known now that failed."),
        }
        for name, (field, text) in counters.items():
            family = _counter(name, text, "peer")
            for link in links:
                family.add_metric([link.engine_id], getattr(link, field))
            yield family
        speed = _gauge("peer_bytes_per_second", "Speed of the way to it, measured as they met.", "peer", "transport")
        ready = _gauge("peer_ready", "1 while KV can be pushed there.", "peer")
        for link in links:
            speed.add_metric([link.engine_id, link.transport], link.gigabytes_per_second * 1e9)
            ready.add_metric([link.engine_id], link.state == "ready")
        yield from (speed, ready)

    def _rest(self) -> Iterator[Metric]:
        events = _counter("events", "Events that operators are told, by kind.", "kind")
        for kind, count in list(self._metrics.events.items()):
            events.add_metric([kind], count)
        yield events
        bus = _counter("bus", "What the bus counted.", "event")
        for event in BUS_EVENTS:
            bus.add_metric([event], getattr(self._now.bus, event))
        yield bus


BUS_EVENTS = (
    *("sent", "received", "malformed", "oversized", "unknown_version", "overflows", "sequence_gaps", "strays"),
    "unauthorized",
)


def _plain(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def _histogram(name: str, text: str, series: Mapping[str, Series], *labels: str) -> Metric:
    """With one label, the keys of `series` are its values; without, there is one series."""
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    entries: Iterable[tuple[str, Series]] = list(series.items())
    for value, each in entries:
        family.add_metric([value] if labels else [], each.buckets(), each.total)
    return family
