"""The pieces of several choices as one stream, in the order in which they come."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.router.text_stream import TextPiece, TextStream

Item = tuple[int, "TextPiece"]


class Source(Protocol):
    """Batches of (index of the choice, piece), until every choice has ended."""

    async def next(self) -> Sequence[Item]:
        """What has come; waits for something. Raises the first error of any choice."""
        ...

    def cancel(self) -> None:
        """Ends every choice that has not ended. Idempotent."""
        ...

    async def close(self) -> None:
        """Cancels, and leaves nothing running."""
        ...


def open_source(streams: Sequence[TextStream]) -> Source:
    """The source over `streams`, which it owns from now on."""
    return Single(streams[0]) if len(streams) == 1 else Interleaved(streams)


class Single:
    """One choice: no task, no queue."""

    __slots__ = ("_stream",)

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    async def next(self) -> Sequence[Item]:
        return ((0, await self._stream.__anext__()),)

    def cancel(self) -> None:
        self._stream.cancel()

    async def close(self) -> None:
        self._stream.cancel()


class Interleaved:
    """Several choices, a task each. A choice whose piece is not taken yet waits; its backlog merges behind it."""

    def __init__(self, streams: Sequence[TextStream]) -> None:
        self._streams = tuple(streams)
        self._ready: list[Item] = []
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks = [asyncio.create_task(self._pump(index, stream)) for index, stream in enumerate(streams)]

    async def _pump(self, index: int, stream: TextStream) -> None:
        try:
            async for piece in stream:
                self._ready.append((index, piece))
                self._arrived.set()
                if piece.finish_reason is None:
                    self._taken.clear()
                    await self._taken.wait()
        except Exception as error:  # whatever it is belongs to the reader
            if self._error is None:
                self._error = error
            self._arrived.set()

    async def next(self) -> Sequence[Item]:
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        items, self._ready = self._ready, []
        self._taken.set()
        return items

    def cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def close(self) -> None:
        self.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
