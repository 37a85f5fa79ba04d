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
        begin = kv.end
        # Of a generation, only whole pages are kept.
        whole = kv.end // request.page_size * request.page_size
        if kv.matched < whole and kv.missing <= early_first and prefill.id != decode.id:
            begin = whole
            first = prefill.start_generate(max_tokens=1)
            if request.sampling.max_tokens > request.prior_output + 1:
                # Waits for the generation there, whose pages it sends.
                prefill.remote_send(kv, end=whole)
            async for chunk in first:
                output += chunk.tokens
                yield chunk
                if chunk.finish is not None:
                    return
        else:
            prefill.remote_send(kv)
    async for chunk in decode.start_generate(kv, begin=begin, after=output):
        yield chunk
