"""The bodies of the engines' verbs over HTTP, and the messages that they become."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from microserve.runtime import messages
from microserve.runtime.codec import pack_tokens
from microserve.runtime.messages import (
    EngineVerb,
    Int64,
    KvAddress,
    Layout,
    LeaseId,
    Name,
    NonNegative,
    SamplingParams,
    Seconds,
    TokenLogprobs,
)

ROOT = "/microserving/v1"

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Meta(min_length=1)]


class Address(Struct, forbid_unknown_fields=True, kw_only=True):
    """Where KV is to go: what `prep_recv` answered, unchanged."""

    engine_id: str
    epoch: Int64
    endpoint: str
    lease: LeaseId
    matched: Int64
    end: Int64
    pages: list[TokenId]
    layout: Layout


class Prompted(Struct, forbid_unknown_fields=True, kw_only=True):
    """A call about a prompt: exactly one of `prompt` (token ids) and `text`. Ids are made up where none are given."""

    prompt: Tokens | None = None
    text: str | None = None
    request_id: Name = ""
    sub_id: Name = ""


class PrepRecvBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """Match the prompt, prepare pages for KV of `[matched, end)`, open a lease. `end` may count from the end."""

    end: Int64 | None = None
    expect_tokens: NonNegative = 0
    admit_by: Seconds | None = None


class RemoteSendBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """Produce KV of `[begin, end)` on this engine and push it to `address`; by default all that is awaited."""

    address: Address
    begin: Int64 | None = None
    end: Int64 | None = None


class Sampling(SamplingParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`SamplingParams`. A field that nobody knows is a mistake here; the bus passes over it, as a newer router's."""


class StartGenerateBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """Prefill from `begin` and decode. With `lease`: wait for its KV up to `begin` first."""

    begin: Int64 = 0
    sampling: Sampling = Sampling()
    prior_output: NonNegative = 0
    admit_by: Seconds | None = None
    first_token_by: Seconds | None = None
    lease: LeaseId | None = None
    kv_wait: Seconds | None = None
    stream: bool = False


class CommitBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """What arrives of a lease within `wait` seconds (default: the engine's `kv_wait`) enters the prefix tree."""

    lease: LeaseId
    wait: Seconds | None = None
    request_id: Name = ""
    sub_id: Name = ""


class ReleaseBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """End a lease."""

    lease: LeaseId


class ForgoBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """KV of `[begin, end)` will not come: who waits for it computes it."""

    lease: LeaseId
    begin: Int64
    end: Int64


class AbortBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """End a sub-request."""

    sub_id: Name


class CacheMatchBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """How much of a prompt the prefix tree holds."""


class CachePinBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """Keep what is cached of a prompt for `ttl` seconds."""

    ttl: Annotated[float, Meta(gt=0, le=31_536_000)]


class CacheUnpinBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """End the pin on the longest pinned prefix of a prompt."""


class CacheEvictBody(Prompted, forbid_unknown_fields=True, kw_only=True):
    """Free cached pages that nobody uses: a prompt's own, or without a prompt all."""


class CachePrefixesBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """The longest prefixes of the tree."""

    count: Annotated[int, Meta(ge=1, le=1000)] = 20


class NothingBody(Struct, forbid_unknown_fields=True):
    """An empty object, or no body."""


class GeneratedBody(Struct, kw_only=True):
    """The answer of `start_generate`, whole; or the last event of its stream, without tokens."""

    tokens: list[int]
    finish_reason: str
    usage: messages.Usage
    stop_token: int | None = None
    received_tokens: int = 0
    recomputed_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None


Prompt = bytes
Make = Callable[[Any, Prompt], EngineVerb]


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: its body, the message that it becomes, and the body of its answer."""

    body: type[Struct]
    make: Make
    answer: type[Struct]

    @property
    def needs_body(self) -> bool:
        """Whether an empty body is refused: a field is required, or one of `prompt` and `text` is."""
        required = any(field.required for field in msgspec.structs.fields(self.body))
        return required or (issubclass(self.body, Prompted) and self.body is not CacheEvictBody)


def _ids(body: Any) -> dict[str, Any]:
    made = body.sub_id or f"http-{os.urandom(8).hex()}"
    return {"request_id": body.request_id or made, "sub_id": made}


def _send(body: RemoteSendBody, prompt: Prompt) -> messages.RemoteSend:
    given = body.address
    address = KvAddress(
        engine_id=given.engine_id,
        epoch=given.epoch,
        endpoint=given.endpoint,
        lease=given.lease,
        matched=given.matched,
        end=given.end,
        pages=pack_tokens(given.pages),
        layout=given.layout,
    )
    begin = min(given.matched, given.end) if body.begin is None else body.begin
    end = given.end if body.end is None else body.end
    return messages.RemoteSend(prompt=prompt, address=address, begin=begin, end=end, **_ids(body))


def _start(body: StartGenerateBody, prompt: Prompt) -> messages.StartGenerate:
    return messages.StartGenerate(
        prompt=prompt,
        begin=body.begin,
        sampling=SamplingParams(**msgspec.structs.asdict(body.sampling)),
        prior_output=body.prior_output,
        admit_by=body.admit_by,
        first_token_by=body.first_token_by,
        lease=body.lease,
        kv_wait=body.kv_wait,
        **_ids(body),
    )


VERBS: dict[str, Verb] = {
    "prep_recv": Verb(
        PrepRecvBody,
        lambda body, prompt: messages.PrepRecv(
            prompt=prompt, end=body.end, expect_tokens=body.expect_tokens, admit_by=body.admit_by, **_ids(body)
        ),
        Address,
    ),
    "remote_send": Verb(RemoteSendBody, _send, messages.SendReport),
    "start_generate": Verb(StartGenerateBody, _start, GeneratedBody),
    "commit": Verb(
        CommitBody,
        lambda body, _: messages.Commit(lease=body.lease, wait=body.wait, **_ids(body)),
        messages.Committed,
    ),
    "release": Verb(ReleaseBody, lambda body, _: messages.Release(lease=body.lease), messages.Released),
    "forgo": Verb(
        ForgoBody,
        lambda body, _: messages.Forgo(lease=body.lease, begin=body.begin, end=body.end),
        messages.Released,
    ),
    "abort": Verb(AbortBody, lambda body, _: messages.Abort(sub_id=body.sub_id), messages.Aborted),
    "cache_match": Verb(CacheMatchBody, lambda _, prompt: messages.CacheMatch(prompt=prompt), messages.CacheMatched),
    "cache_pin": Verb(
        CachePinBody, lambda body, prompt: messages.CachePin(prompt=prompt, ttl=body.ttl), messages.CacheMatched
    ),
    "cache_unpin": Verb(CacheUnpinBody, lambda _, prompt: messages.CacheUnpin(prompt=prompt), messages.CacheMatched),
    "cache_evict": Verb(
        CacheEvictBody, lambda _, prompt: messages.CacheEvict(prompt=prompt or None), messages.CacheEvicted
    ),
    "cache_prefixes": Verb(
        CachePrefixesBody, lambda body, _: messages.CachePrefixes(count=body.count), messages.Prefixes
    ),
    "info": Verb(NothingBody, lambda _body, _prompt: messages.Info(), messages.InfoReply),
    "stats": Verb(NothingBody, lambda _body, _prompt: messages.Stats(), messages.StatsReply),
    "drain": Verb(NothingBody, lambda _body, _prompt: messages.Drain(), messages.Ok),
    "resume": Verb(NothingBody, lambda _body, _prompt: messages.Resume(), messages.Ok),
}
