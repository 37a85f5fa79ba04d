"""Page accounting: every page of the pool is in exactly one state, and free pages are handed out as runs.

    FREE ── allocate ──▶ OWNED ── into the tree ──▶ CACHED ── evicted ──▶ FREE
      ▲                    │                          │
      └────── freed ───────┘                          └── (a copy that the tree already has: OWNED ▶ FREE)
    FREE ── leased ──▶ LEASED ──▶ FREE | OWNED | CACHED | QUARANTINED ──▶ FREE

free + owned + cached + leased + quarantined == total, always. Pure: page numbers only, no tensor, no clock.
"""

from __future__ import annotations

import itertools
from enum import IntEnum
from typing import NoReturn

import numpy as np
import numpy.typing as npt

PageArray = npt.NDArray[np.int32]


class IntegrityError(Exception):
    """The accounting of pages is broken, or a caller used what it does not hold: a bug, never a user's mistake."""


class PageState(IntEnum):
    """Where a page is."""

    FREE = 0
    """May be allocated."""
    OWNED = 1
    """Belongs to a running request, or is named by a step that has not retired."""
    CACHED = 2
    """Belongs to the prefix tree."""
    LEASED = 3
    """Awaits KV from another engine."""
    QUARANTINED = 4
    """A transfer into it may still be under way; nobody may use it."""


_FREE = PageState.FREE
"""A member of an enumeration is looked up by a call, and this one is asked for at every change."""

_ALLOWED = frozenset(
    {
        (PageState.FREE, PageState.OWNED),
        (PageState.FREE, PageState.LEASED),
        (PageState.OWNED, PageState.FREE),
        (PageState.OWNED, PageState.CACHED),
        (PageState.CACHED, PageState.FREE),
        (PageState.LEASED, PageState.FREE),
        (PageState.LEASED, PageState.OWNED),
        (PageState.LEASED, PageState.CACHED),
        (PageState.LEASED, PageState.QUARANTINED),
        (PageState.QUARANTINED, PageState.FREE),
    }
)

_FEW = 32
"""Up to so many pages, plain integers are faster than arrays."""

EMPTY: PageArray = np.empty(0, dtype=np.int32)
EMPTY.flags.writeable = False


class PageAllocator:
    """States and counts of `total` pages, numbered from 0."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a pool needs at least one page, not {total}")
        self.total = total
        # One memory, seen in two ways: single pages are read faster from a bytearray, many at once from an array.
        self._state_of = bytearray(total)
        self._states = np.frombuffer(self._state_of, dtype=np.uint8)
        self._counts = [0] * len(PageState)
        self._counts[PageState.FREE] = total
        self._runs = FreeRuns()
        self._runs.add(0, total)

    def count(self, state: PageState) -> int:
        """Pages in `state`."""
        return self._counts[state]

    def take(self, count: int, state: PageState) -> PageArray | None:
        """`count` free pages, adjacent where possible, now in `state`; None, and no change, if too few are free."""
        if count > self._counts[_FREE]:
            return None
        if count == 0:
            return EMPTY
        if (_FREE, state) not in _ALLOWED:
            raise IntegrityError(f"pages cannot go from FREE to {state.name}")
        runs = self._runs.take(count)
        for start, length in runs:
            self._state_of[start : start + length] = bytes((state,)) * length
        self._counts[_FREE] -= count
        self._counts[state] += count
        return _pages_in(runs, count)

    def move(self, pages: PageArray, origin: PageState, target: PageState) -> None:
        """Takes `pages` from one state to another. `IntegrityError`, and nothing changed, if any is not in `origin`."""
        count = len(pages)
        if count == 0:
            return
        if (origin, target) not in _ALLOWED or origin is _FREE:
            raise IntegrityError(f"pages cannot go from {origin.name} to {target.name} by move()")
        runs = self._set_few(pages, origin, target) if count <= _FEW else self._set_many(pages, origin, target)
        self._counts[origin] -= count
        self._counts[target] += count
        if target is _FREE:
            for start, length in runs:
                self._runs.add(start, length)

    def _set_few(self, pages: PageArray, origin: PageState, target: PageState) -> list[tuple[int, int]]:
        """Changes states alone. Returns the runs that `pages` make."""
        ordered = sorted(pages.tolist())
        states = self._state_of
        runs: list[tuple[int, int]] = []
        start = after = ordered[0]
        for page in ordered:
            if states[page] != origin or page < after:
                self._refuse(pages, origin)
            if page > after:
                runs.append((start, after - start))
                start = page
            after = page + 1
        runs.append((start, after - start))
        for page in ordered:
            states[page] = target
        return runs

    def _set_many(self, pages: PageArray, origin: PageState, target: PageState) -> list[tuple[int, int]]:
        ordered = np.sort(pages)
        if (self._states[pages] != origin).any() or (ordered[1:] == ordered[:-1]).any():
            self._refuse(pages, origin)
        self._states[pages] = target
        edges = [0, *(np.flatnonzero(np.diff(ordered) != 1) + 1).tolist(), len(ordered)]
        return [(int(ordered[low]), high - low) for low, high in itertools.pairwise(edges)]

    def _refuse(self, pages: PageArray, origin: PageState) -> NoReturn:
        wrong = {int(page): self.state_of(page).name for page in self.astray(pages, origin)}
        if wrong:
            raise IntegrityError(f"pages that should be {origin.name}: {wrong}")
        raise IntegrityError(f"a page is named twice: {np.sort(pages).tolist()}")

    def state_of(self, page: int) -> PageState:
        """The state of one page."""
        return PageState(self._state_of[page])

    def astray(self, pages: PageArray, state: PageState) -> PageArray:
        """Those of `pages` that are not in `state`."""
        astray: PageArray = pages[self._states[pages] != state]
        return astray

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raises `IntegrityError` if counts, states and free runs do not agree. Not `deep`: counts alone."""
        if sum(self._counts) != self.total or min(self._counts) < 0:
            raise IntegrityError(f"states add up to {self._counts}, of {self.total} pages")
        if not deep:
            return
        found = np.bincount(self._states, minlength=len(PageState)).tolist()
        if found != self._counts:
            raise IntegrityError(f"pages by state are {found}, counted as {self._counts}")
        self._runs.check_integrity()
        free = np.zeros(self.total, dtype=bool)
        for start, length in self._runs.runs():
            if free[start : start + length].any():
                raise IntegrityError(f"free run {start}+{length} overlaps another")
            free[start : start + length] = True
        if not np.array_equal(free, self._states == PageState.FREE):
            raise IntegrityError("free runs and page states disagree")


