"""The router's figures, for Prometheus. Counting is cheap (a list entry); everything else is read when it is scraped.

Times are seconds as the router sees them: TTFT from the request's arrival (tokenised) to its first token, ITL every gap
between two deliveries of one stream, TPOT (JCT - TTFT) / (tokens - 1) per request, JCT from arrival to the end.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from microserve.runtime.messages import VersionFigures
from microserve.runtime.series import FAST, SLOW, Series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import CollectorRegistry

    from microserve.router.dispatch import Generation
    from microserve.router.pending import SubRecord
    from microserve.runtime.bus import BusStatistics
    from microserve.runtime.messages import ActiveStrategy, FleetEngine

OTHER_VERSIONS = "other"
"""The label of versions that serve no longer, once there are many."""
_MOST_LABELS = 16

_PREFIX = "microserve_router_"
_BUS_EVENTS = (
    "sent",
    "received",
    "malformed",
    "oversized",
    "unknown_version",
    "overflows",
    "sequence_gaps",
    "strays",
    "unauthorized",
)
_STATES = ("ready", "degraded", "starting", "draining", "connecting", "silent")


class _Label:
    """What is measured of the requests of one model under one version of a strategy."""

    __slots__ = ("itl", "jct", "outcomes", "queue", "tokens_cached", "tokens_in", "tokens_out", "tpot", "ttft")

    def __init__(self) -> None:
        self.ttft, self.itl = Series(SLOW), Series(FAST)
        self.tpot, self.jct, self.queue = Series(FAST), Series(SLOW), Series(SLOW)
        self.outcomes: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = self.tokens_cached = 0

    def add(self, other: _Label) -> None:
        """Takes over what was measured elsewhere."""
        for name in ("ttft", "itl", "tpot", "jct", "queue"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.counts = [a + b for a, b in zip(mine.counts, theirs.counts, strict=True)]
            mine.total += theirs.total
        self.outcomes.update(other.outcomes)
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.tokens_cached += other.tokens_cached


class _Verb:
    """What is measured of the sub-requests of one verb."""

    __slots__ = ("computed", "nbytes", "outcomes", "reused", "seconds")

    def __init__(self) -> None:
        self.seconds = Series(SLOW)
        self.outcomes: Counter[str] = Counter()
        self.computed = self.reused = self.nbytes = 0


class RouterMetrics(Collector):
    """Counts what happens at one router. Registered with the registry that it is given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._labels: dict[tuple[str, str], _Label] = {}
        self._refused: Counter[str] = Counter()
        self._unauthorized: Counter[str] = Counter()
        self._http_errors: Counter[str] = Counter()
        self._call_errors: Counter[str] = Counter()
        self._verbs: dict[str, _Verb] = {}
        self.active: Callable[[], int] = lambda: 0
        self.queued: Callable[[], int] = lambda: 0
        self.engines: Callable[[], Iterable[FleetEngine]] = tuple
        self.bus: Callable[[], BusStatistics] | None = None
        """Asked when a scrape comes; set by who knows."""
        self.serving: Callable[[], Iterable[ActiveStrategy]] = tuple
        self.events: Callable[[], Mapping[str, int]] = dict
        """Events of the fleet, by kind."""
        self.version = ""
        self.started_at = 0.0
        """Unix time, seconds."""
        self.versions: Callable[[], set[str]] = set
        """The versions that serve or finish requests now: others are counted together, so that labels stay few."""
        registry.register(self)

    # --- counting --------------------------------------------------------------------------------------------------

    def gap_observer(self, model: str, version: str) -> Callable[[float], None]:
        """What is told of every gap between two deliveries of a stream."""
        return self._label(model, version).itl.observe

    def ended(self, generation: Generation) -> None:
        """A choice has ended."""
        label = self._label(generation.request.model, generation.strategy_version)
        error = generation.error
        label.outcomes["ok" if error is None else error.code] += 1
        label.tokens_in += len(generation.request.prompt)
        label.tokens_out += generation.completion_tokens
        if generation.finish is not None:
            label.tokens_cached += generation.finish.usage.cached_tokens
        if generation.started_at is not None:
            label.queue.observe(generation.started_at - generation.created_at)
        first = generation.first_token_at
        if first is None:
            return
        label.ttft.observe(first - generation.created_at)
        if error is None:
            label.jct.observe(generation.last_token_at - generation.created_at)
            if generation.output_tokens > 1:
                label.tpot.observe((generation.last_token_at - first) / (generation.output_tokens - 1))

    def sub_ended(self, record: SubRecord) -> None:
        """A sub-request of a strategy has ended."""
        verb = self._verbs.setdefault(record.verb, _Verb())
        verb.outcomes[record.outcome] += 1
        if record.ended is not None:
            verb.seconds.observe(record.ended - record.started)
        verb.computed += record.computed
        verb.reused += record.reused
        verb.nbytes += record.nbytes

    def refused(self, code: str) -> None:
        """A choice was refused before anything started. The model's name is the caller's to invent: it is no label."""
        self._refused[code] += 1

    def unauthorized(self, reason: str) -> None:
        """Somebody was refused at the door."""
        self._unauthorized[reason] += 1

    def http_error(self, code: str) -> None:
        """An HTTP request, of whatever kind, was answered with an error."""
        self._http_errors[code] += 1

    def call_error(self, code: str) -> None:
        """A call for work (a generation, a tokenization, a call on an engine) was answered with an error."""
        self._call_errors[code] += 1

    def _label(self, model: str, version: str) -> _Label:
        key = (model, version)
        label = self._labels.get(key)
        if label is None:
            if len(self._labels) >= _MOST_LABELS:
                self._fold()
            label = self._labels.setdefault(key, _Label())
        return label

    def _fold(self) -> None:
        """What was measured of versions that serve no longer goes into one label a model."""
        active = self.versions()
        for model, version in [key for key in self._labels if key[1] not in active and key[1] != OTHER_VERSIONS]:
            self._labels.setdefault((model, OTHER_VERSIONS), _Label()).add(self._labels.pop((model, version)))

    def figures(self) -> list[VersionFigures]:
        """What every version did for every model, busiest first."""
        found = []
        for (model, version), label in self._labels.items():
            times = {
                f"{name}_{what}": value
                for name in ("ttft", "tpot", "jct")
                for what, value in _summary(getattr(label, name)).items()
            }
            ended = label.outcomes.total()
            found.append(
                VersionFigures(
                    model=model,
                    version=version,
                    requests=ended,
                    errors=ended - label.outcomes["ok"] - label.outcomes["cancelled"],
                    output_tokens=label.tokens_out,
                    **times,
                )
            )
        return sorted(found, key=lambda each: -each.requests)

    @property
    def requests(self) -> int:
        """Choices that ended, well or not, and those refused."""
        return sum(label.outcomes.total() for label in self._labels.values()) + self._refused.total()

    # --- scraping --------------------------------------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """Nothing: so that registering does not ask for values that are not there yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._times()
        yield from self._sub_requests()
        yield from self._state()
        if self.bus is not None:
            yield _bus(self.bus())

    def _requests(self) -> Iterator[Metric]:
        requests = _counter("requests", "Choices that ended, by outcome.", "model", "strategy", "outcome")
        tokens = _counter("tokens", "Tokens of choices that ended.", "model", "strategy", "kind")
        for (model, version), label in self._labels.items():
            for outcome, count in label.outcomes.items():
                requests.add_metric([model, version, outcome], count)
            counts = {"prompt": label.tokens_in, "cached": label.tokens_cached, "output": label.tokens_out}
            for kind, count in counts.items():
                tokens.add_metric([model, version, kind], count)
        refused = _counter("refused", "Choices refused before they started.", "reason")
        for code, count in self._refused.items():
            refused.add_metric([code], count)
        unauthorized = _counter("unauthorized", "HTTP requests refused for want of a key that may.", "reason")
        for reason, count in self._unauthorized.items():
            unauthorized.add_metric([reason], count)
        errors = _counter("http_errors", "HTTP requests answered with an error, by its code.", "code")
        for code, count in self._http_errors.items():
            errors.add_metric([code], count)
        calls = _counter("call_errors", "Calls for work over the bus answered with an error, by its code.", "code")
        for code, count in self._call_errors.items():
            calls.add_metric([code], count)
        yield from (requests, tokens, refused, unauthorized, errors, calls)

    def _times(self) -> Iterator[Metric]:
        for name, text in (
            ("queue", "Time until a choice got a place, of those that did"),
            ("ttft", "Time to first token"),
            ("itl", "Time between two deliveries of a stream"),
            ("tpot", "Time per output token after the first"),
            ("jct", "Time to the last token, of choices that ended well"),
        ):
            family = HistogramMetricFamily(f"{_PREFIX}{name}_seconds", f"{text}.", labels=["model", "strategy"])
            for (model, version), label in self._labels.items():
                series: Series = getattr(label, name)
                family.add_metric([model, version], series.buckets(), series.total)
            yield family

    def _sub_requests(self) -> Iterator[Metric]:
        ended = _counter(
            "sub_requests", "Sub-requests of strategies that ended, by verb and outcome.", "verb", "outcome"
        )
        seconds = HistogramMetricFamily(
            f"{_PREFIX}sub_request_seconds", "Time from a sub-request to its answer.", labels=["verb"]
        )
        moved = _counter("sent_tokens", "Tokens whose KV went to another engine: computed for it, or cached.", "kind")
        for name, verb in self._verbs.items():
            for outcome, count in verb.outcomes.items():
                ended.add_metric([name, outcome], count)
            seconds.add_metric([name], verb.seconds.buckets(), verb.seconds.total)
        sent = self._verbs.get("remote_send", _Verb())
        moved.add_metric(["computed"], sent.computed)
        moved.add_metric(["reused"], sent.reused)
        nbytes = CounterMetricFamily(f"{_PREFIX}sent_bytes", "KV that went to another engine.", value=sent.nbytes)
        yield from (ended, seconds, moved, nbytes)

    def _state(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(f"{_PREFIX}active", "Choices that run at engines.", value=self.active())
        yield GaugeMetricFamily(f"{_PREFIX}queued", "Choices that wait for a place.", value=self.queued())
        engines = list(self.engines())
        states = GaugeMetricFamily(f"{_PREFIX}engines", "Engines by state.", labels=["state"])
        counts = Counter(engine.state for engine in engines)
        for state in dict.fromkeys((*_STATES, *counts)):
            states.add_metric([state], counts[state])
        charged = GaugeMetricFamily(f"{_PREFIX}engine_charged", "This router's choices on it.", labels=["engine"])
        for engine in engines:
            charged.add_metric([engine.info.engine_id], engine.charged)
        way = GaugeMetricFamily(
            f"{_PREFIX}engine_round_trip_seconds", "The last ping over the bus, there and back.", labels=["engine"]
        )
        for engine in engines:
            if engine.round_trip is not None:
                way.add_metric([engine.info.engine_id], engine.round_trip)
        yield from (states, charged, way)
        share = GaugeMetricFamily(
            f"{_PREFIX}strategy_share",
            "Share of the traffic that a version serves; model * stands for all without their own.",
            labels=["model", "strategy"],
        )
        for active in self.serving():
            share.add_metric([active.model or "*", active.version], active.share)
        events = _counter("events", "Events of the fleet, by kind.", "kind")
        for kind, count in list(self.events().items()):
            events.add_metric([kind], count)
        info = GaugeMetricFamily(f"{_PREFIX}info", "What it is; always 1.", labels=["version"])
        info.add_metric([self.version], 1)
        start = GaugeMetricFamily(f"{_PREFIX}start_time_seconds", "Unix time of its start.", value=self.started_at)
        yield from (share, events, info, start)


def _summary(series: Series) -> dict[str, float | None]:
    return {"mean": series.mean(), "p50": series.percentile(0.5), "p99": series.percentile(0.99)}


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(_PREFIX + name, text, labels=labels)


def _bus(statistics: BusStatistics) -> Metric:
    family = _counter("bus", "What the bus counted.", "event")
    for event in _BUS_EVENTS:
        family.add_metric([event], getattr(statistics, event))
    return family
