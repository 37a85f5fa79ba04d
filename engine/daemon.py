"""The engine process: opens the executor, binds the bus, announces itself, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from microserve.engine.core import EngineCore, make_limits
from microserve.engine.fake_executor import FakeExecutor, fake_model
from microserve.engine.limits import sizes
from microserve.engine.link import peer_name
from microserve.engine.progress import Progress
from microserve.engine.reload import engine_reload
from microserve.kv.transfer.factory import open_transport
from microserve.runtime.clock import monotonic
from microserve.runtime.config import EngineConfig, config_from_args, default_process_id
from microserve.runtime.errors import ConfigError, Draining, InternalError, MicroserveError
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.keys import check_exposed, identity_name, is_loopback, load_security
from microserve.runtime.log import get_logger, last_words, setup_logging
from microserve.runtime.membership import Announcer
from microserve.runtime.messages import EngineEvent, EngineInfo
from microserve.runtime.service import EXIT_CONFIG, run_service
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from microserve.engine.executor import Executor
    from microserve.engine.scheduler import Scheduler
    from microserve.kv.transfer.base import Transport
    from microserve.runtime.bus import Bus, Publisher
    from microserve.runtime.ids import Epoch
    from microserve.runtime.messages import StatsReply
    from microserve.runtime.metrics_http import MetricsHttp
    from microserve.runtime.service import Lifecycle

_EVENT_INTERVAL = 1.0
"""Seconds between published loads."""

_STATS_LIMIT = 2.0
"""Seconds that a scrape waits for the step thread."""

_DRAIN_LOOK = 0.05
"""Seconds between looks at whether a draining engine is done."""

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `microserve engine`; its exit code."""
    read = partial(
        config_from_args,
        EngineConfig,
        sys.argv[1:] if argv is None else argv,
        prog="microserve engine",
        description="Serve one model replica: token ids in, token ids out, over the bus.",
    )
    try:
        config = read()
    except ConfigError as error:
        last_words("microserve engine", error.message)
        return EXIT_CONFIG
    engine_id = config.engine_id or identity_name(config.key_file) or default_process_id()
    epoch = new_epoch()

    def log_as(config: EngineConfig) -> None:
        setup_logging(config.log_level, config.log_json, f"engine:{engine_id}", epoch=epoch)

    log_as(config)
    work = partial(serve, config, engine_id, epoch=epoch, ready=_freeze, read=read, relog=log_as)
    return run_service(work, name="microserve engine")


async def serve(
    config: EngineConfig,
    engine_id: str,
    lifecycle: Lifecycle,
    *,
    epoch: Epoch | None = None,
    ready: Callable[[], object] = lambda: None,
    read: Callable[[], EngineConfig] | None = None,
    relog: Callable[[EngineConfig], object] = lambda config: None,
) -> None:
    """Runs an engine until `lifecycle` drains; calls `ready` when it serves.

    `read` reads the configuration again, for a reload; `relog` sets up logging as a new one says.

    Raises `ConfigError`, `CheckpointError`, or `InternalError` after a crash.
    """
    began = monotonic()
    epoch = new_epoch() if epoch is None else epoch
    # Before seconds are spent on a checkpoint.
    make_limits(config, config.max_context or 2)
    security = load_security(config.key_file)
    exposed = [("bind", config.bind), ("events_bind", config.events_bind)]
    check_exposed(exposed, secured=security is not None, insecure=config.insecure)
    if config.metrics_port is not None and not config.insecure and not is_loopback(config.metrics_host):
        raise ConfigError(
            f"metrics_host = {config.metrics_host!r} can be reached from other machines, and no keys guard /metrics: "
            "read it on this machine, or say --insecure (the bus keeps asking for keys where key_file is set)"
        )
    progress = Progress(bars=sys.stderr.isatty())
    async with _http(config, progress) as http:
        opened = await _open_unless_draining(config, peer_name(engine_id, epoch), lifecycle, progress)
        if opened is None:
            return
        sized, executor, transport = opened
        bus = ZmqBus(Peer("engine", engine_id, epoch), security=security)
        engine = Engine(sized, engine_id, epoch, executor, transport, bus)
        try:
            await engine.start()
            if http is not None:
                http.metrics, http.reasons = engine.metrics, engine.not_ready
            ready()
            info = engine.info()
            _log.info(
                "ready",
                endpoint=info.endpoint,
                model=info.model.name,
                executor=info.executor,
                pages=executor.total_pages,
                page_size=info.layout.page_size,
                max_context=engine.scheduler.max_context,
                max_running=engine.scheduler.limits.max_running,
                step_tokens=engine.scheduler.limits.step_tokens,
                transport=transport.name if transport is not None else "none",
                seconds=round(monotonic() - began, 2),
            )
            if read is not None:
                lifecycle.reload = engine_reload(engine, config, read, relog)
            lifecycle.drain_limit = lambda: engine.config.drain_timeout
            lifecycle.healthy = engine.moves
            lifecycle.ready(partial(_status_line, engine))
            await engine.run(lifecycle)
        finally:
            if http is not None:
                http.metrics, http.reasons = None, lambda: ["the engine is stopping"]
            await engine.stop()
            await bus.close()


