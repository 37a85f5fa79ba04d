"""Several complete engines on one bus in memory, in one thread and in virtual time.

Each engine is `EngineCore`: verbs, peers, sends, scheduler, leases and a fake executor that checks every page it reads.
A step takes `STEP` seconds; pushes go through a loopback that can be held, failed or muted. Nothing is left to chance
but what a test asks for: the same test takes the same course every time.

Use it under `run_fleet`. Leaving `Fleet` checks that nothing is left: no page but free and cached ones, no open call.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec
from tests.engine_rig import FlakyExecutor, model
from tests.fleet_calls import PAGE, generate_body, next_sub_id, send_body
from tests.virtual_time import run_virtual

from microserve.engine.core import EngineCore
from microserve.engine.link import peer_name
from microserve.engine.liveness import Incarnation
from microserve.kv.transfer.loopback import LoopbackHub, LoopbackTransport
from microserve.runtime.clock import ManualClock
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.config import EngineConfig, FakeConfig
from microserve.runtime.ids import Peer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import (
    Commit,
    Committed,
    Forgo,
    Generated,
    KvAddress,
    Meet,
    PeerAddress,
    Prepared,
    PrepRecv,
    Release,
    Released,
    SendReport,
    Stats,
    StatsReply,
    Tokens,
)
from microserve.runtime.rpc import RpcClient, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from microserve.kv.transfer.base import KvMemory

T = TypeVar("T")

STEP = 0.01
"""Seconds that a step takes."""
TICK = 0.05
"""Seconds between looks at the wire, on which delayed frames wait, and at sessions, which fall silent."""
LIMIT = 600.0
"""Virtual seconds after which a test hangs."""
HOST = "host"


class LoopClock(ManualClock):
    """The loop's own time. It moves by itself."""

    def __call__(self) -> float:
        return asyncio.get_running_loop().time()

    def advance(self, seconds: float) -> None:
        raise AssertionError("virtual time moves by itself")


