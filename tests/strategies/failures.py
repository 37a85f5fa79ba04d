"""Strategies that stop where something is to happen to their router."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from microserve.router.strategy import Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def prepares(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """Prepares a receive, and never sends."""
    kv = await fleet.engine("e0").prep_recv()
    await asyncio.Event().wait()
    async for chunk in fleet.engine("e0").start_generate(kv):
        yield chunk
