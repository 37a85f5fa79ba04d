"""A sub-request while it runs and after: what it asks, who waits for it, what it has brought."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from microserve.runtime.messages import KvAddress, SendReport

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from microserve.router.link import EngineLink
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.rpc import CallStream

T = TypeVar("T")


@dataclass(slots=True)
class SubRecord:
    """One sub-request of a choice, for whoever looks at it. Times are those of the router's clock."""

    verb: str
    engine: str
    begin: int
    end: int
    """The positions that it is about."""
    started: float
    ended: float | None = None
    outcome: str = ""
    """"ok" or the code of an error; "" while it runs."""
    matched: int = 0
    computed: int = 0
    reused: int = 0
    nbytes: int = 0


class Pending(Generic[T]):
    """A sub-request that runs, whether somebody waits for it or not. Awaiting it, any number of times, gives its answer
    or raises its error; whoever stops waiting does not stop it."""

    __slots__ = ("_answer", "_error", "_loop", "_waiters")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._answer: T | None = None
        self._error: MicroserveError | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._answer is not None or self._error is not None

    @property
    def failed(self) -> bool:
        """Whether it has ended in an error."""
        return self._error is not None

    @property
    def error(self) -> MicroserveError | None:
        """What it has ended with, if not well."""
        return self._error

    @property
    def answer(self) -> T | None:
        """What it has brought, once it has ended well."""
        return self._answer

    def __await__(self) -> Generator[Any, None, T]:
        while self._answer is None:
            if self._error is not None:
                raise self._error
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            yield from waiter
        return self._answer

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """`waiter` gets its result at the end of this, unless it has it by then."""
        self._waiters.append(waiter)

    def settle(self, answer: T | None, error: MicroserveError | None) -> None:
        """It has ended. No effect after the end."""
        if self.done:
            return
        self._answer, self._error = answer, error
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class RunKv:
    """A lease of one choice. Implements `strategy.Kv`."""

    __slots__ = ("address", "committed", "link", "over", "prompt", "sendings")

    def __init__(self, link: EngineLink, address: KvAddress, prompt: bytes) -> None:
        self.address = address
        self.link = link
        self.prompt = prompt
        """The prompt that it was prepared for, as it travels."""
        self.over = False
        """The engine has used it up: there is nothing to release."""
        self.committed = 0
        """Up to which position it has entered the engine's prefix tree without a generation."""
        self.sendings: list[RunSending] = []

    @property
    def engine(self) -> str:
        return self.address.engine_id

    @property
    def matched(self) -> int:
        return self.address.matched

    @property
    def end(self) -> int:
        return self.address.end

    def unreported(self, until: int) -> list[RunSending]:
        """Sends of positions below `until` that still run, unless others have reported their whole range."""
        told = [(each.begin, each.end) for each in self.sendings if each.answer is not None]
        return [each for each in self.sendings if not each.done and uncovered(each.begin, min(each.end, until), told)]

    @property
    def missing(self) -> int:
        return max(0, self.address.end - self.address.matched)


class RunSending(Pending[SendReport]):
    """A `remote_send`. Implements `strategy.Sending`."""

    __slots__ = ("begin", "call", "end", "kv", "sender")

    def __init__(self, sender: EngineLink, kv: RunKv, begin: int, end: int) -> None:
        super().__init__()
        self.sender = sender
        self.kv = kv
        self.begin = begin
        self.end = end
        self.call: CallStream | None = None

    def cancel(self) -> None:
        if self.call is not None:
            self.call.cancel()


async def any_end(pendings: Iterable[Pending[Any]]) -> None:
    """Returns when one of these, which all run, has ended, well or not."""
    waiter = asyncio.get_running_loop().create_future()
    for each in pendings:
        each.wake(waiter)
    await waiter


def uncovered(begin: int, end: int, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of `[begin, end)` that are in none of `ranges`, in order."""
    found = []
    for first, last in sorted(ranges):
        if begin < min(first, end):
            found.append((begin, min(first, end)))
        begin = max(begin, last)
    if begin < end:
        found.append((begin, end))
    return found
