"""Every message of the bus, as tagged structs. The wire is plain msgpack: a map with `t` as the tag.

Token ids travel as raw little-endian int32 (`bytes`), 4 bytes a token. Optional fields that have their default
value are left out, and unknown fields are ignored, so that minor versions can add fields.

Layers, outermost first:

* session: `Hello`, `Welcome`, `Ping`, `Pong`, `Bye`, exchanged by the bus itself;
* RPC: `Call`, `Reply`, `Part`, `Failure`, `Cancel`, and `Batch`, which carries many of them in one message;
* verbs: the `body` of a call, and the bodies of its replies.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1

MAX_MESSAGE_BYTES = 64 << 20
"""A larger message is refused before it is decoded."""

TokenBytes = bytes
"""Token ids, little-endian int32."""

Name = Annotated[str, Meta(max_length=256)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
LeaseId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
PageBytes = bytes
"""Page numbers, little-endian int32."""


class Message(Struct, tag_field="t", omit_defaults=True, kw_only=True, frozen=True):
    """Base of everything that travels."""


# --- session -------------------------------------------------------------------------------------------------------


class Hello(Message, tag="hello", frozen=True):
    """First message of a session, from the side that dialled."""

    version: int
    kind: Name
    name: Name
    epoch: int
    heartbeat: Seconds = 1.0


class Welcome(Message, tag="welcome", frozen=True):
    """The answer to `Hello`: the session is open."""

    version: int
    kind: Name
    name: Name
    epoch: int
    heartbeat: Seconds = 1.0


class Ping(Message, tag="ping", frozen=True):
    """Sent on an idle session; any message proves life, and `Ping` is the one with nothing else to say."""


class Pong(Message, tag="pong", frozen=True):
    """The answer to `Ping`."""


class Bye(Message, tag="bye", frozen=True):
    """The sender ends the session; what belonged to it is aborted."""

    reason: str = ""


# --- errors --------------------------------------------------------------------------------------------------------


class ErrorInfo(Struct, omit_defaults=True, frozen=True):
    """A `MicroserveError` as data."""

    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


# --- verbs: sampling and generation --------------------------------------------------------------------------------


class SamplingParams(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """How tokens are chosen. Defaults are plain sampling at temperature 1.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off. `logprobs` None returns
    none, k returns the chosen token's and the k most likely. The random stream is Philox(seed, output index);
    without a seed the engine draws one.
    """

    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: NonNegative = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    ignore_eos: bool = False
    min_tokens: NonNegative = 0
    stop_token_ids: Annotated[tuple[int, ...], Meta(max_length=256)] = ()


class StartGenerate(Message, tag="start_generate", frozen=True):
    """Match the prompt, prefill from `begin`, and stream tokens. Replies: `Part(Tokens)…`, then `Reply(Generated)`.

    `prior_output` = k: the last k prompt tokens were generated earlier; penalties, `min_tokens`, `max_tokens`, the
    random stream and usage continue from there. Budgets are seconds that remain when the message is sent:
    `admit_by` until it starts to run, `first_token_by` until its first token.

    With `lease`: wait, at most `kv_wait`, until the KV of `[matched, begin)` has arrived, then prefill `[begin, len)`.
    What does not arrive is computed here. Negative `begin` counts from the end.
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    begin: int = 0
    sampling: SamplingParams = SamplingParams()
    prior_output: NonNegative = 0
    admit_by: Seconds | None = None
    first_token_by: Seconds | None = None
    lease: LeaseId | None = None
    kv_wait: Seconds | None = None


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """Natural-log probabilities of one output position, before penalties and temperature are applied.

    `top_ids` and `top_logprobs` are the n most likely tokens, most likely first.
    """

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Tokens(Message, tag="tokens", frozen=True):
    """Tokens that one step added to one call (usually one)."""

    ids: TokenBytes
    logprobs: list[TokenLogprobs] | None = None
    cached: NonNegative | None = None
    """Prompt tokens that the engine's prefix tree held; said once, with the first tokens."""


