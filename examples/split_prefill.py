"""Not in the paper: two engines prefill a part of one prompt each, at the same time, for a third.

The second one needs the KV of the first one's part for its own: it computes both, or has the first part cached. So this
pays where the beginning of prompts is shared and cached (a system prompt, a document), and the rest is long.
"""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, Request, strategy


@strategy
async def split_prefill(request: Request, fleet: Fleet, *, first: float = 0.5) -> AsyncIterator[Chunk]:
    """One engine sends the `first` part of the prompt, another sends the rest, a third decodes."""
    decode = fleet.pick("decode")
    one = fleet.pick("prefill", exclude=[decode.id])
    other = fleet.pick("prefill", exclude=[decode.id, one.id], prefix=True)
    kv = await decode.prep_recv(end=-1)
    middle = min(max(request.page_aligned(first), kv.matched), kv.end)
    sendings = [one.remote_send(kv, end=middle), other.remote_send(kv, begin=middle)]
    async for chunk in decode.start_generate(kv, watch=sendings):
        yield chunk
