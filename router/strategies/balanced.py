"""Balanced disaggregation: the engine that decodes prefills the end of the prompt, so that neither side waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from microserve.router.strategy import Between, Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def balanced(
    request: Request, fleet: Fleet, *, ratio: Annotated[float, Between(0, 1)] = 0.2, cache_aware: bool = True
) -> AsyncIterator[Chunk]:
    """One engine prefills all but `ratio` of the prompt; the one that decodes computes the rest, or has it cached."""
    split = request.page_aligned(1 - ratio)
    decode = fleet.pick("decode", prefix=cache_aware)
    kv = await decode.prep_recv(end=split)
    begin = min(kv.matched, kv.end)
    if kv.missing:
        prefill = fleet.pick("prefill", exclude=[decode.id], prefix=cache_aware)
        # One that is alone sends itself nothing.
        if prefill.id != decode.id:
            prefill.remote_send(kv)
            begin = kv.end
    async for chunk in decode.start_generate(kv, begin=begin):
        yield chunk
