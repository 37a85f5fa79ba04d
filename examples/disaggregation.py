"""Prefill-decode disaggregation: one engine computes the prompt's KV, another generates from it.

With engines labelled "prefill" and "decode", in any numbers; without labels, any two engines.
"""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, Request, strategy


@strategy
async def disaggregation(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Prefill here, decode there."""
    decode = fleet.pick("decode")
    prefill = fleet.pick("prefill", exclude=[decode.id])
    # The last token is left to the engine that decodes: the first output token comes from it.
    kv = await decode.prep_recv(end=-1)
    sending = prefill.remote_send(kv)
    async for chunk in decode.start_generate(kv, watch=sending):
        yield chunk
