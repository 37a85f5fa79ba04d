"""Calls on a bare session that keep every answer, so that a test can see that each call got exactly one terminal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from microserve.runtime.codec import from_info, unpack_tokens
from microserve.runtime.messages import (
    Batch,
    Call,
    Cancel,
    Failure,
    Finished,
    Generated,
    Part,
    Reply,
    TextChunk,
    Tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.bus import Session
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import EngineVerb, RouterVerb, RpcMessage


class Recorder:
    """A session handler. `on_end(id)` is called with the first terminal of a call."""

    def __init__(self, on_end: Callable[[int], None] | None = None) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.terminals: dict[int, list[Reply | Failure]] = {}
        self.stray: list[Failure] = []
        self.lost_with: MicroserveError | None = None
        self._on_end = on_end
        self._session: Session | None = None
        self._changed = asyncio.Event()

    # --- session ---

    def opened(self, session: Session) -> None:
        self._session = session

    def received(self, session: Session, message: RpcMessage) -> None:
        for item in message.items if isinstance(message, Batch) else [message]:
            if isinstance(item, Part):
                assert not self.terminals[item.id], f"call {item.id} had ended"
                if isinstance(item.body, TextChunk | Tokens):
                    self.tokens[item.id] += unpack_tokens(item.body.ids).tolist()
            elif isinstance(item, Reply | Failure):
                if item.id is None:
                    self.stray.append(item)
                    continue
                first = not self.terminals[item.id]
                self.terminals[item.id].append(item)
                if first and self._on_end is not None:
                    self._on_end(item.id)
        self._changed.set()

    def lost(self, session: Session, error: MicroserveError) -> None:
        self.lost_with = error
        self._changed.set()

    # --- for tests ---

    def call(self, id: int, body: EngineVerb | RouterVerb) -> None:
        assert self._session is not None
        self.tokens[id] = []
        self.terminals[id] = []
        self._session.send(Call(id=id, body=body))

    def cancel(self, id: int) -> None:
        """Its terminal is still awaited."""
        assert self._session is not None
        self._session.send(Cancel(id=id))

    @property
    def open(self) -> list[int]:
        """Calls that have not ended."""
        return [id for id, ends in self.terminals.items() if not ends]

    async def wait(self, holds: Callable[[], bool], limit: float = 30.0) -> None:
        """Until `holds`, which is looked at whenever something arrives."""
        async with asyncio.timeout(limit):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def error(self, id: int) -> MicroserveError | None:
        """What a call failed with; None when it ended well."""
        (end,) = self.terminals[id]
        return from_info(end.error) if isinstance(end, Failure) else None

    def finished(self, id: int) -> Finished | Generated:
        """How a call ended well."""
        (end,) = self.terminals[id]
        assert isinstance(end, Reply)
        assert isinstance(end.body, Finished | Generated)
        return end.body
