"""Not in the paper: a second prefill engine steps in for one that refuses or fails.

A range of a lease has one writer, ever, so the second engine is asked only then, and writes to a new lease. What
neither of them brings, the engine that decodes computes.
"""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, MicroserveError, Request, strategy


@strategy
async def fallback_prefill(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """As disaggregation, with a new lease and another sender when the first fails."""
    decode = fleet.pick("decode")
    tried = [decode.id]
    for _ in range(2):
        prefill = fleet.pick("prefill", exclude=tried)
        tried.append(prefill.id)
        kv = await decode.prep_recv(end=-1)
        try:
            await prefill.remote_send(kv)
        except MicroserveError:
            decode.release(kv)
            continue
        async for chunk in decode.start_generate(kv):
            yield chunk
        return
    async for chunk in decode.start_generate():
        yield chunk
