"""Who an engine is, how it is, and what it tells."""

from __future__ import annotations

from msgspec import Struct

from microserve.runtime.messages.base import PROTOCOL_VERSION, Int64, Message


class ModelInfo(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What an engine serves.

    `revision` is a digest of config and weights; `path` is the checkpoint's folder, where a router finds the tokenizer.
    """

    name: str
    revision: str
    architecture: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    path: str = ""


class Layout(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """The shape of a KV page; two engines exchange pages only when these agree."""

    model_revision: str
    dtype: str
    page_size: Int64
    layers: Int64
    kv_heads: Int64
    head_dim: Int64
    tp_rank: Int64 = 0
    tp_size: Int64 = 1
    protocol: Int64 = PROTOCOL_VERSION


class Load(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """A snapshot of an engine's load; pages by state add up to `total_pages`."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    free_pages: int = 0
    owned_pages: int = 0
    cached_pages: int = 0
    leased_pages: int = 0
    quarantined_pages: int = 0
    total_pages: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_lookup_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    sent_bytes: int = 0
    """KV pushed to other engines since the start."""
    received_bytes: int = 0
    push_failures: int = 0
    state: str = "ready"
    """"starting", "ready", "draining" or "degraded"."""


class PeerLink(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What one engine knows of its way to another: measured when they met."""

    engine_id: str
    epoch: int
    state: str
    """"connecting", "ready", "refused" (layouts differ, or a demanded transport is missing) or "lost"."""
    transport: str = ""
    """What carries the pages: "cuda_ipc", "rdma", "shm", "tcp", "local" …"""
    gigabytes_per_second: float = 0.0
    """Of the probe at connect, in 10**9 bytes."""
    detail: str = ""
    sent_bytes: int = 0
    sent_seconds: float = 0.0
    received_bytes: int = 0
    failures: int = 0


class EngineInfo(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Everything a router must know to use an engine."""

    engine_id: str
    epoch: int
    endpoint: str
    events_endpoint: str
    model: ModelInfo
    layout: Layout
    executor: str
    max_running: int
    labels: dict[str, str] = {}
    started_at: float = 0.0
    """Unix time, seconds."""


class Announce(Message, tag="announce", frozen=True):
    """An engine to a router: here I am. Reply: `Ok`."""

    info: EngineInfo
    load: Load


class Heartbeat(Message, tag="heartbeat", frozen=True):
    """An engine to a router, once a second and on changes of state. Reply: `Ok`, or `not_found` (announce again)."""

    engine_id: str
    epoch: int
    load: Load


class Leave(Message, tag="leave", frozen=True):
    """An engine to a router: I am going. Reply: `Ok`."""

    engine_id: str
    epoch: int


class Ok(Message, tag="ok", frozen=True):
    """Done, with nothing to say."""


class Info(Message, tag="info", frozen=True):
    """Reply: `InfoReply`."""


class InfoReply(Message, tag="info_reply", frozen=True):
    info: EngineInfo
    load: Load
    links: list[PeerLink] = []


class Stats(Message, tag="stats", frozen=True):
    """Reply: `StatsReply`: counters and gauges by name, and `integrity` ("ok" or what is wrong)."""


class StatsReply(Message, tag="stats_reply", frozen=True):
    values: dict[str, float]
    integrity: str = "ok"


class Drain(Message, tag="drain", frozen=True):
    """Finish what runs, refuse what is new. Reply: `Ok` at once; the state shows in the load."""


class Resume(Message, tag="resume", frozen=True):
    """Take new work again. Reply: `Ok`."""


class EngineEvent(Message, tag="event", frozen=True):
    """Published by an engine. `seq` counts from 1 within the epoch; a gap means that events were lost: ask `Info`."""

    engine_id: str
    epoch: int
    seq: int
    kind: str
    """"started", "state" (load.state changed), "load" (periodic), "stopping"; and, with `detail`: "peer" (a way to
    another engine was opened, refused or lost), "lease_expired", "quarantined", "push_failed"."""
    load: Load
    detail: str = ""
