"""Many engines in one process, as far as a router and an operator can tell: each has a bus of its own, announces
itself, sends heartbeats with a load that changes, answers what is asked of it, and streams a token a second.

python -m perf.announced ROUTER COUNT

Nothing is computed, so that what watches a large fleet can be measured on a small machine.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import uvloop
from msgspec.structs import replace

from microserve.runtime.clock import monotonic
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import Cancelled, InvalidRequest
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.membership import Announcer
from microserve.runtime.messages import (
    CachePrefixes,
    EngineInfo,
    Generated,
    Info,
    InfoReply,
    Layout,
    Load,
    Meet,
    ModelInfo,
    Ok,
    PeerLink,
    PrefixEntry,
    Prefixes,
    StartGenerate,
    Tokens,
    Usage,
)
from microserve.runtime.rpc import RpcServer
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from microserve.runtime.rpc import IncomingCall

MODEL = "announced"
_PAGES = 65_536
_RATE = 2000.0
"""Tokens a second of one engine, in the mean."""
_PREFIXES = 40
_TOKEN = pack_tokens([7])


def name_of(index: int) -> str:
    """The id of an engine."""
    return f"engine-{index:03}"


class Announced:
    """One of the engines."""

    def __init__(self, index: int, count: int) -> None:
        self._random = random.Random(index)
        self._epoch = new_epoch()
        self._began = monotonic()
        self._load = Load(total_pages=_PAGES, free_pages=_PAGES)
        self._peers = [name_of(other) for other in range(count) if other != index]
        self._streams: dict[IncomingCall, int] = {}
        self._server = RpcServer(self._handle)
        self._bus = ZmqBus(Peer("engine", name_of(index), self._epoch))
        self._prefixes = [
            PrefixEntry(prompt=pack_tokens(np.arange(16 * pages) + 1), pages=pages, references=pages % 3, pinned=False)
            for pages in range(8 * _PREFIXES, 0, -8)
        ]
        self._info = EngineInfo(
            engine_id=name_of(index),
            epoch=self._epoch,
            endpoint="",
            events_endpoint="",
            model=ModelInfo(name=MODEL, revision="1", architecture="none", vocab_size=1_000_000, max_context=131_072),
            layout=Layout(model_revision="1", dtype="bfloat16", page_size=16, layers=1, kv_heads=1, head_dim=64),
            executor="none",
            max_running=256,
            started_at=time.time(),
        )

    async def start(self, router: str) -> None:
        listener = await self._bus.listen("tcp://127.0.0.1:0", self._server)
        self._info = replace(self._info, endpoint=listener.endpoint)
        self._announcer = Announcer(self._bus, [router], lambda: self._info, self._next_load)
        self._announcer.start()

    async def stop(self) -> None:
        await self._announcer.leave()
        await self._bus.close()

    def _next_load(self) -> Load:
        """Where a busy engine would be now: every figure that is shown has moved since the last one."""
        draw, last = self._random, self._load
        tokens = last.generated_tokens + int(_RATE * draw.uniform(0.5, 1.5))
        owned, leased, cached = draw.randrange(20_000), draw.randrange(4000), draw.randrange(20_000)
        self._load = Load(
            running=draw.randrange(1, 256),
            waiting=draw.randrange(20),
            owned_pages=owned,
            leased_pages=leased,
            cached_pages=cached,
            free_pages=_PAGES - owned - leased - cached,
            total_pages=_PAGES,
            generated_tokens=tokens,
            prefilled_tokens=last.prefilled_tokens + draw.randrange(8000),
            prefix_hit_tokens=last.prefix_hit_tokens + draw.randrange(4000),
            prefix_lookup_tokens=last.prefix_lookup_tokens + 4000,
            sent_bytes=last.sent_bytes + draw.randrange(10**9),
            received_bytes=last.received_bytes + draw.randrange(10**9),
        )
        return self._load

    def _handle(self, call: IncomingCall) -> None:
        match call.body:
            case Info():
                call.reply(InfoReply(info=self._info, load=self._load, links=self._links()))
            case CachePrefixes(count=count):
                call.reply(Prefixes(prefixes=self._prefixes[:count]))
            case StartGenerate():
                self._streams[call] = 0
                call.on_cancel = lambda error: self._cancel(call)
            case Meet():
                call.reply(Ok())
            case other:
                raise InvalidRequest(f"{type(other).__name__} means nothing to an engine that is only announced")

    def _links(self) -> list[PeerLink]:
        moved = int((monotonic() - self._began) * 1e8)
        return [
            PeerLink(
                engine_id=peer,
                epoch=1,
                state="ready",
                transport="rdma",
                gigabytes_per_second=48.0,
                sent_bytes=moved,
                received_bytes=moved // 2,
            )
            for peer in self._peers
        ]

    def _cancel(self, call: IncomingCall) -> None:
        self._streams.pop(call, None)
        call.fail(Cancelled("freed"))

    def step(self) -> None:
        """Another token for every stream."""
        for call, before in list(self._streams.items()):
            body = call.body
            if not isinstance(body, StartGenerate):
                continue
            count = self._streams[call] = before + 1
            call.part(Tokens(ids=_TOKEN, cached=0 if count == 1 else None))
            if count == body.sampling.max_tokens:
                del self._streams[call]
                prompt = len(body.prompt) // 4
                usage = Usage(prompt_tokens=prompt, completion_tokens=count, cached_tokens=0)
                call.reply(Generated(finish_reason="length", usage=usage))


async def serve(router: str, count: int) -> None:
    """Until SIGTERM or SIGINT."""
    done = asyncio.Event()
    for which in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(which, done.set)
    engines = [Announced(index, count) for index in range(count)]
    for engine in engines:
        await engine.start(router)
    while not done.is_set():
        for engine in engines:
            engine.step()
        try:
            async with asyncio.timeout(1.0):
                await done.wait()
        except TimeoutError:
            continue
    await asyncio.gather(*(engine.stop() for engine in engines))


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
