"""Prefill-decode disaggregation: x engines prefill, y decode. The labels "prefill" and "decode" say which is which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from microserve.router.strategy import Between, Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def prefill_decode(
    request: Request,
    fleet: Fleet,
    *,
    cache_aware: bool = True,
    min_remote: Annotated[int, Between(0)] = 64,
    early_first: Annotated[int, Between(0)] = 8192,
) -> AsyncIterator[Chunk]:
    """One engine prefills and another decodes, which does without the first when it lacks less than `min_remote`.

    Of prompts that lack at most `early_first` tokens, the first token comes from the engine that prefills, and KV moves
    behind it. Those of longer ones move while they are computed, and the engine that decodes says the first token.
    """
    decode = fleet.pick("decode", prefix=cache_aware)
    kv = await decode.prep_recv(end=-1)
    begin, output = min(kv.matched, kv.end), list[int]()
    if kv.missing and not (cache_aware and kv.missing < min_remote):
        prefill = fleet.pick("prefill", exclude=[decode.id], prefix=cache_aware)
        end = kv.end
        whole = end // request.page_size * request.page_size
        if kv.matched < whole and kv.missing <= early_first and prefill.id != decode.id:
            async for chunk in prefill.start_generate(max_tokens=1):
                output += chunk.tokens
                yield chunk
                if chunk.finish is not None:
                    return
            # Only whole pages are kept there.
            end = whole
        prefill.remote_send(kv, end=end)
        begin = end
    async for chunk in decode.start_generate(kv, begin=begin, after=output):
        yield chunk
