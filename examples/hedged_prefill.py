"""Not in the paper: a second prefill engine steps in when the first one has not even been able to take the work.

A range has one writer, so the second engine is asked only once the first has refused or failed; the engine that decodes
computes what neither has brought.
"""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, MicroserveError, Request, strategy


@strategy
async def hedged_prefill(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
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
