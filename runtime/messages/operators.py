"""A router's verbs for operators: strategies, requests, events."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from microserve.runtime.messages.base import Int64, Message, Name, NonNegative

SettingValue = bool | int | float | str


class SettingInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One setting of a strategy. `type` is "int", "float", "str" or "bool"."""

    name: str
    type: str
    default: SettingValue
    bounds: str = ""
    """In words, where it has any."""


class StrategyInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A strategy that can be chosen. `source` is "built in", an entry point or a file."""

    name: str
    summary: str
    source: str
    settings: list[SettingInfo] = []


class ActiveStrategy(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A version that serves a share of a model's requests. `model` "" stands for every model without its own."""

    model: str
    version: str
    name: str
    settings: dict[str, SettingValue] = {}
    share: float = 1.0
    since: float = 0.0
    """Unix time, seconds."""


class StrategyChange(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of the history: what served from `at` (Unix time, seconds) on."""

    number: int
    at: float
    model: str
    active: list[ActiveStrategy]
    reason: str = ""


class ListStrategies(Message, tag="list_strategies", frozen=True):
    """Reply: `Strategies`."""


class VersionFigures(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one version did for one model since the router's start. Times in seconds; None where nothing was measured.

    `version` "other": those that serve no longer, together. Percentiles are interpolated between a histogram's bounds.
    """

    model: str
    version: str
    requests: int = 0
    """Choices that ended, well or not."""
    errors: int = 0
    """Those that ended otherwise than well, or by their caller's wish."""
    output_tokens: int = 0
    ttft_mean: float | None = None
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    tpot_mean: float | None = None
    tpot_p50: float | None = None
    tpot_p99: float | None = None
    jct_mean: float | None = None
    jct_p50: float | None = None
    jct_p99: float | None = None


class Strategies(Message, tag="strategies", frozen=True):
    """`problems`: sources that could not be loaded, each with file, line and reason. `history`: newest first."""

    strategies: list[StrategyInfo]
    active: list[ActiveStrategy]
    problems: list[str] = []
    history: list[StrategyChange] = []
    figures: list[VersionFigures] = []


class SetStrategy(Message, tag="set_strategy", frozen=True):
    """New requests are served by another version from now on. Reply: `StrategySet`. Files are read again.

    `share` below 1 sends that part of the traffic to it, and the rest to what serves now. `dry_run` only validates.
    """

    name: str
    model: str = ""
    settings: dict[str, SettingValue] = {}
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    dry_run: bool = False


class RollbackStrategy(Message, tag="rollback_strategy", frozen=True):
    """Back to what served before the last change of `model`, or before change `number`. Reply: `StrategySet`."""

    model: str = ""
    number: Int64 | None = None


class StrategySet(Message, tag="strategy_set", frozen=True):
    """What serves `model` now (or would, after a dry run)."""

    active: list[ActiveStrategy]
    dry_run: bool = False


class SubRequestInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sub-request of a request. `started` and `ended` are seconds after the request's arrival."""

    verb: str
    engine: str
    begin: int
    end: int
    """The positions of the prompt that it is about."""
    started: float
    ended: float | None = None
    """None while it runs."""
    outcome: str = ""
    """"ok" or the code of an error; "" while it runs."""
    matched: int = 0
    computed: int = 0
    reused: int = 0
    bytes: int = 0


class RequestInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of a request at a router. `first_token` and `ended` are seconds after its arrival."""

    request_id: str
    model: str
    strategy: str
    """The version that serves it."""
    state: str
    """"queued", "running", "ok", or the code of the error that it ended with."""
    age: float
    """Seconds since its arrival."""
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    engines: list[str] = []
    """Those that were asked for anything: those that generate come last, in the order in which they were asked."""
    first_token: float | None = None
    ended: float | None = None
    error: str = ""
    sub_requests: list[SubRequestInfo] = []


class ListRequests(Message, tag="list_requests", frozen=True):
    """What runs and waits at a router, oldest first, and the last `recent` that have ended. Reply: `Requests`.

    With `request_id` only those of that id, ended or not.
    """

    request_id: Name | None = None
    recent: Annotated[int, Meta(ge=0, le=256)] = 0
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 1000


class Requests(Message, tag="requests", frozen=True):
    """`active`: how many run or wait, listed or not."""

    requests: list[RequestInfo]
    active: int = 0
    recent: list[RequestInfo] = []
    """Newest first."""


class AbortRequest(Message, tag="abort_request", frozen=True):
    """Ends a request, every choice of it; its caller is told that it was cancelled. Reply: `Aborted`."""

    request_id: Name


class FleetEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened, for operators. `seq` counts from 1 within the router's epoch."""

    seq: int
    at: float
    """Unix time, seconds."""
    kind: str
    """"joined", "restarted", "left", "silent", "returned", "connected", "lost"; "state", "peer", "lease_expired",
    "quarantined", "push_failed" (engines said so); "strategy", "refused", "aborted", "operator" (somebody drained,
    resumed, pinned, unpinned or evicted)."""
    engine: str = ""
    epoch: int = 0
    detail: str = ""


class ListEvents(Message, tag="list_events", frozen=True):
    """Events with a `seq` above `after`, oldest first, at most the newest `limit`. Reply: `Events`."""

    after: NonNegative = 0
    limit: Annotated[int, Meta(ge=1, le=1000)] = 200


class Events(Message, tag="events", frozen=True):
    """`last` is the newest event's `seq`: a smaller one than was known means another router process."""

    events: list[FleetEvent]
    last: int = 0
