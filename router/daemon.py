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
from microserve.router.http_auth import HttpAuth
from microserve.router.metrics import RouterMetrics
from microserve.router.reload import router_reload
from microserve.router.strategies.catalog import Sources
from microserve.router.text import TextModel
from microserve.router.tls import load_certificate
from microserve.router.versions import Versions
from microserve.runtime.api_keys import ApiKeys
from microserve.runtime.config import RouterConfig, config_from_args, default_process_id
from microserve.runtime.errors import AddressError, ConfigError, InternalError, InvalidRequest
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.keys import check_exposed, identity_name, is_loopback, load_security
from microserve.runtime.log import get_logger, last_words, setup_logging
from microserve.runtime.service import EXIT_CONFIG, run_service
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from starlette.applications import Starlette

    from microserve.router.strategies.catalog import Catalog
    from microserve.router.strategy import Program
    from microserve.router.tls import Certificate
    from microserve.runtime.ids import Epoch
    from microserve.runtime.service import Lifecycle

_BACKLOG = 2048
_LOOK_EVERY = 0.5
"""Seconds between looks at the files of API keys and of the certificate."""
_LAST_RESPONSES = 5
"""Seconds that HTTP responses get to be flushed once nothing runs any more."""

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `microserve router`; its exit code."""
    read = partial(
        config_from_args,
        RouterConfig,
        sys.argv[1:] if argv is None else argv,
        prog="microserve router",
        description="Serve the OpenAI API and the bus in front of a fleet of engines.",
    )
    try:
        config = read()
    except ConfigError as error:
        last_words("microserve router", error.message)
        return EXIT_CONFIG
    # One text at a time: handing it to a pool of threads and back costs more than it saves.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    router_id = config.router_id or identity_name(config.key_file) or default_process_id()
    epoch = new_epoch()

    def log_as(config: RouterConfig) -> None:
        setup_logging(config.log_level, config.log_json, f"router:{router_id}", epoch=epoch)

    log_as(config)
    work = partial(serve, config, router_id, epoch=epoch, read=read, relog=log_as)
    return run_service(work, name="microserve router")


async def serve(
    config: RouterConfig,
    router_id: str,
    lifecycle: Lifecycle,
    *,
    epoch: Epoch | None = None,
    read: Callable[[], RouterConfig] | None = None,
    relog: Callable[[RouterConfig], object] = lambda config: None,
) -> None:
    """Runs a router until `lifecycle` drains. Raises `ConfigError` for a wrong setting or an address that is taken.

    `read` reads the configuration again, for a reload; `relog` sets up logging as a new one says.
    """
    security = load_security(config.key_file)
    check_exposed([("bind", config.bind)], secured=security is not None, insecure=config.insecure)
    api_keys = ApiKeys(Path(config.api_keys_file)) if config.api_keys_file else None
    certificate = load_certificate(config)
    check_http_exposed(config)
    # In a thread: files of strategies may take long, and signals need not wait.
    versions = await asyncio.to_thread(load_versions, config)
    http = bind_http(config.http_host, config.http_port)
    bus = ZmqBus(Peer("router", router_id, new_epoch() if epoch is None else epoch), security=security)
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
        api = RouterApi(core, ring=security.ring if security is not None else None)
        auth = HttpAuth(api_keys, refused=core.http_refused)
        server = _HttpServer(_http_config(config, make_app(core, auth=auth), certificate))
        try:
            listener = await bus.listen(config.bind, api.server)
            core.start()
            core.http_url = url_of(http, "http" if certificate is None else "https")
            serving = asyncio.create_task(server.serve(sockets=[http]), name="http")
            watching = asyncio.create_task(_watch_files(auth, certificate), name="keys")
            try:
                _freeze()
                _log.info("ready", bus=listener.endpoint, http=core.http_url, strategy=core.versions.default.version)
                if read is not None:
                    lifecycle.reload = router_reload(core, read, relog, server.keep_alive)
                lifecycle.drain_limit = lambda: core.config.drain_timeout
                lifecycle.ready(partial(_status_line, core))
                await _until_drained(lifecycle, core, serving)
            finally:
                watching.cancel()
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


async def _until_drained(lifecycle: Lifecycle, core: RouterCore, serving: asyncio.Task[None]) -> None:
    draining = asyncio.create_task(lifecycle.draining.wait(), name="drain")
    try:
        await asyncio.wait({draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise InternalError("the HTTP server stopped")
    finally:
        draining.cancel()
    core.drain()
    status = core.status()
    running = status.active_requests + status.queued_requests
    _log.info("finishing what runs; new requests are refused", requests=running)
    limit = core.config.drain_timeout
    if await lifecycle.wait_drained(core.wait_idle(), limit):
        _log.info("drained", requests=running)
    else:
        _log.warning("drain took too long; what still runs is cut off", seconds=limit)


def load_versions(config: RouterConfig) -> Versions:
    """What serves at the start: the configured strategy, or what was set before the last restart. Raises `ConfigError`.

    Waits for the files of strategies.
    """
    sources = Sources(Path(config.strategy_folder) if config.strategy_folder else None)
    store = Path(config.state_folder) / "strategies.json" if config.state_folder else None
    return Versions(load_program(config, sources.load()), sources, store=store)


def load_program(config: RouterConfig, catalog: Catalog) -> Program:
    """The configured strategy with its settings. Raises `ConfigError`; tells of strategies that could not be loaded."""
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
        raise AddressError(f"cannot serve HTTP at {host}:{port}: {error.strerror} (http_host, http_port)") from error
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """The base URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_http_exposed(config: RouterConfig) -> None:
    """Raises `ConfigError` when other machines can reach HTTP, and there are no keys, or they travel in clear text."""
    if config.insecure or is_loopback(config.http_host):
        return
    where = f"http_host = {config.http_host!r} can be reached from other machines"
    if not config.api_keys_file:
        raise ConfigError(
            f"{where}, and nothing would ask them who they are: make keys ('microserve keys api new') and set "
            "api_keys_file, tls_cert and tls_key, or say --insecure"
        )
    if config.tls_cert is None:
        raise ConfigError(
            f"{where}, and API keys would travel in clear text: set tls_cert and tls_key, or say --insecure"
        )


async def _watch_files(auth: HttpAuth, certificate: Certificate | None) -> None:
    while True:
        await asyncio.sleep(_LOOK_EVERY)
        try:
            auth.look()
            if certificate is not None:
                certificate.look()
        except Exception:  # a bug must not end the watch: no key could be revoked any more
            _log.exception("keys and certificate were not looked at", every=60.0)


class _HttpServer(uvicorn.Server):
    """A uvicorn server in our loop; signals are the service's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def keep_alive(self, seconds: float) -> None:
        """How long connections stay open while nothing is asked, from the next one on."""
        self.config.timeout_keep_alive = _whole(seconds)


def _whole(seconds: float) -> int:
    return max(1, round(seconds))


def _http_config(config: RouterConfig, app: Starlette, certificate: Certificate | None) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    http = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_whole(config.keep_alive),
        timeout_graceful_shutdown=_LAST_RESPONSES,
        backlog=_BACKLOG,
    )
    if certificate is not None:
        # Ours, and not one that uvicorn makes: it can be given another certificate while it is in use.
        http.load()
        http.ssl = certificate.context
    return http


def _freeze() -> None:
    # What start-up made lives as long as the process: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
