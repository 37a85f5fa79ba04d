"""Data parallelism: every engine serves whole requests."""

from collections.abc import AsyncIterator

from microserve import Chunk, Fleet, Request, strategy


@strategy
async def data_parallelism(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
    """The least loaded engine does it all."""
    engine = fleet.pick()
    async for chunk in engine.start_generate():
        yield chunk
