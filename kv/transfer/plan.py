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

Runs = list[tuple[int, int, int]]
"""(first source, first target, count) each."""
DescriptorArray = npt.NDArray[np.uint64]


def runs(source: PageArray, target: PageArray) -> Runs:
    """The pairs `source[i] -> target[i]` (both int32 [n]) as runs, in order of the pairs.

    Two neighbours are one run when both sides go on by one page. Raises `ValueError` when the lists differ in length.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} pages cannot go into {len(target)}")
    found: Runs = []
    first = second = count = 0
    # A loop, since a push waits for it: after a pause, each call of numpy costs what a hundred pairs cost here.
    for here, there in zip(source.tolist(), target.tolist(), strict=True):
        if count and here == first + count and there == second + count:
            count += 1
            continue
        if count:
            found.append((first, second, count))
        first, second, count = here, there, 1
    if count:
        found.append((first, second, count))
    return found


def descriptors(found: Runs, side: int, address: int, page_bytes: int, device: int) -> DescriptorArray:
    """The sources (`side` 0) or targets (1) of runs as (address, bytes, device), uint64 [m, 3], in a pool that begins
    at `address`."""
    listed = [(address + run[side] * page_bytes, run[2] * page_bytes, device) for run in found]
    return np.array(listed, dtype=np.uint64).reshape(-1, 3)


def planned(source: PageArray, target: PageArray, here: int, there: int) -> Runs | str:
    """The runs of a push from a pool of `here` pages into one of `there`; why there can be none, where that is so."""
    if len(source) == 0 or len(source) != len(target):
        return f"{len(source)} pages cannot be pushed into {len(target)}"
    found = runs(source, target)
    for name, side, total in (("our", 0, here), ("the peer's", 1, there)):
        low = min(run[side] for run in found)
        high = max(run[side] + run[2] for run in found) - 1
        if low < 0 or high >= total:
            return f"page {low if low < 0 else high} is not among {name} {total}"
    return found
