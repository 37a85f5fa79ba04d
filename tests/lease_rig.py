"""Lease tables for tests, and a model of a lease and its claims as those outside see them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from microserve.kv.cache import KvCache
from microserve.kv.leases import LeaseTable
from microserve.kv.pages import PageState

if TYPE_CHECKING:
    from microserve.kv.leases import Lease, Sender

PAGE = 4
PROMPT = np.arange(1, 15, dtype=np.int32)  # 14 tokens: three whole pages, and two tokens


def table(pages: int = 32, **options: float) -> tuple[KvCache, LeaseTable]:
    cache = KvCache(pages, PAGE, clock=lambda: 0.0)
    ids = itertools.count(100)
    return cache, LeaseTable(cache, draw_id=lambda: next(ids), **options)


def opened(leases: LeaseTable, prompt: np.ndarray = PROMPT, end: int = 13, *, now: float = 0.0) -> Lease:
    lease = leases.open(prompt, end, 0, now)
    assert lease is not None
    return lease


def cached(cache: KvCache, prompt: np.ndarray) -> None:
    lock = cache.acquire(prompt)
    whole = len(prompt) // PAGE
    pages = cache.allocate(whole - len(lock.pages))
    assert pages is not None
    cache.release(cache.insert(prompt[: whole * PAGE], np.concatenate((lock.pages, pages)), lock))


def counts(cache: KvCache) -> dict[str, int]:
    return {state.name.lower(): cache.allocator.count(state) for state in PageState if cache.allocator.count(state)}


@dataclass(eq=False)
class Writer:
    """A claim, as its sender sees it."""

    id: int
    sender: Sender
    first: int
    last: int
    open: bool = True
    unwritten: set[int] = field(default_factory=set)
    """Indexes of pages that it has not finished."""
    quarantined_at: float | None = None


@dataclass(eq=False)
class Receive:
    """A lease, as its opener sees it."""

    lease: Lease
    expires: float
    dies: float
    there: set[int]
    awaited: set[int]
    writers: list[Writer] = field(default_factory=list)
    attached: bool = False
    open: bool = True

    @property
    def count(self) -> int:
        return len(self.lease.pages)

    @property
    def until(self) -> float:
        return self.dies if self.attached else min(self.expires, self.dies)

    @property
    def received(self) -> int:
        gap = next((index for index in range(self.count) if index not in self.there), None)
        if self.count == 0:
            return self.lease.matched
        return self.lease.end if gap is None else self.lease.matched + gap * PAGE

    def claimed(self) -> set[int]:
        """Indexes that have, or had, a writer."""
        return {index for each in self.writers for index in range(each.first, each.last)}

    def hot(self) -> set[int]:
        """Pages that a sender may write at any moment."""
        return {int(self.lease.pages[index]) for each in self.writers if each.open for index in each.unwritten}

    def text(self, index: int) -> bytes:
        """What the `index`th awaited page holds once it has come."""
        return self.lease.tokens[: min(self.lease.matched + (index + 1) * PAGE, self.lease.end)].tobytes()
