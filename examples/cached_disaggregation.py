"""Cache-aware disaggregation: what an engine has cached is neither computed nor sent again."""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, Request, strategy


@strategy
async def cached_disaggregation(request: Request, fleet: Fleet, *, enough: float = 0.9) -> AsyncIterator[Chunk]:
    """Decode where most of the prompt is cached; with `enough` of it there, that engine needs nobody else."""
    decode = fleet.pick("decode", prefix=True)
    if await decode.cache_match() >= enough * len(request.prompt):
        async for chunk in decode.start_generate():
            yield chunk
        return
    prefill = fleet.pick("prefill", exclude=[decode.id], prefix=True)
    kv = await decode.prep_recv(end=-1)
    sending = prefill.remote_send(kv, begin=min(kv.matched, kv.end))
    async for chunk in decode.start_generate(kv, watch=sending):
        yield chunk
