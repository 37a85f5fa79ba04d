"""A context moves from one engine's prefix tree into another's, without generating."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.router.strategy import Engine
    from microserve.runtime.codec import TokenArray


async def migrate(prompt: Sequence[int] | TokenArray, source: Engine, target: Engine) -> int:
    """Moves the KV of `prompt`: what `source` has cached is copied, what neither has is computed there.

    Returns how many tokens `target` has cached then: whole pages. Raises what the engines raise; nothing is lost then,
    as the next request computes what it does not find.
    """
    kv = await target.prep_recv(prompt=prompt)
    sending = source.remote_send(kv)
    # What arrived is kept even when the rest does not come.
    committed = await target.commit(kv)
    await sending
    return committed
