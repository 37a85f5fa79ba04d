"""Balanced disaggregation: the engine that decodes takes over the end of the prefill, too."""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, Request, strategy


@strategy
async def balanced_disaggregation(request: Request, fleet: Fleet, *, ratio: float = 0.1) -> AsyncIterator[Chunk]:
    """As disaggregation, but `ratio` of the prompt is prefilled where it is decoded."""
    decode = fleet.pick("decode")
    prefill = fleet.pick("prefill", exclude=[decode.id])
    split = request.page_aligned(1 - ratio)
    kv = await decode.prep_recv(end=split)
    sending = prefill.remote_send(kv, end=split)
    async for chunk in decode.start_generate(kv, begin=split, watch=sending):
        yield chunk