class Usage(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What a call cost. `cached_tokens` are prompt tokens whose KV nobody computed for this request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Generated(Message, tag="generated", frozen=True):
    """The terminal reply of `StartGenerate`: `finish_reason` is "stop" (by `stop_token`) or "length"."""

    finish_reason: str
    usage: Usage
    stop_token: int | None = None
    received_tokens: NonNegative = 0
    """Prompt tokens whose KV came from other engines."""
    recomputed_tokens: NonNegative = 0
    """Prompt tokens whose KV should have come from other engines, did not, and was computed here."""


class Abort(Message, tag="abort", frozen=True):
    """End the named call. Idempotent. Reply: `Aborted` ("freed" or "unknown")."""

    sub_id: Name


class Aborted(Message, tag="aborted", frozen=True):
    outcome: str


# --- verbs: membership and control ---------------------------------------------------------------------------------


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
    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    tp_rank: int = 0
    tp_size: int = 1
    protocol: int = PROTOCOL_VERSION


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


# --- verbs: KV that moves ------------------------------------------------------------------------------------------


class KvAddress(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where KV of a prepared prompt is to go: a lease on `engine_id` of `epoch`.

    Positions `[matched, end)` are awaited; `pages` are the receiver's page numbers for them, in order of position,
    the first for position `matched` (a multiple of the page size). When `matched >= end` nothing is awaited.
    """

    engine_id: str
    epoch: int
    endpoint: str
    """The receiver's API endpoint, where a sender claims."""
    lease: LeaseId
    matched: int
    end: int
    pages: PageBytes
    layout: Layout


class PrepRecv(Message, tag="prep_recv", frozen=True):
    """Match the prompt, lock what matched, allocate pages for `[matched, end)`, open a lease. Reply: `Prepared`.

    `end` None is the prompt's length; negative counts from the end. `expect_tokens`: output tokens that room is kept
    for. `admit_by`: seconds until it is refused as `busy`; without it, at once.
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    end: int | None = None
    expect_tokens: NonNegative = 0
    admit_by: Seconds | None = None


class Prepared(Message, tag="prepared", frozen=True):
    address: KvAddress


class RemoteSend(Message, tag="remote_send", frozen=True):
    """Produce KV for `[begin, end)` and push it into the receiver's pages. Reply: `SendReport`.

    `begin` is page-aligned and at least the address's `matched`; `end` at most its `end`. An empty range succeeds.
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    address: KvAddress
    begin: int
    end: int | None = None


class SendReport(Message, tag="send_report", frozen=True):
    """Of the tokens in the range, how many were `computed` for this call and how many `reused` from the prefix tree."""

    computed: int
    reused: int
    bytes: int
    seconds: float
    """From the call's arrival to the end of the last push."""
    push_seconds: float = 0.0
    """Spent in pushes."""


class Commit(Message, tag="commit", frozen=True):
    """Complete pages that arrived enter the prefix tree without generating, and the lease ends. Reply: `Committed`.

    Waits, at most `wait` seconds, for what is still on its way.
    """

    request_id: Name
    sub_id: Name
    lease: LeaseId
    wait: Seconds | None = None


class Committed(Message, tag="committed", frozen=True):
    committed_until: int


class Release(Message, tag="release", frozen=True):
    """Ends a lease. Idempotent. Reply: `Released`."""

    lease: LeaseId


class Forgo(Message, tag="forgo", frozen=True):
    """KV for `[begin, end)` of a lease will not come: who waits for it computes it. Idempotent. Reply: `Released`."""

    lease: LeaseId
    begin: int
    end: int


class Released(Message, tag="released", frozen=True):
    outcome: str
    """"freed", "quarantined" (a transfer may still be under way; the pages come back later) or "unknown"."""


# --- verbs: engine to engine ---------------------------------------------------------------------------------------


class PeerHello(Message, tag="peer_hello", frozen=True):
    """An engine to another: who I am, what my pages look like, how my pool is reached. Reply: `PeerWelcome`.

    `host`, `pid` and `pid_started` (clock ticks since boot) let a receiver on the same host prove a sender dead.
    """

    engine_id: Name
    epoch: int
    endpoint: str
    layout: Layout
    transport: str
    metadata: bytes
    host: str = ""
    pid: int = 0
    pid_started: int = 0


class PeerWelcome(Message, tag="peer_welcome", frozen=True):
    engine_id: Name
    epoch: int
    layout: Layout
    transport: str
    metadata: bytes
    host: str = ""
    pid: int = 0
    pid_started: int = 0


class Claim(Message, tag="claim", frozen=True):
    """A sender asks for the right to write `[begin, end)` of a lease; one writer a range, ever. Reply: `Claimed`.

    `sub_id` names the send that it is for: asked again for the same one, the answer is the same claim. `digest`
    (BLAKE2b of 16 bytes over the token bytes before `end`) lets the receiver refuse KV of another prompt.
    """

    lease: LeaseId
    epoch: int
    """The receiver's, from the address: a stale one is refused."""
    begin: int
    end: int
    engine_id: Name
    sender_epoch: int
    sub_id: Name = ""
    digest: bytes = b""


class Claimed(Message, tag="claimed", frozen=True):
    claim: NonNegative
    term: Seconds
    """The sender counts from when it asked, and posts nothing after it."""
    pages: PageBytes = b""
    """The receiver's pages for the range, in order of position."""


class ClaimEnded(Message, tag="claim_ended", frozen=True):
    """The transport has really finished with the pages of a claim. Idempotent. Reply: `Ok`. `error` "" means done."""

    claim: NonNegative
    error: str = ""


class PeerAddress(Struct, frozen=True, kw_only=True):
    engine_id: str
    epoch: int
    endpoint: str


class Meet(Message, tag="meet", frozen=True):
    """A router to an engine: the others of your model; it connects to those that it does not know. Reply: `Ok`."""

    peers: list[PeerAddress]


# --- verbs: prefix tree --------------------------------------------------------------------------------------------


class CacheMatch(Message, tag="cache_match", frozen=True):
    """How much of a prompt the prefix tree holds. Reply: `CacheMatched`."""

    prompt: TokenBytes


class CachePin(Message, tag="cache_pin", frozen=True):
    """Keep what is cached of a prompt for `ttl` seconds; again renews it. Reply: `CacheMatched`: the tokens pinned."""

    prompt: TokenBytes
    ttl: Annotated[float, Meta(gt=0, le=31_536_000)]


class CacheUnpin(Message, tag="cache_unpin", frozen=True):
    """End the pin on the longest pinned prefix of a prompt. Reply: `CacheMatched`: the tokens that were pinned."""

    prompt: TokenBytes


class CacheEvict(Message, tag="cache_evict", frozen=True):
    """Free cached pages that nobody uses or pinned: all, or a prompt's own. Reply: `CacheEvicted`."""

    prompt: TokenBytes | None = None


class CachePrefixes(Message, tag="cache_prefixes", frozen=True):
    """The longest prefixes of the tree, longest first. Reply: `Prefixes`."""

    count: Annotated[int, Meta(ge=1, le=1000)] = 20


class CacheMatched(Message, tag="cache_matched", frozen=True):
    tokens: int


class CacheEvicted(Message, tag="cache_evicted", frozen=True):
    pages: int


class PrefixEntry(Struct, frozen=True, kw_only=True):
    """One prefix of the tree. `prompt` is all of its token ids."""

    prompt: TokenBytes
    pages: int
    references: int
    pinned: bool


class Prefixes(Message, tag="prefixes", frozen=True):
    prefixes: list[PrefixEntry]


# --- verbs: router, for clients ------------------------------------------------------------------------------------


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    role: str
    content: str
    name: str | None = None


class Generate(Message, tag="generate", frozen=True):
    """A client to a router: one choice of one request.

    Exactly one of `text`, `prompt` (token ids) and `messages` is given.

    Replies: `Part(TextChunk)…`, then `Reply(Finished)`. `model` "" means the only (or first) model.
    """

    model: str = ""
    text: str | None = None
    prompt: TokenBytes | None = None
    messages: list[ChatMessage] | None = None
    sampling: SamplingParams = SamplingParams()
    stop: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    request_id: Name | None = None
    timeout: Seconds | None = None


class TextChunk(Message, tag="text", frozen=True):
    """New text and the token ids behind it. Text never ends within a UTF-8 sequence; ids may run ahead of the text."""

    text: str
    ids: TokenBytes = b""
    logprobs: list[TokenLogprobs] | None = None


class Finished(Message, tag="finished", frozen=True):
    """The end of a `Generate`. `strategy` is the version that served it; `engine` the one that decoded."""

    finish_reason: str
    usage: Usage
    request_id: str
    strategy: str = ""
    engine: str = ""


class ListModels(Message, tag="list_models", frozen=True):
    """Reply: `Models`."""


class Models(Message, tag="models", frozen=True):
    models: list[ModelInfo]


class Tokenize(Message, tag="tokenize", frozen=True):
    """Reply: `Tokenized`."""

    text: str
    model: str = ""
    add_special_tokens: bool = True


class Tokenized(Message, tag="tokenized", frozen=True):
    ids: TokenBytes


class Detokenize(Message, tag="detokenize", frozen=True):
    """Reply: `Detokenized`."""

    ids: TokenBytes
    model: str = ""


class Detokenized(Message, tag="detokenized", frozen=True):
    text: str


class FleetEngine(Struct, frozen=True, omit_defaults=True, kw_only=True):
    info: EngineInfo
    load: Load
    state: str
    """"ready", "draining", "degraded", "silent" or "connecting", as the router sees it."""
    charged: int
    """Requests that this router has running on it."""
    last_seen: float
    """Seconds since its last heartbeat."""
    round_trip: float | None = None
    """Seconds that the last ping over the bus took, there and back."""


class Status(Message, tag="status", frozen=True):
    """Reply: `StatusReply`."""


class StatusReply(Message, tag="status_reply", frozen=True):
    router: str
    epoch: int
    version: str
    uptime: float
    engines: list[FleetEngine]
    active_requests: int
    queued_requests: int
    requests_total: int
    strategy: str
    http: str = ""


# --- verbs: router, for operators ----------------------------------------------------------------------------------


SettingValue = bool | int | float | str


class SettingInfo(Struct, frozen=True, kw_only=True):
    """One setting of a strategy. `type` is "int", "float", "str" or "bool"."""

    name: str
    type: str
    default: SettingValue


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
    number: int | None = None


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
    """Those that were asked to generate; the last one decodes."""
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
    "quarantined", "push_failed" (engines said so); "strategy", "refused", "aborted"."""
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


class EngineCall(Message, tag="engine_call", frozen=True):
    """A client to a router: make this call on that engine. Replies are the engine's own, parts included."""

    engine_id: Name
    body: EngineVerb


EngineVerb = (
    StartGenerate
    | PrepRecv
    | RemoteSend
    | Commit
    | Release
    | Forgo
    | Abort
    | PeerHello
    | Claim
    | ClaimEnded
    | Meet
    | CacheMatch
    | CachePin
    | CacheUnpin
    | CacheEvict
    | CachePrefixes
    | Info
    | Stats
    | Drain
    | Resume
)
RouterVerb = (
    Announce
    | Heartbeat
    | Leave
    | Generate
    | ListModels
    | Tokenize
    | Detokenize
    | Status
    | ListStrategies
    | SetStrategy
    | RollbackStrategy
    | ListRequests
    | AbortRequest
    | ListEvents
    | EngineCall
)
ReplyBody = (
    Ok
    | Tokens
    | Generated
    | Aborted
    | Prepared
    | SendReport
    | Committed
    | Released
    | PeerWelcome
    | Claimed
    | CacheMatched
    | CacheEvicted
    | Prefixes
    | InfoReply
    | StatsReply
    | TextChunk
    | Finished
    | Models
    | Tokenized
    | Detokenized
    | StatusReply
    | Strategies
    | StrategySet
    | Requests
    | Events
)

# --- RPC -----------------------------------------------------------------------------------------------------------


class Call(Message, tag="call", frozen=True):
    """Start a call. `budget` is the seconds that remain for all of it; the receiver stamps a deadline on arrival."""

    id: NonNegative
    body: EngineVerb | RouterVerb
    budget: Seconds | None = None


class Part(Message, tag="part", frozen=True):
    """One piece of a streamed answer; never terminal."""

    id: NonNegative
    body: ReplyBody


class Reply(Message, tag="reply", frozen=True):
    """The terminal answer of a call that succeeded."""

    id: NonNegative
    body: ReplyBody


class Failure(Message, tag="failure", frozen=True):
    """The terminal answer of a call that failed. `id` None: the call's frame could not be decoded."""

    id: NonNegative | None
    error: ErrorInfo


class Cancel(Message, tag="cancel", frozen=True):
    """The caller no longer wants the answer. The callee still sends one terminal (usually `cancelled`)."""

    id: NonNegative


class Batch(Message, tag="batch", frozen=True):
    """Answers of many calls in one message: what an engine's step sends to one router."""

    items: list[Part | Reply | Failure]


SessionMessage = Hello | Welcome | Ping | Pong | Bye
RpcMessage = Call | Part | Reply | Failure | Cancel | Batch
AnyMessage = Hello | Welcome | Ping | Pong | Bye | Call | Part | Reply | Failure | Cancel | Batch | EngineEvent
