"""Strategies that do what the built-in ones do, and what they would never do, for the tests that mix them at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.router.strategy import Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def alone(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """One engine does it all."""
    async for chunk in fleet.pick().start_generate():
        yield chunk


@strategy
async def moved(request: Request, fleet: Fleet, *, ratio: float = 0.0, wait: bool = False) -> AsyncIterator[Chunk]:
    """One engine prefills all but `ratio` of the prompt, another goes on; `wait`: not before all has been sent."""
    decode = fleet.pick()
    prefill = fleet.pick(exclude=[decode.id])
    split = request.page_aligned(1 - ratio) if ratio else -1
    kv = await decode.prep_recv(end=split)
    sending = prefill.remote_send(kv)
    if wait:
        await sending
    async for chunk in decode.start_generate(kv, watch=sending):
        yield chunk


@strategy
async def one_pair(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """One engine prefills and one decodes, always the same two."""
    kv = await fleet.engine("e0").prep_recv(end=-1)
    sending = fleet.engine("e1").remote_send(kv)
    async for chunk in fleet.engine("e0").start_generate(kv, watch=sending):
        yield chunk


@strategy
async def shared(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Two engines prefill a half each, a third decodes."""
    decode = fleet.pick()
    first = fleet.pick(exclude=[decode.id])
    second = fleet.pick(exclude=[decode.id, first.id])
    kv = await decode.prep_recv()
    middle = max(kv.matched, request.page_aligned(0.5))
    middle = min(middle, kv.end)
    sendings = [first.remote_send(kv, end=middle), second.remote_send(kv, begin=middle)]
    async for chunk in decode.start_generate(kv, watch=sendings):
        yield chunk


@strategy
async def migrated(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """The prompt is computed on one engine and moved into the prefix tree of another, which then serves it."""
    target = fleet.pick()
    source = fleet.pick(exclude=[target.id])
    kv = await target.prep_recv()
    await source.remote_send(kv)
    await target.commit(kv)
    async for chunk in target.start_generate():
        yield chunk


@strategy
async def hedged(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Two engines are asked for the same range: one of them is refused, which must not matter."""
    decode = fleet.pick()
    first = fleet.pick(exclude=[decode.id])
    second = fleet.pick(exclude=[decode.id, first.id])
    kv = await decode.prep_recv()
    first.remote_send(kv)
    second.remote_send(kv)
    async for chunk in decode.start_generate(kv):
        yield chunk


@strategy
async def wasteful(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Prepares and sends what nobody uses, and ends without giving anything back."""
    decode = fleet.pick()
    other = fleet.pick(exclude=[decode.id])
    unused = await other.prep_recv()
    decode.remote_send(unused)
    await decode.prep_recv(end=request.page_aligned(0.5))
    async for chunk in decode.start_generate():
        yield chunk


@strategy
async def pair(request: Request, fleet: Fleet, *, pool: str = "a") -> AsyncIterator[Chunk]:
    """Prefill and decode on the two engines of one pool."""
    decode, prefill = fleet.pick(f"decode={pool}"), fleet.pick(f"prefill={pool}")
    kv = await decode.prep_recv(end=-1)
    sending = prefill.remote_send(kv)
    async for chunk in decode.start_generate(kv, watch=sending):
        yield chunk
