"""Moving what is cached from one engine to another: `prep_recv` there, `remote_send` here, `commit` there."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.runtime.errors import MicroserveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.async_client import AsyncClient


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move has brought: the receiver now holds `tokens` of the prompt, `computed` of which nobody had."""

    tokens: int
    computed: int
    bytes: int
    seconds: float


async def migrate(client: AsyncClient, source: str, target: str, prompt: Sequence[int]) -> Moved:
    """Raises the engines' errors; a lease that was opened is released then, and when it is cancelled."""
    sender, receiver = client.engine(source), client.engine(target)
    address = await receiver.prep_recv(prompt)
    try:
        report = await sender.remote_send(prompt, address)
        tokens = await receiver.commit(address.lease)
    except (MicroserveError, asyncio.CancelledError):
        with contextlib.suppress(MicroserveError):
            await receiver.release(address.lease)
        raise
    return Moved(tokens=tokens, computed=report.computed, bytes=report.bytes, seconds=report.seconds)