class FreeRuns:
    """Runs of adjacent free pages, merged when they touch, found by size. A few dictionary operations a call."""

    def __init__(self) -> None:
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}  # end (exclusive) -> start
        self._by_size: list[dict[int, None]] = []  # by bit length of the run's length; oldest first

    def runs(self) -> list[tuple[int, int]]:
        """Every run as (start, length)."""
        return list(self._length_at.items())

    def add(self, start: int, length: int) -> None:
        """Adds a run, merging it with the runs that it touches."""
        following = self._length_at.get(start + length)
        if following is not None:
            self._remove(start + length, following)
            length += following
        before = self._start_before.get(start)
        if before is not None:
            extra = self._length_at[before]
            self._remove(before, extra)
            start, length = before, length + extra
        self._insert(start, length)

    def take(self, count: int) -> list[tuple[int, int]]:
        """`count` pages, of which there are enough. One run if any is surely long enough, else the longest first."""
        runs: list[tuple[int, int]] = []
        while count:
            start, length = self._choose(count)
            used = min(count, length)
            self._remove(start, length)
            if used < length:
                self._insert(start + used, length - used)
            runs.append((start, used))
            count -= used
        return runs

    def _choose(self, count: int) -> tuple[int, int]:
        """A run of at least `count` from the smallest class that surely has one; else the longest class's oldest."""
        buckets = self._by_size
        needed = count.bit_length()
        if needed < len(buckets):
            for start in buckets[needed]:  # its own class may hold runs that are too short
                length = self._length_at[start]
                if length >= count:
                    return start, length
                break
            for size in range(needed + 1, len(buckets)):
                for start in buckets[size]:
                    return start, self._length_at[start]
        for size in range(min(needed, len(buckets) - 1), -1, -1):
            for start in buckets[size]:
                return start, self._length_at[start]
        raise IntegrityError("the free count promised pages that no run has")

    def _insert(self, start: int, length: int) -> None:
        size = length.bit_length()
        while len(self._by_size) <= size:
            self._by_size.append({})
        self._by_size[size][start] = None
        self._length_at[start] = length
        self._start_before[start + length] = start

    def _remove(self, start: int, length: int) -> None:
        del self._by_size[length.bit_length()][start]
        del self._length_at[start]
        del self._start_before[start + length]

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if the three indexes disagree."""
        ends = {start + length: start for start, length in self._length_at.items()}
        if ends != self._start_before:
            raise IntegrityError("free runs by start and by end disagree")
        sized = {start for bucket in self._by_size for start in bucket}
        if sized != set(self._length_at):
            raise IntegrityError("free runs by size and by start disagree")
        for end in ends:
            if end in self._length_at:
                raise IntegrityError(f"free runs that touch at page {end} were not merged")


def _pages_in(runs: list[tuple[int, int]], count: int) -> PageArray:
    """The `count` pages of runs, in their order."""
    if count > _FEW or len(runs) == 1:
        return np.concatenate([np.arange(start, start + length, dtype=np.int32) for start, length in runs])
    return np.array([page for start, length in runs for page in range(start, start + length)], dtype=np.int32)
