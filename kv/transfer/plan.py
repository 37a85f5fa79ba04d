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


def runs(source: PageArray, target: PageArray) -> RunArray:
    """The pairs `source[i] -> target[i]` (both int32 [n]) as runs, int64 [m, 3]: first source, first target, count.

    In order of the pairs. Two neighbours are one run when both sides go on by one page. Raises `ValueError` when the
    lists differ in length.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} pages cannot go into {len(target)}")
    if len(source) == 0:
        return np.empty((0, 3), dtype=np.int64)
    first = np.asarray(source, dtype=np.int64)
    second = np.asarray(target, dtype=np.int64)
    breaks = np.flatnonzero((np.diff(first) != 1) | (np.diff(second) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(first)])))
    return np.stack((first[starts], second[starts], counts), axis=1)


def descriptors(found: RunArray, address: int, remote_address: int, page_bytes: int) -> tuple[RunArray, RunArray]:
    """The runs as (address, bytes) on both sides, each int64 [m, 2]."""
    sizes = found[:, 2] * page_bytes
    here = np.stack((address + found[:, 0] * page_bytes, sizes), axis=1)
    there = np.stack((remote_address + found[:, 1] * page_bytes, sizes), axis=1)
    return here, there