@contextlib.asynccontextmanager
async def _http(config: EngineConfig, progress: Progress) -> AsyncIterator[MetricsHttp | None]:
    """`/health` and `/ready`, which answer while a checkpoint loads; `/metrics` from when there are some."""
    if config.metrics_port is None:
        yield None
        return
    # Imported here: an engine whose metrics nobody reads does without a web server.
    from microserve.runtime.metrics_http import MetricsHttp

    http = MetricsHttp(None, lambda: [f"the engine is starting: {progress.look() or 'nothing has moved for minutes'}"])
    await http.start(config.metrics_host, config.metrics_port)
    _log.info("metrics", url=f"{http.url}/metrics")
    try:
        yield http
    finally:
        await http.close()


def _status_line(engine: Engine) -> str:
    """What `systemctl status` shows."""
    if not engine.moves():
        return f"hangs: a step has taken {engine.core.steps.turning_for:.0f} s"
    load = engine.verbs.load()
    used = load.total_pages - load.free_pages - load.cached_pages
    return f"{load.state}: {load.running} running, {load.waiting} waiting, {used} of {load.total_pages} pages in use"


async def _open_unless_draining(
    config: EngineConfig, name: str, lifecycle: Lifecycle, progress: Progress
) -> tuple[EngineConfig, Executor, Transport | None] | None:
    """What takes long, and the configuration with sizes of steps. None: told to end meanwhile."""

    def work() -> tuple[EngineConfig, Executor, Transport | None]:
        spin_little()
        sized = with_sizes(config)
        executor = open_executor(sized, progress)
        with progress.stage("opening the transport"):
            return sized, executor, open_engine_transport(config, executor, name)

    return await lifecycle.open(work, progress.look)


def open_engine_transport(config: EngineConfig, executor: Executor, name: str) -> Transport | None:
    """What carries KV to other engines, or None: an engine without it serves alone.

    Raises `ConfigError` when one was asked for by name, or a kind of link is required.
    """
    try:
        return open_transport(config.transport, executor.memory, name=name, devices=config.ucx_devices)
    except (MicroserveError, OSError, RuntimeError, ImportError) as error:
        if config.transport != "auto" or config.require_link is not None:
            raise ConfigError(f"transport: {config.transport} cannot be opened: {error}") from error
        _log.error("no transport for KV: this engine serves alone", why=error)
        return None


