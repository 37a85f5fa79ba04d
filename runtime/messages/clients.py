"""A router's verbs for clients."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from microserve.runtime.messages.base import Message, Name, Seconds, TokenBytes
from microserve.runtime.messages.generation import SamplingParams, TokenLogprobs, Usage
from microserve.runtime.messages.membership import EngineInfo, Load, ModelInfo


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
