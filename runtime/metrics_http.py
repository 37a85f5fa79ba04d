"""`/metrics`, `/health` and `/ready` of a daemon that serves no other HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from typing import TYPE_CHECKING

import uvicorn

from microserve.runtime.errors import AddressError, ConfigError
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from starlette.types import Receive, Scope, Send

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What Prometheus calls its text format."""
_JSON = "application/json"

_log = get_logger(__name__)


class MetricsHttp:
    """A small server on the running loop. `metrics` makes a scrape, and is None while there is nothing to tell;
    `reasons` says why a request would not be served now, empty when it would. Both may be set anew at any time."""

    def __init__(self, metrics: Callable[[], Awaitable[bytes]] | None, reasons: Callable[[], list[str]]) -> None:
        self.metrics = metrics
        self.reasons = reasons
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self, host: str, port: int) -> None:
        """Begins to serve; port 0 takes a free one. Raises `ConfigError` when the address cannot be had."""
        sock = bind(host, port)
        name, number = sock.getsockname()[:2]
        self.url = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            proxy_headers=False,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="metrics http")

    async def close(self) -> None:
        """Idempotent."""
        server, self._server = self._server, None
        if server is not None and self._task is not None:
            server.should_exit = True
            await self._task

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, kind, body = await self._answer(scope["method"], scope["path"])
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        if method not in ("GET", "HEAD"):
            return 405, _JSON, _error(f"{path} serves GET, not {method}")
        match path:
            case "/metrics":
                if self.metrics is None:
                    return 503, _JSON, _error("; ".join(self.reasons()))
                try:
                    return 200, METRICS_TYPE, await self.metrics()
                except Exception:  # a bug here must not look like an engine that is gone
                    _log.exception("metrics failed", every=60.0)
                    return 500, _JSON, _error("the log says more")
            case "/health":
                # Whoever reads this knows that the event loop turns.
                return 200, _JSON, b'{"status":"ok"}'
            case "/ready":
                reasons = self.reasons()
                return (503 if reasons else 200), _JSON, json.dumps({"ready": not reasons, "reasons": reasons}).encode()
            case _:
                return 404, _JSON, _error("there is nothing here; there are /metrics, /health and /ready")


class _Server(uvicorn.Server):
    """In our loop; signals are the service's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `ConfigError` for a host that is none, `AddressError` for what cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:  # names that are none are refused in both ways
        why = error.strerror if isinstance(error, OSError) else "it is no name of a host"
        raise ConfigError(f"metrics_host: {host!r} is not an address: {why}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Here, not later: so that a port that another process holds is found out now.
        sock.listen()
    except OSError as error:
        sock.close()
        what = f"cannot serve metrics at {host}:{port}: {error.strerror} (metrics_host, metrics_port)"
        raise AddressError(what) from error
    sock.setblocking(False)
    return sock


def _error(text: str) -> bytes:
    return json.dumps({"error": text}).encode()
