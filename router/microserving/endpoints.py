"""The engines' verbs over HTTP, for people with `curl` and programs in other languages.

    GET  /microserving/v1/engines                      every engine, with its load
    GET  /microserving/v1/engines/{id}                 one of them, with its links to others
    POST /microserving/v1/engines/{id}/{verb}          prep_recv, remote_send, start_generate, commit …
    GET  /microserving/v1/openapi.json, /docs          what this module knows of itself

Bodies have the names of the bus's messages. A prompt is a list of token ids, or `text`; page numbers are lists.
`start_generate` answers whole, or with `"stream": true` as server-sent events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from microserve.router.microserving.openapi import describe, docs_page
from microserve.router.microserving.verbs import VERBS, CacheEvictBody, Prompt, Prompted, StartGenerateBody
from microserve.router.openai import parse
from microserve.router.openai.exchange import ClientGone
from microserve.router.openai.responses import DONE
from microserve.runtime import messages
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import InvalidRequest, NotFound, ProtocolError

if TYPE_CHECKING:
    from microserve.router.openai.endpoints import Core
    from microserve.router.openai.exchange import Exchange
    from microserve.runtime.messages import EngineVerb, TokenLogprobs
    from microserve.runtime.rpc import CallStream


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
        return self._core.engine_call(exchange.scope["path_params"]["id"], body, by=exchange.caller)

    async def _prompt(self, exchange: Exchange, body: Struct) -> Prompt:
        if not isinstance(body, Prompted):
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
