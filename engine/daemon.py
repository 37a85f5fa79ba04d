"""The engine process: opens the executor, binds the bus, announces itself, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from microserve.engine.fake_executor import FakeExecutor, fake_model
from microserve.engine.loop import StepLoop
from microserve.engine.scheduler import Limits, Scheduler
from microserve.engine.verbs import EngineVerbs
from microserve.kv.cache import KvCache
from microserve.kv.pages import IntegrityError
from microserve.runtime.clock import monotonic
from microserve.runtime.config import EngineConfig, config_from_args, default_process_id
from microserve.runtime.errors import ConfigError, Draining, InternalError
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.log import get_logger, setup_logging
from microserve.runtime.membership import Announcer
from microserve.runtime.messages import EngineEvent, EngineInfo, StatsReply
from microserve.runtime.service import EXIT_CONFIG, run_service
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.engine.executor import Executor
    from microserve.runtime.bus import Bus, Publisher
    from microserve.runtime.service import Lifecycle

_EVENT_INTERVAL = 1.0
"""Seconds between published loads."""

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `microserve engine`; its exit code."""
    try:
        config = config_from_args(
            EngineConfig,
            sys.argv[1:] if argv is None else argv,
            prog="microserve engine",
            description="Serve one model replica: token ids in, token ids out, over the bus.",
        )
    except ConfigError as error:
        print(f"microserve engine: error: {error.message}", file=sys.stderr)
        return EXIT_CONFIG
    engine_id = config.engine_id or default_process_id()
    setup_logging(config.log_level, config.log_json, f"engine:{engine_id}")
    return run_service(partial(serve, config, engine_id, ready=_freeze), name="microserve engine")


async def serve(
    config: EngineConfig, engine_id: str, lifecycle: Lifecycle, *, ready: Callable[[], object] = lambda: None
) -> None:
    """Runs an engine until `lifecycle` drains; calls `ready` when it serves.

    Raises `ConfigError`, `CheckpointError`, or `InternalError` after a crash.
    """
    began = monotonic()
    epoch = new_epoch()
    _limits(config, config.max_context or 2)  # Before seconds are spent on a checkpoint.
    # Loading must not keep signals and the event loop waiting.
    executor = await asyncio.to_thread(open_executor, config)
    bus = ZmqBus(Peer("engine", engine_id, epoch))
    engine = Engine(config, engine_id, epoch, executor, bus)
    try:
        await engine.start()
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
            seconds=round(monotonic() - began, 2),
        )
        await engine.run(lifecycle)
    finally:
        await engine.stop()
        await bus.close()


def open_executor(config: EngineConfig) -> Executor:
    """The executor that `config` asks for."""
    if config.executor == "fake":
        return FakeExecutor(
            config.fake,
            fake_model(config),
            page_size=config.page_size,
            total_pages=config.kv_pages or config.fake.total_pages,
        )
    # Imported here: an engine with the fake executor needs no torch.
    from microserve.engine.torch_executor import open_torch_executor

    return open_torch_executor(config, progress=sys.stderr.isatty())


class Engine:
    """One engine on a bus: verbs, step thread, announcements and events. Lives on one event loop, for one run."""

    def __init__(self, config: EngineConfig, engine_id: str, epoch: int, executor: Executor, bus: Bus) -> None:
        model = executor.model
        limits = _limits(config, model.max_context)
        self._config = config
        self._bus = bus
        self._executor = executor
        self._cache = KvCache(executor.total_pages, executor.layout.page_size, clock=monotonic)
        self.scheduler = Scheduler(self._cache, limits, eos_token_ids=model.eos_token_ids)
        self._info = EngineInfo(
            engine_id=engine_id,
            epoch=epoch,
            endpoint="",
            events_endpoint="",
            model=model,
            layout=executor.layout,
            executor=_kind(executor),
            max_running=config.max_running,
            labels=config.labels,
            started_at=time.time(),
        )
        self.verbs = EngineVerbs(
            model,
            info=self.info,
            check_prompt=self.scheduler.check_prompt,
            statistics=self._statistics,
            max_live=config.max_running + config.max_waiting,
        )
        self.verbs.changed = self._changed
        loop = asyncio.get_running_loop()
        self._crash: asyncio.Future[None] = loop.create_future()
        self._steps = StepLoop(
            self.scheduler,
            executor,
            post=loop.call_soon_threadsafe,
            deliver=self.verbs.deliver,
            crashed=self._crashed,
        )
        self.verbs.steps = self._steps
        self._announcer: Announcer | None = None
        self._publisher: Publisher | None = None
        self._events = 0
        self._state = ""
        self._idle = asyncio.Event()

    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        """Binds, announces, and begins to serve. Raises `ConfigError` when an address cannot be had."""
        config = self._config
        self._steps.start()
        listener = await self._bus.listen(config.bind, self.verbs.server)
        self._publisher = await self._bus.publisher(config.events_bind)
        self._info = replace(
            self._info,
            endpoint=config.advertise or listener.endpoint,
            events_endpoint=config.events_advertise or self._publisher.endpoint,
        )
        self._announcer = Announcer(self._bus, config.routers, self.info, self.verbs.load)
        self._announcer.start()
        self._state = self.verbs.state
        self._publish("started")

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
        """Leaves the routers, ends the step thread, closes the executor. Idempotent."""
        self.verbs.end_all(Draining("this engine stops"))
        try:
            if self._announcer is not None:
                self._publish("stopping")
                announcer, self._announcer = self._announcer, None
                await announcer.leave()
        finally:
            # Whatever becomes of the goodbye, the thread must not outlive us.
            await asyncio.to_thread(self._steps.stop)
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
            async with asyncio.timeout(self._config.drain_timeout):
                while self.verbs.live and not self._crash.done():
                    self._idle.clear()
                    await self._idle.wait()
        _log.info(
            "drained",
            finished=live - self.verbs.live,
            cut_off=self.verbs.live,
            seconds=round(monotonic() - began, 2),
        )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_EVENT_INTERVAL)
            self._publish("load")

    def _changed(self) -> None:
        if self.verbs.live == 0:
            self._idle.set()
        if self.verbs.state != self._state:
            self._state = self.verbs.state
            self._publish("state")
            if self._announcer is not None:
                self._announcer.changed()

    def _publish(self, kind: str) -> None:
        if self._publisher is None:
            return
        self._events += 1
        self._publisher.publish(
            EngineEvent(
                engine_id=self._info.engine_id,
                epoch=self._info.epoch,
                seq=self._events,
                kind=kind,
                load=self.verbs.load(),
            )
        )

    def _crashed(self, error: BaseException) -> None:
        failure = InternalError(f"the step thread died: {error!r}")
        failure.__cause__ = error
        self.verbs.end_all(failure)
        self._idle.set()
        if not self._crash.done():
            self._crash.set_exception(failure)

    def _statistics(self) -> StatsReply:
        """Runs in the step thread, at a step boundary."""
        values = self.scheduler.statistics()
        values |= {f"cache_{name}": float(value) for name, value in asdict(self._cache.statistics()).items()}
        try:
            self.scheduler.check_integrity()
        except IntegrityError as error:
            _log.error("integrity is broken", error=error)
            return StatsReply(values=values, integrity=str(error))
        return StatsReply(values=values)


def _limits(config: EngineConfig, model_context: int) -> Limits:
    context = min(config.max_context or model_context, model_context)
    return Limits(config.max_running, config.max_waiting, config.step_tokens, context)


def _kind(executor: Executor) -> str:
    return "fake" if isinstance(executor, FakeExecutor) else "torch"


def _freeze() -> None:
    # What start-up made lives as long as the process: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
