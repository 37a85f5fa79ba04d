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
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    begin: int = 0
    sampling: SamplingParams = SamplingParams()
    prior_output: NonNegative = 0
    admit_by: Seconds | None = None
    first_token_by: Seconds | None = None


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
    state: str = "ready"
    """"starting", "ready", "draining" or "degraded"."""


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
    """"started", "state" (load.state changed), "load" (periodic), "stopping"."""
    load: Load
    detail: str = ""


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


EngineVerb = StartGenerate | Abort | Info | Stats | Drain | Resume
RouterVerb = Announce | Heartbeat | Leave | Generate | ListModels | Tokenize | Detokenize | Status
ReplyBody = (
    Ok
    | Tokens
    | Generated
    | Aborted
    | InfoReply
    | StatsReply
    | TextChunk
    | Finished
    | Models
    | Tokenized
    | Detokenized
    | StatusReply
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
