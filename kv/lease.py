"""One prepared receive and the claims on it: what is there, what may still come, and what a sender may still write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from microserve.kv.pages import EMPTY, PageArray
from microserve.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from microserve.kv.prefix import PrefixLock
    from microserve.kv.radix import TokenArray

Sender = tuple[str, int]
"""Engine id and epoch."""


@dataclass(eq=False, slots=True)
class Claim:
    """A sender's right to write pages `[first, last)` of a lease."""

    id: int
    sender: Sender
    first: int
    last: int
    open: bool = True
    quarantined: PageArray = field(default_factory=lambda: EMPTY)
    quarantined_at: float = 0.0

    def overlaps(self, first: int, last: int) -> bool:
        """Whether it covers any of pages `[first, last)`."""
        return first < self.last and self.first < last


class Lease:
    """One prepared receive. Changed by its table alone."""

    __slots__ = (
        "_page_size",
        "attached",
        "awaited",
        "claims",
        "dies",
        "end",
        "expires",
        "id",
        "lock",
        "matched",
        "owner",
        "pages",
        "reserve",
        "there",
        "tokens",
    )

    def __init__(
        self,
        id: int,
        tokens: TokenArray,
        end: int,
        lock: PrefixLock,
        pages: PageArray,
        reserve: PageArray,
        page_size: int,
        owner: object,
    ) -> None:
        self.id = id
        self.tokens = tokens
        """int32 [n]: the whole prompt."""
        self.matched = lock.length
        """Tokens that the prefix tree held; a multiple of the page size, and perhaps more than `end`."""
        self.end = end
        self.lock = lock
        """Over the `matched` tokens."""
        self.pages = pages
        """int32: the pages that await `[matched, end)`, in order of position."""
        self.reserve = reserve
        """int32: further pages, for the rest of the prompt and for output."""
        self.owner = owner
        """Whose session it belongs to."""
        self.attached: object | None = None
        """Who waits for its KV."""
        self.expires = self.dies = 0.0
        self._page_size = page_size
        self.claims: list[Claim] = []
        """Every claim there ever was on it."""
        self.there: npt.NDArray[np.bool_] = np.zeros(len(pages), dtype=bool)
        """Pages whose push was notified."""
        self.awaited: npt.NDArray[np.bool_] = np.ones(len(pages), dtype=bool)
        """Pages that may still come: not there, and neither forgone nor failed."""

    @property
    def received(self) -> int:
        """The position up to which KV is there without a gap."""
        if not len(self.pages):
            return self.matched
        missing = np.flatnonzero(~self.there)
        if not len(missing):
            return self.end
        return self.matched + int(missing[0]) * self._page_size

    @property
    def waiting(self) -> bool:
        """Whether something is missing that may still come."""
        return self.waiting_below(self.end)

    def waiting_below(self, position: int) -> bool:
        """Whether something below `position` is missing that may still come."""
        return bool(self.awaited[: -(-max(0, position - self.matched) // self._page_size)].any())

    def unsafe(self, first: int = 0, last: int | None = None) -> PageArray:
        """Pages, of `[first, last)` or of all, that a sender may write at any moment: claimed, and not arrived."""
        last = len(self.pages) if last is None else last
        parts = [self.unsafe_of(claim, first, last) for claim in self.claims if claim.open]
        return np.concatenate([EMPTY, *parts])

    def unsafe_of(self, claim: Claim, first: int = 0, last: int | None = None) -> PageArray:
        """Pages of a claim, and of `[first, last)`, that have not arrived."""
        low, high = max(claim.first, first), claim.last if last is None else min(claim.last, last)
        return self.pages[low:high][~self.there[low:high]]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Positions `[begin, end)` as a range of `pages`. Raises `InvalidRequest`."""
        size = self._page_size
        if not self.matched <= begin < end <= self.end:
            raise InvalidRequest(
                f"[{begin}, {end}) is not a range within the lease's [{self.matched}, {self.end})", param="begin"
            )
        if begin % size or (end % size and end != self.end):
            raise InvalidRequest(
                f"[{begin}, {end}) does not stand at pages of {size} tokens (only the lease's end may lie within one)",
                param="begin",
            )
        return (begin - self.matched) // size, -(-(end - self.matched) // size)
