"""Prefill-decode disaggregation: x engines prefill, y decode. The labels "prefill" and "decode" say which is which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from microserve.router.strategy import Between, Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def prefill_decode(
    request: Request, fleet: Fleet, *, cache_aware: bool = True, min_remote: Annotated[int, Between(0)] = 64
) -> AsyncIterator[Chunk]:
    """One engine prefills and another decodes, which does without the first when it lacks less than `min_remote`."""
    decode = fleet.pick("decode", prefix=cache_aware)
    kv = await decode.prep_recv(end=-1)
    begin = min(kv.matched, kv.end)
    if kv.missing and not (cache_aware and kv.missing < min_remote):
        prefill = fleet.pick("prefill", exclude=[decode.id], prefix=cache_aware)
        prefill.remote_send(kv)
        begin = kv.end
    async for chunk in decode.start_generate(kv, begin=begin):
        yield chunk