class FleetEngine:
    """One incarnation of an engine, and what turns it."""

    def __init__(self, fleet: Fleet, name: str, epoch: int, options: dict[str, Any]) -> None:
        self.fleet = fleet
        self.name = name
        self.epoch = epoch
        self.pages = options.pop("pages", 64)
        page_size = options.pop("page_size", PAGE)
        depth = options.pop("depth", 1)
        served = msgspec.structs.replace(model(), revision=options.pop("revision", "1"))
        fake = FakeConfig(prefill_us_per_token=0, decode_base_us=0, decode_us_per_sequence=0, vocab_size=50)
        settings: dict[str, Any] = {"model": "m", "executor": "fake", "fake": fake, "max_running": 8, "step_tokens": 16}
        self.config = EngineConfig(**(settings | options))
        self.pid = next(fleet.pids)
        self.executor = FlakyExecutor(
            fake,
            served,
            page_size=page_size,
            total_pages=self.pages,
            depth=depth,
            verify=True,
            clock=fleet.clock,
            sleep=lambda seconds: None,
        )
        self.bus = fleet.network.bus(Peer("engine", name, epoch))
        self.events: list[tuple[str, str]] = []
        self.frozen = asyncio.Event()
        """Cleared while the process is stopped (SIGSTOP)."""
        self.frozen.set()
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.core = self._make_core(self.executor.memory)

    def _make_core(self, memory: KvMemory) -> EngineCore:
        fleet = self.fleet
        transport = LoopbackTransport(fleet.hub, peer_name(self.name, self.epoch), memory, wake=self._wake)
        core = EngineCore(
            self.config,
            self.name,
            self.epoch,
            self.executor,
            transport,
            self.bus,
            post=asyncio.get_running_loop().call_soon,
            crashed=self._crashed,
            event=lambda kind, detail: self.events.append((kind, detail)),
            clock=fleet.clock,
            draw_lease=fleet.lease_ids.__next__,
            draw_seed=lambda: 7,
            incarnation=Incarnation(HOST, self.pid, 1),
            is_dead=lambda other, host: other.host == host and other.pid in fleet.dead,
        )
        # Whoever gives a loop something to do wakes the task that turns it.
        for inbox in (core.steps, core.transfers):
            assert inbox is not None
            inbox._wake.set = self._wake  # type: ignore[method-assign]
        return core

    def _wake(self) -> None:
        self._woken.set()

    @staticmethod
    def _crashed(error: BaseException) -> None:
        raise error

    async def start(self) -> None:
        listener = await self.bus.listen("memory://*", self.core.verbs.server)
        self.endpoint = listener.endpoint
        self.core.info = msgspec.structs.replace(self.core.info, endpoint=self.endpoint)
        self._tasks = [
            asyncio.create_task(self._turn_steps(), name=f"steps of {self.name}"),
        ]

    async def _turn_steps(self) -> None:
        core = self.core
        assert core.transfers is not None
        while True:
            await self.frozen.wait()
            self._woken.clear()
            while core.transfers.turn():
                pass
            stepped = core.steps.turn()
            while core.transfers.turn():
                pass
            if self.fleet.check:
                core.scheduler.check_integrity()
                core.receiving.check_integrity()
            if stepped:
                await asyncio.sleep(STEP)
                continue
            try:
                async with asyncio.timeout(0.5):
                    await self._woken.wait()
            except TimeoutError:
                continue

    @property
    def peer(self) -> Peer:
        return self.bus.me

    @property
    def transport_name(self) -> str:
        return peer_name(self.name, self.epoch)

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(engine_id=self.name, epoch=self.epoch, endpoint=self.endpoint)

    def leased(self) -> int:
        return self.core.cache.statistics().leased

    def quarantined(self) -> int:
        return self.core.cache.statistics().quarantined

    async def kill(self, *, silently: bool = False, seen: bool = True) -> None:
        """As SIGKILL. `silently`: its connections do not break. Not `seen`: nobody can prove it dead."""
        self.fleet.network.kill(self.peer, silently=silently)
        if seen:
            self.fleet.dead.add(self.pid)
        assert self.core.transfers is not None
        self.core.transfers._transport.close()
        await self._end_tasks()
        self.fleet.engines.remove(self)
        self.fleet.killed.append(self)

    async def _end_tasks(self) -> None:
        for link in self.core.peers._links.values():
            self._tasks += link.tasks()
        if self.core.peers._watch is not None:
            self._tasks.append(self.core.peers._watch)
        for send in self.core.sends._live:
            if send.claiming is not None:
                self._tasks.append(send.claiming)
            if send.timer is not None:
                send.timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        await self.core.sends.close()
        await self.core.peers.close()
        await self._end_tasks()
        await self.bus.close()

    def assert_whole(self) -> None:
        """Every page is free or cached, nothing is open, and the books agree."""
        core = self.core
        core.scheduler.check_integrity()
        core.receiving.check_integrity()
        core.cache.check_integrity()
        pages = core.cache.statistics()
        assert (pages.owned, pages.leased, pages.quarantined, pages.locks) == (0, 0, 0, 0), (self.name, pages)
        assert pages.free + pages.cached == self.pages
        assert core.scheduler.idle
        assert core.verbs.live == 0
        assert len(core.receiving.leases) == 0
        assert not core.verbs._sinks
        assert not core.kv._grants
        assert not core.kv._keys


