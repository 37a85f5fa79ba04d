"""What the verbs over HTTP say of themselves: an OpenAPI description for machines, and a page for people."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from microserve.router.microserving.verbs import ROOT, VERBS, GeneratedBody
from microserve.runtime import messages


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


class EnginesBody(Struct):
    """Every engine that the router knows, as it last described itself."""

    engines: list[messages.FleetEngine]


class TokensEvent(Struct):
    """An event of `start_generate`: the next tokens. `logprobs` where they were asked for."""

    tokens: list[int]
    logprobs: list[messages.TokenLogprobs] | None = None


def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies, answers = [verb.body for verb in VERBS.values()], [verb.answer for verb in VERBS.values()]
    kinds = list(dict.fromkeys([*bodies, *answers, ErrorBody, EnginesBody, messages.InfoReply, TokensEvent]))
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

    events = {
        "type": "string",
        "contentMediaType": "text/event-stream",
        "contentSchema": {"anyOf": [ref[TokensEvent], ref[GeneratedBody], ref[ErrorBody]]},
        "description": 'With `"stream": true`. Each event is `data: ` and a JSON object: tokens, again and again; then '
        "the end, without tokens of its own, and `data: [DONE]`. A failure before the first token is an answer with "
        "its own status, and a later one is the last event, an error.",
    }
    failure = {"description": "An error", **json_of(ref[ErrorBody])}
    engine = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, Any] = {
        f"{ROOT}/engines": {
            "get": {
                "operationId": "engines",
                "summary": "Every engine",
                "responses": {"200": {"description": "Engines", **json_of(ref[EnginesBody])}, "default": failure},
            }
        },
        f"{ROOT}/engines/{{id}}": {
            "get": {
                "operationId": "engine",
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
                "requestBody": {"required": verb.needs_body, **json_of(ref[verb.body])},
                "responses": {"200": {"description": "Done", **json_of(ref[verb.answer])}, "default": failure},
            }
        }
    streamed = paths[f"{ROOT}/engines/{{id}}/start_generate"]["post"]["responses"]["200"]
    streamed["content"]["text/event-stream"] = {"schema": events}
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
