"""Context migration: the KV of a conversation moves to the engine that serves its next turn, before it begins there."""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, Request, migrate, strategy


@strategy
async def moved_context(request: Request, fleet: Fleet, *, min_tokens: int = 64) -> AsyncIterator[Chunk]:
    """The least loaded engine serves each turn; what another has cached of it (`min_tokens` or more) moves there."""
    target = fleet.pick()
    source = max((fleet.engine(name) for name in fleet.engines), key=lambda engine: engine.matched)
    if source.matched - target.matched >= min_tokens:
        await migrate(request.prompt[: source.matched], source, target)
    async for chunk in target.start_generate():
        yield chunk