class Fleet:
    """Engines that know each other, and a router to call them by."""

    def __init__(self, *names: str, check: bool = True, **options: Any) -> None:
        self.names = names
        self.check = check
        self.options = options
        self.hub = LoopbackHub()
        self.engines: list[FleetEngine] = []
        self.killed: list[FleetEngine] = []
        self.dead: set[int] = set()
        """Process ids of which /proc would say that they are over."""
        self.pids = itertools.count(100)
        self.lease_ids = itertools.count(1)
        self.clients: dict[tuple[str, int, str], RpcClient] = {}
        self.allow_leases = False

    async def __aenter__(self) -> Self:
        self.clock = LoopClock()
        self.network = MemoryNetwork(self.clock)
        self._pump = asyncio.create_task(self._pumping(), name="wire")
        for name in self.names:
            await self.add(name)
        await self.meet()
        return self

    async def __aexit__(self, kind: object, *_rest: object) -> None:
        try:
            if kind is None:
                await asyncio.sleep(1.0)
                for engine in self.engines:
                    await self.ask(engine, Stats(), StatsReply)
                    engine.assert_whole()
        finally:
            for engine in self.engines:
                await engine.stop()
            for engine in self.killed:
                await engine.bus.close()
            for bus in tuple(self.network.buses):
                await bus.close()
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)

    async def _pumping(self) -> None:
        network = self.network
        while True:
            await asyncio.sleep(TICK)
            network._land()
            for bus in tuple(network.buses):
                bus.tick()

    async def add(self, name: str, epoch: int = 1, **options: Any) -> FleetEngine:
        engine = FleetEngine(self, name, epoch, self.options | options)
        await engine.start()
        self.engines.append(engine)
        return engine

    async def meet(self) -> None:
        """Every engine is told of the others, as a router does, and has a link to each."""
        for engine in self.engines:
            client = await self.client(engine)
            await client.call(Meet(peers=[other.address for other in self.engines]))
        await self.until(lambda: all(self._knows(a, b) for a in self.engines for b in self.engines if a is not b))

    @staticmethod
    def _knows(a: FleetEngine, b: FleetEngine) -> bool:
        link = a.core.peers.get(b.name)
        return link is not None and link.epoch == b.epoch and link.state != "connecting"

    def __getitem__(self, name: str) -> FleetEngine:
        return next(engine for engine in self.engines if engine.name == name)

    async def until(self, condition: Callable[[], object], limit: float = 60.0) -> float:
        """Waits for it; how many virtual seconds that took."""
        began = self.clock()
        while not condition():
            assert self.clock() - began < limit, "it did not happen"
            await asyncio.sleep(STEP / 2)
        return self.clock() - began

    # --- as a router -----------------------------------------------------------------------------------------------

    async def client(self, engine: FleetEngine, router: str = "r") -> RpcClient:
        key = (engine.name, engine.epoch, router)
        client = self.clients.get(key)
        if client is None or client.closed:
            me = Peer("router", router, 1)
            bus = next((bus for bus in self.network.buses if bus.me == me), None)
            client = await connect(bus if bus is not None else self.network.bus(me), engine.endpoint)
            self.clients[key] = client
        return client

    async def ask(
        self, engine: FleetEngine, body: Any, kind: type[T], *, router: str = "r", budget: float | None = None
    ) -> T:
        reply = await (await self.client(engine, router)).call(body, budget=budget)
        assert isinstance(reply, kind), reply
        return reply

    async def prep_recv(
        self, engine: FleetEngine, prompt: Sequence[int], end: int | None = None, **options: Any
    ) -> KvAddress:
        router = options.pop("router", "r")
        sub_id = options.pop("sub_id", None) or next_sub_id()
        body = PrepRecv(request_id="q", sub_id=sub_id, prompt=pack_tokens(prompt), end=end, **options)
        return (await self.ask(engine, body, Prepared, router=router)).address

    async def remote_send(
        self, engine: FleetEngine, prompt: Sequence[int], address: KvAddress, **options: Any
    ) -> SendReport:
        router, budget = options.pop("router", "r"), options.pop("budget", None)
        body = send_body(prompt, address, **options)
        return await self.ask(engine, body, SendReport, router=router, budget=budget)

    def sending(
        self, engine: FleetEngine, prompt: Sequence[int], address: KvAddress, **options: Any
    ) -> asyncio.Task[SendReport]:
        """A send that runs beside the test."""
        return asyncio.create_task(self.remote_send(engine, prompt, address, **options))

    async def generate(
        self, engine: FleetEngine, prompt: Sequence[int], *, count: int = 4, **options: Any
    ) -> tuple[list[int], Generated]:
        router, budget = options.pop("router", "r"), options.pop("budget", None)
        stream = (await self.client(engine, router)).stream(generate_body(prompt, count, **options), budget=budget)
        tokens: list[int] = []
        try:
            async for body in stream:
                assert isinstance(body, Tokens)
                tokens += unpack_tokens(body.ids).tolist()
        finally:
            stream.cancel()
        assert isinstance(stream.reply, Generated)
        return tokens, stream.reply

    def generating(
        self, engine: FleetEngine, prompt: Sequence[int], **options: Any
    ) -> asyncio.Task[tuple[list[int], Generated]]:
        """A generation that runs beside the test."""
        return asyncio.create_task(self.generate(engine, prompt, **options))

    async def commit(self, engine: FleetEngine, address: KvAddress, wait: float | None = None) -> int:
        body = Commit(request_id="q", sub_id=next_sub_id(), lease=address.lease, wait=wait)
        return (await self.ask(engine, body, Committed)).committed_until

    async def release(self, engine: FleetEngine, address: KvAddress, router: str = "r") -> str:
        return (await self.ask(engine, Release(lease=address.lease), Released, router=router)).outcome

    async def forgo(self, engine: FleetEngine, address: KvAddress, begin: int, end: int) -> str:
        return (await self.ask(engine, Forgo(lease=address.lease, begin=begin, end=end), Released)).outcome


def run_fleet(work: Callable[[Fleet], Coroutine[Any, Any, T]], *names: str, **options: Any) -> T:
    """Runs `work` in a fleet of engines of these names ("a" and "b" if none are given)."""

    async def main() -> T:
        async with asyncio.timeout(LIMIT), Fleet(*(names or ("a", "b")), **options) as fleet:
            return await work(fleet)

    return run_virtual(main())
