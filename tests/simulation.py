"""A whole deployment in one process and in virtual time: a real router core, real engines but for the computing.

    async with Deployment({"a": {}, "b": {"pool": "prefill"}}, fake=FakeConfig(...)) as deployment:
        deployment.core          # the router
        deployment.engines["a"]  # an engine: verbs, scheduler, leases, transfers and a fake executor

Everything goes over a bus in memory, encoded and decoded. A step ends when the latency model of the fake executor says
so, a push when that of the loopback does; what our own code takes is not counted. So a run is exact and repeatable.
Steps follow one another without a gap, and what one does is decided when the one before has ended.

Use it under `tests.virtual_time.run_virtual`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry
from tests.fleet_rig import LoopClock

from microserve.engine.core import EngineCore
from microserve.engine.fake_executor import FakeExecutor, fake_model, fake_tokens
from microserve.engine.link import peer_name
from microserve.engine.liveness import Incarnation
from microserve.engine.plan import SequenceStart
from microserve.kv.transfer.loopback import LoopbackHub, LoopbackTransport
from microserve.router.bus_api import RouterApi
from microserve.router.core import RouterCore
from microserve.router.metrics import RouterMetrics
from microserve.router.strategies.catalog import BUILT_IN, load_catalog
from microserve.router.versions import Versions
from microserve.runtime.config import EngineConfig, FakeConfig, RouterConfig
from microserve.runtime.ids import Peer
from microserve.runtime.membership import Announcer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import SamplingParams
from microserve.runtime.rpc import RpcClient, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from microserve.router.strategy import Strategy

INSTANT = FakeConfig(prefill_us_per_token=0, decode_base_us=0, decode_us_per_sequence=0)
ROUTER = "memory://router"
_TICK = 0.25
"""Seconds between looks at sessions, which fall silent."""
_LOOK = 0.05
"""Seconds after which an engine with requests that wait for pages looks again, as the step thread does."""
_IDLE_LOOK = 1.0
_GREEDY = SamplingParams(temperature=0)


class SimulatedEngine:
    """One engine, and the tasks that stand for its two threads."""

    def __init__(self, deployment: Deployment, name: str, epoch: int, config: EngineConfig, verify: bool) -> None:
        self.name = name
        self.config = config
        self.bus = deployment.network.bus(Peer("engine", name, epoch))
        clock = deployment.clock
        self.executor = FakeExecutor(
            config.fake,
            fake_model(config),
            page_size=config.page_size,
            total_pages=config.kv_pages,
            depth=2,
            verify=verify,
            clock=clock,
            sleep=lambda seconds: None,
        )
        self._clock = clock
        self._epoch = epoch
        self._announcer: Announcer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stepping, self._transferring = asyncio.Event(), asyncio.Event()
        me = peer_name(name, epoch)
        self.transport = LoopbackTransport(
            deployment.hub, me, self.executor.memory, wake=lambda: self._transferring.set()
        )
        self.core = EngineCore(
            config,
            name,
            epoch,
            self.executor,
            self.transport,
            self.bus,
            post=asyncio.get_running_loop().call_soon,
            crashed=_crashed,
            clock=clock,
            draw_lease=deployment.lease_ids.__next__,
            draw_seed=deployment.seeds,
            incarnation=Incarnation("host", epoch, 1),
            is_dead=lambda other, host: False,
        )
        assert self.core.transfers is not None
        # Whoever gives a thread something to do wakes the task that stands for it.
        self.core.steps._wake.set = self._stepping.set  # type: ignore[method-assign]
        self.core.transfers._wake.set = self._transferring.set  # type: ignore[method-assign]

    async def start(self) -> None:
        listener = await self.bus.listen("memory://*", self.core.verbs.server)
        self.core.info = msgspec.structs.replace(self.core.info, endpoint=listener.endpoint)
        self._announcer = Announcer(self.bus, [ROUTER], lambda: self.core.info, self.core.verbs.load)
        self._announcer.start()
        self._tasks = [
            asyncio.create_task(self._steps(), name=f"steps of {self.name}"),
            asyncio.create_task(self._transfers(), name=f"transfers of {self.name}"),
        ]

    async def _steps(self) -> None:
        core, clock = self.core, self._clock
        while True:
            while self.executor._launched and (wait := self.executor._launched[0][0] - clock()) > 0:
                if not core.steps.attentive:
                    await asyncio.sleep(wait)
                    continue
                self._stepping.clear()
                core.steps.attend()
                await _woken(self._stepping, wait)
            self._stepping.clear()
            if core.steps.turn():
                await asyncio.sleep(0)
                continue
            wait = _IDLE_LOOK if core.scheduler.idle else _LOOK
            for deadline in (core.scheduler.next_deadline(), core.receiving.next_deadline()):
                if deadline is not None:
                    wait = min(wait, max(0.001, deadline - clock()))
            await _woken(self._stepping, wait)

    async def _transfers(self) -> None:
        transfers, clock = self.core.transfers, self._clock
        assert transfers is not None
        while True:
            self._transferring.clear()
            while transfers.turn():
                pass
            due = self.transport.due
            await _woken(self._transferring, _IDLE_LOOK if due is None else max(0.0, due - clock()))

    async def stop(self) -> None:
        if self._announcer is not None:
            await self._announcer.leave()
        await self.core.sends.close()
        await self.core.peers.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.bus.close()

    def check_integrity(self) -> None:
        self.core.scheduler.check_integrity()
        self.core.receiving.check_integrity()

    @property
    def whole(self) -> bool:
        """Every page is free or cached, and nothing is open."""
        pages, core = self.core.cache.statistics(), self.core
        clean = (pages.owned, pages.leased, pages.quarantined, pages.locks) == (0, 0, 0, 0)
        return clean and core.scheduler.idle and core.verbs.live == 0 and len(core.receiving.leases) == 0

    def assert_whole(self) -> None:
        self.check_integrity()
        self.core.cache.check_integrity()
        self.transport.check_integrity()
        pages = self.core.cache.statistics()
        assert self.whole, (self.name, pages, self.core.verbs.live, len(self.core.receiving.leases))
        assert pages.free + pages.cached == self.executor.total_pages
        assert not self.core.kv._grants


class Deployment:
    """A router and engines. `engines`: labels by name. `options` are fields of every engine's configuration.

    `strategies` can be chosen beside those that are built in. Leaving the block ends everything; ask `settle_whole`
    before, where nothing may be left.
    """

    def __init__(
        self,
        engines: Mapping[str, Mapping[str, str]],
        *,
        fake: FakeConfig = INSTANT,
        seconds_per_page: float = 0.0,
        strategies: Sequence[Strategy] = (),
        router: Mapping[str, Any] | None = None,
        verify: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._names = engines
        self._fake = fake
        self._options = {"model": "tokens-only", "executor": "fake", "fake": fake, **options}
        self._router = RouterConfig(**(router or {}))
        self._verify = verify
        self._seconds_per_page = seconds_per_page
        self.catalog = load_catalog(None, built_in=(*BUILT_IN, *strategies), entry_points=())
        self.engines: dict[str, SimulatedEngine] = {}
        self.lease_ids = itertools.count(1)
        random_numbers = random.Random(seed)
        self.seeds: Callable[[], int] = lambda: random_numbers.getrandbits(63)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self.clock = LoopClock()
        self.network = MemoryNetwork(self.clock)
        self.hub = LoopbackHub(seconds_per_page=self._seconds_per_page, clock=self.clock)
        self._ticking = loop.create_task(self._tick(), name="ticks")
        self.bus = self.network.bus(Peer("router", "r", 1))
        config = self._router
        program = self.catalog.get(config.strategy).configure(config.strategy_settings)
        self.versions = Versions(program, self.catalog)
        self.registry = CollectorRegistry()
        self.core = RouterCore(
            config,
            self.bus,
            self.versions,
            metrics=RouterMetrics(self.registry),
            load_text=_no_text,
            clock=loop.time,
        )
        self._api = RouterApi(self.core, clock=loop.time)
        await self.bus.listen(ROUTER, self._api.server)
        self.core.start()
        for number, (name, labels) in enumerate(self._names.items()):
            config_of = EngineConfig(**(self._options | {"labels": dict(labels)}))
            self.engines[name] = SimulatedEngine(self, name, number + 1, config_of, self._verify)
            await self.engines[name].start()
        await self.until(lambda: len(self.core.fleet.candidates("tokens-only")) == len(self.engines))
        await self.until(self._met)
        return self

    def _met(self) -> bool:
        links = [each.core.peers.links() for each in self.engines.values()]
        return all(sum(link.state == "ready" for link in known) == len(self.engines) - 1 for known in links)

    async def __aexit__(self, *_error: object) -> None:
        await self.core.close()
        await self._api.close()
        for engine in self.engines.values():
            await engine.stop()
        for bus in tuple(self.network.buses):
            await bus.close()
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self.network._land()
            for bus in tuple(self.network.buses):
                bus.tick()

    async def until(self, holds: Callable[[], object], limit: float = 60.0) -> None:
        """Until it holds, in virtual seconds."""
        ends = self.clock() + limit
        while not holds():
            assert self.clock() < ends, "it did not happen"
            await asyncio.sleep(0.01)

    async def settle_whole(self, limit: float = 60.0) -> None:
        """Waits until nothing is open anywhere, and checks every book."""
        engines = self.engines.values()
        with contextlib.suppress(AssertionError):  # each of them says more
            await self.until(lambda: all(engine.whole for engine in engines), limit)
        for engine in engines:
            engine.assert_whole()
        self.core.fleet.check_integrity()
        assert {(link.charged_requests, link.charged_tokens) for link in self.core.fleet.links} <= {(0, 0)}

    async def client(self, name: str) -> RpcClient:
        """A client of the router, over the bus."""
        return await connect(self.network.bus(Peer("client", name, 1)), ROUTER)

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        """What every engine answers to `prompt`, wherever its KV comes from."""
        model = next(iter(self.engines.values())).executor.model
        tokens = np.asarray(prompt, dtype=np.int32)
        start = SequenceStart(0, tokens, len(tokens), _GREEDY, 0, model.eos_token_ids)
        return fake_tokens(tokens, start, model, count=count)


async def _woken(event: asyncio.Event, wait: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait):
            await event.wait()


def _crashed(error: BaseException) -> None:
    raise error


def _no_text(path: str) -> Any:
    raise AssertionError(f"no model here has text, and so no path {path!r}")
