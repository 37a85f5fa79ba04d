"""A router with a strategy, and three scripted engines for it to work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from tests.router_support import ScriptedEngine, World
from tests.virtual_time import run_virtual

from microserve.router.strategy import Chunk, Fleet, Request, strategy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from microserve.router.dispatch import Generation

PROMPT = list(range(50))
"""Three whole pages and two tokens."""

Check = Callable[[World, ScriptedEngine, ScriptedEngine, ScriptedEngine], Awaitable[None]]


@strategy
async def two(request: Request, fleet: Fleet, *, end: int = -1, wait: bool = False) -> AsyncIterator[Chunk]:
    """Prefill on p, decode on d."""
    decode, prefill = fleet.pick("decode"), fleet.pick("prefill")
    kv = await decode.prep_recv(end=end)
    sending = prefill.remote_send(kv)
    if wait:
        await sending
    async for chunk in decode.start_generate(kv, watch=sending):
        yield chunk


def run(check: Check, function: Any = two, /, **settings: Any) -> None:
    """A world of d, p and q (which prefills, too), and nothing left in it afterwards."""
    program = (function if not callable(function) else strategy(function)).configure(settings)

    async def main() -> None:
        async with World(program) as world:
            d = await world.add("d", labels={"decode": "yes"})
            p = await world.add("p", labels={"prefill": "yes"})
            q = await world.add("q", labels={"second": "yes"})
            d.grant_always()
            await check(world, d, p, q)
            await world.settle()
            world.check_clean()

    run_virtual(main())


async def start(world: World, **changes: Any) -> Generation:
    generation = world.generate(PROMPT, **changes)
    await world.settle()
    return generation
