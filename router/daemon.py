"""The router process: bus and HTTP on one event loop, drained on the first signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CollectorRegistry

import microserve
from microserve.router.bus_api import RouterApi
from microserve.router.core import RouterCore
from microserve.router.http import make_app
from microserve.router.metrics import RouterMetrics
from microserve.router.strategies.catalog import load_catalog
from microserve.router.text import TextModel
from microserve.router.versions import Versions
from microserve.runtime.config import RouterConfig, config_from_args, default_process_id
from microserve.runtime.errors import ConfigError, InvalidRequest
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.keys import check_exposed, identity_name, load_security
from microserve.runtime.log import get_logger, setup_logging
from microserve.runtime.service import EXIT_CONFIG, run_service
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from microserve.router.strategy import Program
    from microserve.runtime.service import Lifecycle

_BACKLOG = 2048
_LAST_RESPONSES = 5
"""Seconds that HTTP responses get to be flushed once nothing runs any more."""

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `microserve router`; its exit code."""
    try:
        config = config_from_args(
            RouterConfig,
            sys.argv[1:] if argv is None else argv,
            prog="microserve router",
            description="Serve the OpenAI API and the bus in front of a fleet of engines.",
        )
    except ConfigError as error:
        print(f"microserve router: error: {error.message}", file=sys.stderr)
        return EXIT_CONFIG
    # One text at a time: handing it to a pool of threads and back costs more than it saves.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    router_id = config.router_id or identity_name(config.key_file) or default_process_id()
    setup_logging(config.log_level, config.log_json, f"router:{router_id}")
    return run_service(partial(serve, config, router_id), name="microserve router")


async def serve(config: RouterConfig, router_id: str, lifecycle: Lifecycle) -> None:
    """Runs a router until `lifecycle` drains. Raises `ConfigError` for a wrong setting or an address that is taken."""
    security = load_security(config.key_file)
    check_exposed([("bind", config.bind)], secured=security is not None, insecure=config.insecure)
    # HTTP has no keys yet, so only whoever says that it is meant may open it to others.
    check_exposed([("http_host", config.http_host)], secured=False, insecure=config.insecure)
    versions = load_versions(config)
    http = bind_http(config.http_host, config.http_port)
    bus = ZmqBus(Peer("router", router_id, new_epoch()), security=security)
    with contextlib.closing(http):
        registry = CollectorRegistry()
        core = RouterCore(
            config,
            bus,
            versions,
            metrics=RouterMetrics(registry),
            load_text=TextModel.load,
            version=microserve.__version__,
        )
        api = RouterApi(core)
        server = _HttpServer(_http_config(config, core))
        try:
            listener = await bus.listen(config.bind, api.server)
            core.start()
            core.http_url = url_of(http)
            serving = asyncio.create_task(server.serve(sockets=[http]), name="http")
            try:
                _freeze()
                _log.info("ready", bus=listener.endpoint, http=core.http_url, strategy=core.versions.default.version)
                lifecycle.ready(partial(_status_line, core))
                await _until_drained(config, lifecycle, core, serving)
            finally:
                await core.close()
                await api.close()
                server.should_exit = True
                await serving
        finally:
            await core.close()
            await bus.close()


def _status_line(core: RouterCore) -> str:
    """What `systemctl status` shows."""
    status = core.status()
    ready = sum(engine.state == "ready" for engine in status.engines)
    requests = f"{status.active_requests} requests running, {status.queued_requests} queued"
    return f"{ready} of {len(status.engines)} engines ready: {requests}, {status.strategy}"


async def _until_drained(
    config: RouterConfig, lifecycle: Lifecycle, core: RouterCore, serving: asyncio.Task[None]
) -> None:
    draining = asyncio.create_task(lifecycle.draining.wait(), name="drain")
    try:
        await asyncio.wait({draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise ConfigError("the HTTP server stopped")
    finally:
        draining.cancel()
    core.drain()
    status = core.status()
    running = status.active_requests + status.queued_requests
    _log.info("finishing what runs; new requests are refused", requests=running)
    if await lifecycle.wait_drained(core.wait_idle(), config.drain_timeout):
        _log.info("drained", requests=running)
    else:
        _log.warning("drain took too long; what still runs is cut off", seconds=config.drain_timeout)


def load_versions(config: RouterConfig) -> Versions:
    """What serves at the start: the configured strategy, or what was set before the last restart."""
    folder = Path(config.strategy_folder) if config.strategy_folder else None
    store = Path(config.state_folder) / "strategies.json" if config.state_folder else None
    return Versions(load_program(config), partial(load_catalog, folder), store=store)


def load_program(config: RouterConfig) -> Program:
    """The configured strategy with its settings. Raises `ConfigError`; tells of strategies that could not be loaded."""
    catalog = load_catalog(Path(config.strategy_folder) if config.strategy_folder else None)
    for problem in catalog.problems:
        _log.error("strategy cannot be used", problem=str(problem))
    try:
        return catalog.get(config.strategy).configure(config.strategy_settings)
    except InvalidRequest as error:
        raise ConfigError(f"strategy_settings: {error.message}") from error


def bind_http(host: str, port: int) -> socket.socket:
    """A bound socket for the HTTP server; port 0 takes a free one. Raises `ConfigError` that says what is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"http_host: {host!r} is not an address: {error.strerror}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Here, not later: so that a port that another process holds is found out now.
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot serve HTTP at {host}:{port}: {error.strerror} (http_host, http_port)") from error
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """The base URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _HttpServer(uvicorn.Server):
    """A uvicorn server in our loop; signals are the service's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_config(config: RouterConfig, core: RouterCore) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return uvicorn.Config(
        make_app(core),
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=max(1, round(config.keep_alive)),
        timeout_graceful_shutdown=_LAST_RESPONSES,
        backlog=_BACKLOG,
    )


def _freeze() -> None:
    # What start-up made lives as long as the process: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
