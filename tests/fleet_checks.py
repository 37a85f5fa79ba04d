"""What tests of a fleet say often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.fleet_calls import expected, prompt_of

from microserve.runtime.messages import CacheEvict, CacheEvicted

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tests.fleet_rig import Fleet, FleetEngine

    from microserve.engine.link import Link
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import Generated

PROMPT = prompt_of(50)
LONG = prompt_of(120)
"""Eight steps of prefill."""
WAIT = 10.0
"""The engines' `kv_wait`."""


async def raises(kind: type[MicroserveError], work: Awaitable[object]) -> MicroserveError:
    """The error with which `work` ends."""
    with pytest.raises(kind) as caught:
        await work
    return caught.value


async def answers(fleet: Fleet, engine: FleetEngine, prompt: list[int], **options: Any) -> Generated:
    """Generates, checks the tokens, and returns how it ended."""
    tokens, end = await fleet.generate(engine, prompt, **options)
    assert tokens == expected(prompt)
    return end


async def evict(fleet: Fleet, engine: FleetEngine) -> None:
    """Nothing stays cached."""
    await fleet.ask(engine, CacheEvict(), CacheEvicted)


def link_of(engine: FleetEngine, to: str) -> Link:
    """Its link to another engine."""
    link = engine.core.peers.get(to)
    assert link is not None
    return link
