"""Which bytes go where: page pairs to descriptors, adjacent ones merged. Pure.

The number of descriptors, not bandwidth, limits a push (4 to 9 µs each), so runs that are adjacent on both sides
become one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from microserve.kv.pages import PageArray

RunArray = npt.NDArray[np.int64]
DescriptorArray = npt.NDArray[np.uint64]


def runs(source: PageArray, target: PageArray) -> RunArray:
    """The pairs `source[i] -> target[i]` (both int32 [n]) as runs, int64 [m, 3]: first source, first target, count.

    In order of the pairs. Two neighbours are one run when both sides go on by one page. Raises `ValueError` when the
    lists differ in length.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} pages cannot go into {len(target)}")
    if len(source) == 0:
        return np.empty((0, 3), dtype=np.int64)
    # A push waits for this, with cold caches: as few calls of numpy as it takes.
    pairs = np.array((source, target), dtype=np.int64)
    breaks = (pairs[:, 1:] - pairs[:, :-1] != 1).any(axis=0).nonzero()[0]
    bounds = np.empty(len(breaks) + 2, dtype=np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, breaks + 1, len(source)
    found = np.empty((len(breaks) + 1, 3), dtype=np.int64)
    found[:, :2] = pairs[:, bounds[:-1]].T
    found[:, 2] = bounds[1:] - bounds[:-1]
    return found


def descriptors(firsts: RunArray, counts: RunArray, address: int, page_bytes: int, device: int) -> DescriptorArray:
    """Runs of pages of one pool as (address, bytes, device), uint64 [m, 3]. `firsts` and `counts` are [m]."""
    made = np.empty((len(firsts), 3), dtype=np.uint64)
    made[:, 0] = np.uint64(address) + firsts.astype(np.uint64) * np.uint64(page_bytes)
    made[:, 1] = counts.astype(np.uint64) * np.uint64(page_bytes)
    made[:, 2] = device
    return made


def check_pages(source: PageArray, target: PageArray, here: int, there: int) -> str:
    """Why these pairs cannot be pushed from a pool of `here` pages into one of `there`; empty when they can."""
    if len(source) == 0 or len(source) != len(target):
        return f"{len(source)} pages cannot be pushed into {len(target)}"
    for name, pages, total in (("our", source, here), ("the peer's", target, there)):
        low, high = int(pages.min()), int(pages.max())
        if low < 0 or high >= total:
            return f"page {low if low < 0 else high} is not among {name} {total}"
    return ""
