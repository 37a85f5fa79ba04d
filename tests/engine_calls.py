"""The verbs of engine processes, called directly: what a router does for a strategy, step by step and by hand."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    CacheEvict,
    CacheEvicted,
    CacheMatch,
    CacheMatched,
    Commit,
    Committed,
    Generated,
    Info,
    InfoReply,
    KvAddress,
    Prepared,
    PrepRecv,
    Release,
    Released,
    RemoteSend,
    SamplingParams,
    SendReport,
    StartGenerate,
    Stats,
    StatsReply,
    Tokens,
)
from microserve.runtime.rpc import RpcClient, connect
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from microserve.runtime.messages import Load

T = TypeVar("T")
_NUMBERS = itertools.count(1)
_BUDGET = 60.0


class Answer(NamedTuple):
    """What a generation gave; `logprobs` are those of its tokens."""

    tokens: list[int]
    done: Generated
    logprobs: list[float]


class EngineCalls:
    """One engine, as `name`; every call fails after a minute."""

    def __init__(self, name: str, client: RpcClient) -> None:
        self.name = name
        self.client = client

    async def ask(self, body: Any, kind: type[T], budget: float = _BUDGET) -> T:
        reply = await self.client.call(body, budget=budget)
        assert isinstance(reply, kind), reply
        return reply

    async def prep_recv(self, prompt: Sequence[int], end: int | None = None, **options: Any) -> KvAddress:
        body = PrepRecv(**_ids(), prompt=pack_tokens(prompt), end=end, **options)
        return (await self.ask(body, Prepared)).address

    def sending(
        self,
        prompt: Sequence[int],
        address: KvAddress,
        begin: int | None = None,
        end: int | None = None,
        budget: float = _BUDGET,
    ) -> asyncio.Task[SendReport]:
        """A `remote_send`, sent now."""
        begin = address.matched if begin is None else begin
        body = RemoteSend(
            **_ids(), prompt=pack_tokens(prompt), address=address, begin=begin, end=address.end if end is None else end
        )
        return asyncio.ensure_future(self.ask(body, SendReport, budget))

    async def generate(
        self,
        prompt: Sequence[int],
        count: int,
        *,
        kv: KvAddress | None = None,
        begin: int | None = None,
        budget: float = _BUDGET,
        **options: Any,
    ) -> Answer:
        """Greedy tokens."""
        body = StartGenerate(
            **_ids(),
            prompt=pack_tokens(prompt),
            begin=begin if begin is not None else kv.end if kv is not None else 0,
            lease=None if kv is None else kv.lease,
            sampling=SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, logprobs=0),
            **options,
        )
        stream = self.client.stream(body, budget=budget)
        tokens: list[int] = []
        logprobs: list[float] = []
        try:
            async for part in stream:
                assert isinstance(part, Tokens)
                tokens += unpack_tokens(part.ids).tolist()
                logprobs += [each.logprob for each in part.logprobs or ()]
        finally:
            stream.cancel()
        assert isinstance(stream.reply, Generated)
        return Answer(tokens, stream.reply, logprobs)

    async def commit(self, address: KvAddress, wait: float | None = None) -> int:
        return (await self.ask(Commit(**_ids(), lease=address.lease, wait=wait), Committed)).committed_until

    async def release(self, address: KvAddress) -> str:
        return (await self.ask(Release(lease=address.lease), Released)).outcome

    async def match(self, prompt: Sequence[int]) -> int:
        return (await self.ask(CacheMatch(prompt=pack_tokens(prompt)), CacheMatched)).tokens

    async def evict(self) -> int:
        return (await self.ask(CacheEvict(), CacheEvicted)).pages

    async def info(self) -> InfoReply:
        return await self.ask(Info(), InfoReply)

    async def stats(self) -> dict[str, float]:
        """Counters and gauges, once the engine has said that its books are right."""
        reply = await self.ask(Stats(), StatsReply)
        assert reply.integrity == "ok", (self.name, reply.integrity)
        return reply.values

    async def until(self, holds: Callable[[InfoReply], object], limit: float = 20.0) -> InfoReply:
        """Asks until it holds. Each asking takes a round trip."""
        async with asyncio.timeout(limit):
            while not holds(info := await self.info()):
                pass
        return info

    async def until_whole(self, limit: float = 20.0) -> None:
        """Until every page is free or cached and nothing runs; then the books are checked."""
        await self.until(lambda info: is_whole(info.load), limit)
        # Its load is as of a moment ago; its books may be asked for while a step is under way.
        async with asyncio.timeout(limit):
            while (stats := await self.stats())["scheduler_live"]:
                pass
        assert (stats["cache_locks"], stats["cache_owned"]) == (0, 0), (self.name, stats)

    async def until_met(self, *names: str) -> None:
        """Until it can send to each of those."""
        wanted = set(names) - {self.name}
        await self.until(lambda info: wanted <= {each.engine_id for each in info.links if each.state == "ready"})


def is_whole(load: Load) -> bool:
    idle = not (load.running or load.waiting or load.owned_pages or load.leased_pages or load.quarantined_pages)
    return idle and load.free_pages + load.cached_pages == load.total_pages


def _ids() -> dict[str, Any]:
    number = next(_NUMBERS)
    return {"request_id": f"request-{number}", "sub_id": f"sub-{number}"}


class Engines(dict[str, EngineCalls]):
    """Engines by name, called over one bus."""

    def __init__(self, bus: ZmqBus) -> None:
        super().__init__()
        self._bus = bus

    async def connect(self, name: str, endpoint: str) -> EngineCalls:
        """Opens a session, the first or a new one."""
        self[name] = EngineCalls(name, await connect(self._bus, endpoint))
        return self[name]

    async def until_met(self) -> None:
        """Until every engine can send to every other."""
        for engine in self.values():
            await engine.until_met(*self)


@asynccontextmanager
async def open_engines(endpoints: dict[str, str], *, met: bool = True) -> AsyncIterator[Engines]:
    """Sessions to engines by name, as a router has them, once the engines have `met`."""
    bus = ZmqBus(Peer("router", "test", new_epoch()))
    try:
        engines = Engines(bus)
        for name, endpoint in endpoints.items():
            await engines.connect(name, endpoint)
        if met:
            await engines.until_met()
        yield engines
    finally:
        await bus.close()
