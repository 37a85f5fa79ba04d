"""Prefill-decode disaggregation: x engines prefill, y decode. The labels "prefill" and "decode" say which is which."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from microserve.router.strategy import Between, Chunk, Engine, Fleet, Request, strategy
from microserve.runtime.errors import MicroserveError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


_PLACE = 20.0
"""Seconds that a prompt stands in line at the engine that prefills, while the other one holds pages for it: two engines
that prefill for each other could wait for ever. Less than the term of a lease, and more than a line that moves takes:
whoever gives up has its prompt computed where others decode."""


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

    Where at most `early_first` tokens are missing, the engine that prefills says the first token, and KV moves behind
    it. KV of longer prompts moves while it is computed, and the engine that decodes says the first token.
    """
    decode = fleet.pick("decode", prefix=cache_aware)
    preparing = decode.prep_recv(end=-1)

    def other() -> Engine | None:
        """Who prefills; None where who decodes is alone, and would send itself KV."""
        prefill = fleet.pick("prefill", exclude=[decode.id], prefix=cache_aware)
        return None if prefill.id == decode.id else prefill

    # Of a generation, only whole pages are kept.
    end = len(request.prompt) - 1
    whole = end // request.page_size * request.page_size
    lacks = end - decode.matched
    early = decode.matched < whole and lacks <= early_first and not (cache_aware and lacks < min_remote)
    prefill = other() if early else None
    first = None if prefill is None else prefill.start_generate(max_tokens=1, wait=_PLACE)
    kv = await preparing
    begin, output = min(kv.matched, kv.end), list[int]()
    if prefill is not None and first is not None:
        # Who decodes can do without the other engine, whatever that ends with.
        with suppress(MicroserveError):
            async for chunk in first:
                output += chunk.tokens
                yield chunk
                if chunk.finish is not None:
                    return
            prefill.remote_send(kv, end=whole)
            begin = max(begin, whole)
    elif (
        not early and kv.missing and not (cache_aware and kv.missing < min_remote) and (prefill := other()) is not None
    ):
        prefill.remote_send(kv)
        begin = kv.end
    async for chunk in decode.start_generate(kv, begin=begin, after=output):
        yield chunk
