"""Whole requests on whole engines: the least loaded one prefills and decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.router.strategy import Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def data_parallel(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Each request runs on the least loaded engine from start to end."""
    async for chunk in fleet.pick().start_generate():
        yield chunk
