"""The router's HTTP door: routes, request ids, and one place where every error becomes OpenAI's shape."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from microserve.router.admin import AdminPages
from microserve.router.http_auth import HttpAuth
from microserve.router.microserving.endpoints import Microserving
from microserve.router.microserving.verbs import ROOT
from microserve.router.openai import parse
from microserve.router.openai.endpoints import Core, Endpoints
from microserve.router.openai.errors import MethodNotAllowed, NoSuchRoute
from microserve.router.openai.exchange import ClientGone, Exchange
from microserve.router.openai.requests import DetokenizeRequest, TokenizeRequest
from microserve.router.openai.responses import encode
from microserve.runtime.errors import InternalError, InvalidRequest, MicroserveError
from microserve.runtime.ids import IdSource
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from microserve.router.http_auth import Needs
    from microserve.router.metrics import RouterMetrics
    from microserve.runtime.messages import ModelInfo

    Handler = Callable[[Exchange], Awaitable[None]]

KEEP_ALIVE_SECONDS = 15.0

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_log = get_logger(__name__)


class _Door:
    """Runs a handler as an ASGI application, for who may. Every answer has a request id; no exception leaves it."""

    def __init__(
        self,
        handler: Handler,
        ids: IdSource,
        keep_alive: float,
        auth: HttpAuth,
        metrics: RouterMetrics,
        needs: Needs,
    ) -> None:
        self._handler = handler
        self._metrics = metrics
        self._ids = ids
        self._keep_alive = keep_alive
        self._auth = auth
        self._needs = needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, keep_alive=self._keep_alive)
        given = exchange.header(b"x-request-id")
        name = given.decode() if given is not None and _SANE_ID.fullmatch(given) else self._ids.next()
        exchange.name(name)
        try:
            with self._auth.admitted(exchange, self._needs):
                await self._handler(exchange)
        except ClientGone:
            return
        except MicroserveError as error:
            self._metrics.http_error(error.code)
            if error.http_status >= 500:
                _log.warning("request failed", every=1.0, request=name, code=error.code, error=error.message)
            if not exchange.gone:
                await exchange.refuse(error)
        except Exception:  # a bug must not cost more than its own request
            self._metrics.http_error(InternalError.code)
            _log.exception("request failed", every=1.0, request=name)
            if not exchange.gone:
                await exchange.refuse(InternalError(f"internal error; the router's log has it under {name}"))
        finally:
            exchange.close()


class _Pages:
    """Everything that is not generation."""

    def __init__(self, core: Core, max_body: int) -> None:
        self._core = core
        self._max_body = max_body
        self._created = int(time.time())
        self._tokenize = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize = msgspec.json.Decoder(DetokenizeRequest)

    async def models(self, exchange: Exchange) -> None:
        data = [self._entry(model) for model in self._core.models()]
        await exchange.answer(encode({"object": "list", "data": data}))

    async def model(self, exchange: Exchange) -> None:
        if not exchange.scope["path_params"]["name"]:
            await self.models(exchange)
            return
        model = self._core.model(exchange.scope["path_params"]["name"])
        await exchange.answer(encode(self._entry(model)))

    def _entry(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "microserve",
            "max_model_len": model.max_context,
            "revision": model.revision,
            "architecture": model.architecture,
        }

    async def tokenize(self, exchange: Exchange) -> None:
        request = parse.parse(self._tokenize, await exchange.body(self._max_body))
        model = self._core.model(request.model or "")
        text = self._core.text_model(request.model or "")
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("exactly one of 'prompt' and 'messages' is required", param="prompt")
        if request.messages is not None:
            continued = bool(request.continue_final_message)
            prompt = text.render_chat(
                parse.conversation(request.messages),
                add_generation_prompt=not continued
                if request.add_generation_prompt is None
                else request.add_generation_prompt,
                continue_final_message=continued,
            )
            special = bool(request.add_special_tokens)
        else:
            prompt = request.prompt or ""
            special = request.add_special_tokens is not False
        tokens: list[int] = (await text.aencode(prompt, special)).tolist()
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": model.max_context, "tokens": tokens}
        if request.return_token_strs:
            answer["token_strs"] = [text.token_text(token) for token in tokens]
        await exchange.answer(encode(answer))

    async def detokenize(self, exchange: Exchange) -> None:
        request = parse.parse(self._detokenize, await exchange.body(self._max_body))
        model = self._core.model(request.model or "")
        text = self._core.text_model(request.model or "")
        tokens = parse.token_array(request.tokens, model.vocab_size, "tokens")
        await exchange.answer(encode({"prompt": text.decode(tokens, skip_special_tokens=False)}))

    async def health(self, exchange: Exchange) -> None:
        """The process lives and its loop turns."""
        await exchange.answer(b'{"status":"ok"}')

    async def ready(self, exchange: Exchange) -> None:
        """Whether a request would be taken now, and if not, why."""
        reasons = []
        if self._core.draining:
            reasons.append("the router is draining")
        if not self._core.ready and not reasons:
            reasons.append("no engine is ready")
        if self._core.full:
            reasons.append("all places are taken, and the queue is full")
        answer = {"ready": not reasons, "reasons": reasons, "models": [model.name for model in self._core.models()]}
        await exchange.answer(encode(answer), status=503 if reasons else 200)

    async def metrics(self, exchange: Exchange) -> None:
        # A collector is all that rendering asks of a registry.
        body = generate_latest(self._core.metrics)
        await exchange.answer(body, content_type=CONTENT_TYPE_LATEST.encode())


def make_app(core: Core, *, keep_alive: float = KEEP_ALIVE_SECONDS, auth: HttpAuth | None = None) -> Starlette:
    """The application over `core`. A silent stream gets a comment every `keep_alive` seconds.

    `auth` says who may call what; None: everybody everything.
    """
    guard = auth if auth is not None else HttpAuth(None)
    max_body = core.config.max_body_bytes
    ids = IdSource("req")
    endpoints = Endpoints(core, max_body=max_body)
    pages = _Pages(core, max_body)
    admin = AdminPages(core, max_body)
    verbs = Microserving(core, max_body)

    def route(path: str, method: str, handler: Handler, needs: Needs = "a key") -> Route:
        return Route(path, _Door(handler, ids, keep_alive, guard, core.metrics, needs), methods=[method])

    def door(path: str, needs: Needs, **handlers: Handler) -> list[Route]:
        """One path that serves several methods."""

        async def by_method(exchange: Exchange) -> None:
            # HEAD comes with GET.
            method = exchange.scope["method"]
            await handlers["GET" if method == "HEAD" else method](exchange)

        return [Route(path, _Door(by_method, ids, keep_alive, guard, core.metrics, needs), methods=list(handlers))]

    async def refuse(request: Request, error: MicroserveError, allowed: str = "") -> None:
        async def handler(exchange: Exchange) -> None:
            if allowed:
                exchange.headers.append((b"allow", allowed.encode()))
            raise error

        await _Door(handler, ids, keep_alive, guard, core.metrics, "nothing")(
            request.scope, request.receive, request._send
        )

    async def not_found(request: Request, _error: Exception) -> None:
        await refuse(request, NoSuchRoute(f"{request.method} {request.url.path}: there is nothing here"))

    async def not_allowed(request: Request, error: Exception) -> None:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        await refuse(request, MethodNotAllowed(f"{request.url.path} serves {allowed}, not {request.method}"), allowed)

    app = Starlette(
        routes=[
            route("/v1/chat/completions", "POST", endpoints.chat),
            route("/v1/completions", "POST", endpoints.completions),
            route("/v1/models", "GET", pages.models),
            route("/v1/models/{name:path}", "GET", pages.model),
            route("/tokenize", "POST", pages.tokenize),
            route("/detokenize", "POST", pages.detokenize),
            route("/health", "GET", pages.health, "nothing"),
            route("/ready", "GET", pages.ready, "nothing"),
            route("/metrics", "GET", pages.metrics, "nothing" if core.config.metrics_open else "a key"),
            *door("/admin/strategies", "admin", GET=admin.strategies, PUT=admin.set),
            route("/admin/strategies/rollback", "POST", admin.roll_back, "admin"),
            route(f"{ROOT}/engines", "GET", verbs.engines),
            route(f"{ROOT}/engines/{{id}}", "GET", verbs.engine),
            route(f"{ROOT}/engines/{{id}}/{{verb}}", "POST", verbs.verb, "admin"),
            route(f"{ROOT}/openapi.json", "GET", verbs.openapi, "nothing"),
            route(f"{ROOT}/docs", "GET", verbs.docs, "nothing"),
        ],
        exception_handlers={404: not_found, 405: not_allowed},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False
    return app
