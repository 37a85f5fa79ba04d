"""Whole requests on whole engines: the one where the most is cached, unless too much work stands before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.router.strategy import Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def cache_aware(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Each request runs where its cached prefix, weighed against the load, makes it cheapest."""
    async for chunk in fleet.pick(prefix=True).start_generate():
        yield chunk