def spin_little() -> None:
    """Before torch is loaded: threads that compute together wait for each other by sleeping, after a short look.

    They would look for milliseconds at every meeting, of which a token of a small model has hundreds. Where another
    process has one of their cores, whoever is waited for does not run meanwhile: a token then takes tenths of a second
    (perf/RESULTS.md, cpu_engine). The user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def with_sizes(config: EngineConfig) -> EngineConfig:
    """`config`, where it says nothing of the size of steps, with what suits the device that computes."""
    memory = 0
    if config.executor in ("auto", "cuda") and None in (config.max_running, config.step_tokens):
        # Imported here: an engine with the fake executor needs no torch.
        from microserve.engine.cuda_open import cuda_device, gpu_bytes

        device = cuda_device(config.device)
        memory = 0 if device is None else gpu_bytes(device)
    return replace(config, **sizes(config, memory)._asdict())


def open_executor(config: EngineConfig, progress: Progress | None = None) -> Executor:
    """The executor that `config` asks for; `progress` is told how far it is."""
    if config.executor == "fake":
        return FakeExecutor(
            config.fake,
            fake_model(config),
            page_size=config.page_size,
            total_pages=config.kv_pages or config.fake.total_pages,
        )
    # Imported here: an engine with the fake executor needs no torch.
    from microserve.engine.cuda_open import cuda_device, open_cuda_executor
    from microserve.engine.torch_executor import open_torch_executor

    device = cuda_device(config.device) if config.executor in ("auto", "cuda") else None
    if device is not None:
        return open_cuda_executor(config, device, progress)
    if config.executor == "cuda":
        raise ConfigError(f"executor cuda: torch finds no GPU (device {config.device!r})")
    return open_torch_executor(config, progress)


class Engine:
    """One engine on a bus: its parts, threads, announcements and events. Lives on one event loop, for one run."""

    def __init__(
        self,
        config: EngineConfig,
        engine_id: str,
        epoch: int,
        executor: Executor,
        transport: Transport | None,
        bus: Bus,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.config = config
        """What is in effect."""
        self._bus = bus
        self._crash: asyncio.Future[None] = loop.create_future()
        self.core = EngineCore(
            config,
            engine_id,
            epoch,
            executor,
            transport,
            bus,
            post=loop.call_soon_threadsafe,
            crashed=self._crashed,
            event=self._publish,
        )
        self.verbs = self.core.verbs
        self.verbs.changed = self._changed
        self._announcer: Announcer | None = None
        self._publisher: Publisher | None = None
        self._events = 0
        self._state = ""
        self._idle = asyncio.Event()

    @property
    def scheduler(self) -> Scheduler:
        return self.core.scheduler

    def info(self) -> EngineInfo:
        return self.core.info

    def moves(self) -> bool:
        """Whether the step thread does: a step that never ends must not look like life."""
        return self.core.steps.turning_for < self.config.step_timeout

    def configure(self, config: EngineConfig) -> None:
        """Another configuration is in effect."""
        self.config = config

    def label(self, labels: dict[str, str]) -> None:
        """Other labels from now on; routers are told."""
        self.core.info = replace(self.core.info, labels=labels)
        if self._announcer is not None:
            self._announcer.changed()

    async def start(self) -> None:
        """Binds, announces, and begins to serve. Raises `ConfigError` when an address cannot be had."""
        config, core = self.config, self.core
        core.steps.start()
        if core.transfers is not None:
            core.transfers.start()
        listener = await self._bus.listen(config.bind, self.verbs.server)
        self._publisher = await self._bus.publisher(config.events_bind)
        core.info = replace(
            core.info,
            endpoint=config.advertise or listener.endpoint,
            events_endpoint=config.events_advertise or self._publisher.endpoint,
        )
        self._announcer = Announcer(self._bus, config.routers, self.info, self.verbs.load)
        self._announcer.start()
        self._state = self.verbs.state
        self._publish("started")

    async def metrics(self) -> bytes:
        """A scrape. What only the step thread knows is left out when it does not answer soon."""
        from microserve.engine.exposition import Snapshot, render

        core = self.core
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[StatsReply] = loop.create_future()

        def answered(stats: StatsReply) -> None:
            if not answer.done():
                answer.set_result(stats)

        core.steps.ask(partial(core.statistics, deep=False), answered)
        stats = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STATS_LIMIT):
                stats = await answer
        links, bus = core.peers.links(), self._bus.statistics()
        return render(
            core.metrics, Snapshot(core.info, self.verbs.load(), links, stats, bus, metadata.version("microserve"))
        )

    def not_ready(self) -> list[str]:
        """Why a request would not be served now."""
        reasons = []
        if self.verbs.state not in ("ready", "degraded"):
            reasons.append(f"the engine is {self.verbs.state}")
        if not self.moves():
            reasons.append("the step thread hangs")
        return reasons

    async def run(self, lifecycle: Lifecycle) -> None:
        """Serves until `lifecycle` drains, then finishes what runs. Raises `InternalError` if the step thread died."""
        beating = asyncio.create_task(self._beat(), name="engine events")
        draining = asyncio.create_task(lifecycle.draining.wait(), name="engine drain")
        try:
            ends: set[asyncio.Future[Any]] = {self._crash, draining, beating}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._crash.done() and lifecycle.draining.is_set():
                await self._drain()
            if self._crash.done():
                self._crash.result()
            if beating.done():
                beating.result()
        finally:
            for task in (beating, draining):
                task.cancel()
            await asyncio.gather(beating, draining, return_exceptions=True)

    async def stop(self) -> None:
        """Ends what is open, leaves peers and routers, ends the threads, closes the executor. Idempotent."""
        core = self.core
        self.verbs.end_all(Draining("this engine stops"))
        try:
            if self._announcer is not None:
                self._publish("stopping")
                announcer, self._announcer = self._announcer, None
                await announcer.leave()
            # Pushes end before their claims, claims before the sessions that tell of them, all before the pool goes.
            await core.sends.close()
            await core.peers.close()
        finally:
            # Whatever becomes of the goodbye, the threads must not outlive us.
            if core.transfers is not None:
                await asyncio.to_thread(core.transfers.stop)
            await asyncio.to_thread(core.steps.stop)
            if self._publisher is not None:
                self._publisher.close()
                self._publisher = None
        if self._crash.done():
            self._crash.exception()  # `run` has raised it, or something else ended it first.

    async def _drain(self) -> None:
        self.verbs.drain()
        live = self.verbs.live
        began = monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_timeout):
                while self.core.busy and not self._crash.done():
                    self._idle.clear()
                    # Leases end in the step thread, which tells nobody.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_DRAIN_LOOK):
                            await self._idle.wait()
        _log.info(
            "drained",
            finished=max(0, live - self.verbs.live),
            cut_off=self.verbs.live,
            seconds=round(monotonic() - began, 2),
        )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_EVENT_INTERVAL)
            self._changed()  # the step thread tells nobody that it is degraded
            if not self.moves():
                seconds = round(self.core.steps.turning_for, 1)
                _log.error("a step does not end: the step thread hangs", every=10.0, seconds=seconds)
            self._publish("load")

    def _changed(self) -> None:
        if self.verbs.live == 0:
            self._idle.set()
        if self.verbs.state != self._state:
            self._state = self.verbs.state
            self._publish("state")
            if self._announcer is not None:
                self._announcer.changed()

    def _publish(self, kind: str, detail: str = "") -> None:
        if self._publisher is None:
            return
        self._events += 1
        if kind != "load":
            self.core.metrics.event(kind)
        info = self.core.info
        self._publisher.publish(
            EngineEvent(
                engine_id=info.engine_id,
                epoch=info.epoch,
                seq=self._events,
                kind=kind,
                load=self.verbs.load(),
                detail=detail,
            )
        )

    def _crashed(self, error: BaseException) -> None:
        failure = InternalError(f"the step thread died: {error!r}")
        failure.__cause__ = error
        # Nothing is wrong with what was asked: it may be served elsewhere, and not here.
        self.verbs.drain()
        self.verbs.end_all(Draining(f"the engine ends: {failure.message}"))
        self._idle.set()
        if not self._crash.done():
            self._crash.set_exception(failure)


def _freeze() -> None:
    # What start-up made lives as long as the process: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
