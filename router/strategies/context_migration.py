"""Conversations that move: when a turn has ended, its context goes ahead to the engine that will serve the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from microserve.router.migration import migrate
from microserve.router.strategy import Between, Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def context_migration(
    request: Request, fleet: Fleet, *, target: str = "", min_tokens: Annotated[int, Between(0)] = 64
) -> AsyncIterator[Chunk]:
    """Turns run where their context is. Afterwards it moves to an engine labelled `target`, or to one less loaded."""
    engine = fleet.pick(prefix=True)
    context = request.prompt.tolist()
    async for chunk in engine.start_generate():
        context += chunk.tokens
        yield chunk
    # The client has its answer: nobody waits from here on.
    following = fleet.pick(target or None, exclude=[engine.id])
    moves = following.carries(target) and not engine.carries(target) if target else following.work < engine.work
    if moves and len(context) >= min_tokens:
        await migrate(context, engine, following)
