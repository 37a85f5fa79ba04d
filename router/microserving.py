"""The engines' verbs over HTTP, for people with `curl` and programs in other languages.

    GET  /microserving/v1/engines                      every engine, with its load
    GET  /microserving/v1/engines/{id}                 one of them, with its links to others
    POST /microserving/v1/engines/{id}/{verb}          prep_recv, remote_send, start_generate, commit …
    GET  /microserving/v1/openapi.json, /docs          what this module knows of itself

Bodies have the names of the bus's messages. A prompt is a list of token ids, or `text`; page numbers are lists.
`start_generate` answers whole, or with `"stream": true` as server-sent events.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Struct

from microserve.router.openai import parse
from microserve.router.openai.exchange import ClientGone
from microserve.router.openai.responses import DONE
from microserve.runtime import messages
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import InvalidRequest, NotFound, ProtocolError
from microserve.runtime.messages import EngineVerb, KvAddress, Layout, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from microserve.router.openai.endpoints import Core
    from microserve.router.openai.exchange import Exchange
    from microserve.runtime.rpc import CallStream

ROOT = "/microserving/v1"

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Meta(min_length=1)]
Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(max_length=256)]


class Address(Struct, forbid_unknown_fields=True, kw_only=True):
    """Where KV is to go: what `prep_recv` answered, unchanged."""

    engine_id: str
    epoch: int
    endpoint: str
    lease: Id
    matched: int
    end: int
    pages: list[TokenId]
    layout: Layout


class _Prompted(Struct, forbid_unknown_fields=True, kw_only=True):
    """A call about a prompt: exactly one of `prompt` (token ids) and `text`. Ids are made up where none are given."""

    prompt: Tokens | None = None
    text: str | None = None
    request_id: Name = ""
    sub_id: Name = ""


class PrepRecvBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
    """Match the prompt, prepare pages for KV of `[matched, end)`, open a lease. `end` may count from the end."""

    end: int | None = None
    expect_tokens: Annotated[int, Meta(ge=0)] = 0
    admit_by: Seconds | None = None


class RemoteSendBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
    """Produce KV of `[begin, end)` on this engine and push it to `address`; by default all that is awaited."""

    address: Address
    begin: int | None = None
    end: int | None = None


class StartGenerateBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
    """Prefill from `begin` and decode. With `lease`: wait for its KV up to `begin` first."""

    begin: int = 0
    sampling: SamplingParams = SamplingParams()
    prior_output: Annotated[int, Meta(ge=0)] = 0
    admit_by: Seconds | None = None
    first_token_by: Seconds | None = None
    lease: Id | None = None
    kv_wait: Seconds | None = None
    stream: bool = False


class CommitBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """What arrived of a lease enters the prefix tree, and the lease ends."""

    lease: Id
    wait: Seconds | None = None
    request_id: Name = ""
    sub_id: Name = ""


class ReleaseBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """End a lease."""

    lease: Id


class ForgoBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """KV of `[begin, end)` will not come: who waits for it computes it."""

    lease: Id
    begin: int
    end: int


class AbortBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """End a sub-request."""

    sub_id: Name


class CacheMatchBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
    """How much of a prompt the prefix tree holds."""


class CachePinBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
    """Keep what is cached of a prompt for `ttl` seconds."""

    ttl: Annotated[float, Meta(gt=0, le=31_536_000)]


class CacheUnpinBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
    """End the pin on the longest pinned prefix of a prompt."""


class CacheEvictBody(_Prompted, forbid_unknown_fields=True, kw_only=True):
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
        sampling=body.sampling,
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


class Microserving:
    """Handlers of the routes above."""

    def __init__(self, core: Core, max_body: int) -> None:
        self._core = core
        self._max_body = max_body
        self._decoders = {name: msgspec.json.Decoder(verb.body) for name, verb in VERBS.items()}

    async def engines(self, exchange: Exchange) -> None:
        """Every engine that the router knows."""
        await exchange.answer(_json({"engines": [_plain(each) for each in self._core.fleet.snapshot()]}))

    async def engine(self, exchange: Exchange) -> None:
        """One engine, as it describes itself now."""
        await exchange.answer(_json(_plain(await _whole(self._call(exchange, messages.Info())))))

    async def verb(self, exchange: Exchange) -> None:
        """One call on one engine."""
        name = exchange.scope["path_params"]["verb"]
        verb = VERBS.get(name)
        if verb is None:
            raise NotFound(f"there is no verb {name!r}; there are: {', '.join(VERBS)}")
        body = parse.parse(self._decoders[name], await exchange.body(self._max_body) or b"{}")
        stream = self._call(exchange, verb.make(body, await self._prompt(exchange, body)))
        exchange.watch(stream.cancel)
        try:
            if isinstance(body, StartGenerateBody):
                await (_events if body.stream else _generated)(exchange, stream)
                return
            answer = _plain(await _whole(stream))
            if name == "prep_recv":
                answer = answer["address"]
            await _answer(exchange, answer)
        finally:
            stream.cancel()

    def _call(self, exchange: Exchange, body: EngineVerb) -> CallStream:
        return self._core.engine_call(exchange.scope["path_params"]["id"], body)

    async def _prompt(self, exchange: Exchange, body: Struct) -> Prompt:
        if not isinstance(body, _Prompted):
            return b""
        if (body.prompt is None) == (body.text is None):
            if body.prompt is None and isinstance(body, CacheEvictBody):
                return b""
            raise InvalidRequest("exactly one of 'prompt' and 'text' is required", param="prompt")
        if body.prompt is not None:
            return pack_tokens(body.prompt)
        engine_id = exchange.scope["path_params"]["id"]
        model = next((link.info.model.name for link in self._core.fleet.links if link.id == engine_id), None)
        if model is None:
            raise NotFound(f"there is no engine {engine_id!r}", param="engine_id")
        return pack_tokens(await self._core.text_model(model).aencode(body.text or ""))

    async def openapi(self, exchange: Exchange) -> None:
        """What can be called, for machines."""
        await exchange.answer(_json(describe()))

    async def docs(self, exchange: Exchange) -> None:
        """What can be called, for people."""
        await exchange.answer(docs_page(), content_type=b"text/html; charset=utf-8")


async def _whole(stream: CallStream) -> Struct:
    async for part in stream:
        raise ProtocolError(f"an engine streamed {type(part).__name__} where one answer is due")
    return stream.reply


async def _generated(exchange: Exchange, stream: CallStream) -> None:
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async for part in stream:
        if not isinstance(part, messages.Tokens):
            raise ProtocolError(f"an engine streamed {type(part).__name__} instead of tokens")
        tokens += unpack_tokens(part.ids).tolist()
        logprobs += part.logprobs or ()
    await _answer(exchange, _end(stream, tokens, logprobs or None))


async def _events(exchange: Exchange, stream: CallStream) -> None:
    """Nothing is sent before the first token, so what fails before is an answer with a status of its own."""
    exchange.keep_alive()
    async for part in stream:
        if not isinstance(part, messages.Tokens):
            raise ProtocolError(f"an engine streamed {type(part).__name__} instead of tokens")
        event: dict[str, Any] = {"tokens": unpack_tokens(part.ids).tolist()}
        if part.logprobs is not None:
            event["logprobs"] = [_plain_value(each) for each in part.logprobs]
        await exchange.events(_event(event), more=True)
    await exchange.events(_event(_end(stream, [], None)) + DONE, more=False)


def _end(stream: CallStream, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> dict[str, Any]:
    end = stream.reply
    if not isinstance(end, messages.Generated):
        raise ProtocolError(f"an engine ended a generation with {type(end).__name__}")
    answer = _plain(end) | {"tokens": tokens}
    if logprobs is not None:
        answer["logprobs"] = [_plain_value(each) for each in logprobs]
    return answer


async def _answer(exchange: Exchange, answer: dict[str, Any]) -> None:
    if exchange.gone:
        raise ClientGone
    await exchange.answer(_json(answer))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _plain(struct: Struct) -> dict[str, Any]:
    """A message as JSON takes it: every field, token ids and page numbers as lists."""
    return {name: _plain_value(value) for name, value in msgspec.structs.asdict(struct).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Struct):
        return _plain(value)
    if isinstance(value, bytes):
        return unpack_tokens(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain_value(each) for each in value]
    return value


# --- what it knows of itself ---------------------------------------------------------------------------------------


class ErrorDetail(Struct):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct):
    """Every error: 400 invalid_request, 404 not_found or lease_not_found, 409 conflict, stale_epoch or layout_mismatch,
    429 busy, 499 cancelled, 502 peer_lost or transfer_failed, 503 draining, 504 deadline_exceeded."""

    error: ErrorDetail


def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    types = [*(verb.body for verb in VERBS.values()), *(verb.answer for verb in VERBS.values()), ErrorBody]
    kinds = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    ref = dict(zip(kinds, schemas, strict=True))
    for schema in components.values():
        # The tag is the bus's; and bytes are lists here.
        schema.get("properties", {}).pop("t", None)
        if "t" in schema.get("required", ()):
            schema["required"].remove("t")
        for field in schema.get("properties", {}).values():
            if field.get("contentEncoding") == "base64":
                field.clear()
                field.update({"type": "array", "items": {"type": "integer"}})

    def json_of(schema: Any) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": schema}}}

    failure = {"description": "An error", **json_of(ref[ErrorBody])}
    engine = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, Any] = {
        f"{ROOT}/engines": {"get": {"summary": "Every engine", "responses": {"200": {"description": "Engines"}}}},
        f"{ROOT}/engines/{{id}}": {
            "get": {
                "summary": "One engine",
                "parameters": [engine],
                "responses": {"200": {"description": "It", **json_of(ref[messages.InfoReply])}, "default": failure},
            }
        },
    }
    for name, verb in VERBS.items():
        paths[f"{ROOT}/engines/{{id}}/{name}"] = {
            "post": {
                "operationId": name,
                "summary": (verb.body.__doc__ or "").split("\n")[0],
                "parameters": [engine],
                "requestBody": json_of(ref[verb.body]),
                "responses": {"200": {"description": "Done", **json_of(ref[verb.answer])}, "default": failure},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "microserve: the engines' verbs", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }


def docs_page() -> bytes:
    """A page without scripts, made of the same description."""
    document = describe()
    schemas = document["components"]["schemas"]
    rows = []
    for path, methods in document["paths"].items():
        for method, what in methods.items():
            fields = ""
            body = what.get("requestBody")
            if body is not None:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                known, needed = schemas[name].get("properties", {}), schemas[name].get("required", ())
                fields = "".join(
                    f"<li><code>{field}</code>{' (required)' if field in needed else ''}: {_kind(schema)}</li>"
                    for field, schema in known.items()
                )
            rows.append(
                f"<h2><code>{method.upper()} {path}</code></h2><p>{what['summary']}</p>"
                + (f"<ul>{fields}</ul>" if fields else "")
            )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>microserving</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        "code{background:#eee;padding:.1em .3em}h2{font-size:1.05rem;margin-top:2rem}</style>"
        "<h1>The engines' verbs</h1><p>Bodies are JSON objects. Machines read "
        f"<a href='{ROOT}/openapi.json'>openapi.json</a>. {ErrorBody.__doc__}</p>" + "".join(rows) + "</html>"
    ).encode()


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))
