"""Which cached pages go first: the least recently used leaf without locks, from its tail.

A lazy heap: an entry is stale when its node was used, locked, extended or removed since; stale entries are dropped
when they are met. Ties go to the node that was queued first, so that the order is deterministic.
"""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microserve.kv.radix import Node


class LeafQueue:
    """Leaves without locks, by last use."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Node]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, node: Node) -> None:
        """Queues `node` if it is a leaf without locks and is not queued with its present last use."""
        if node.locks or node.children or node.parent is None or node.queued == node.last_used:
            return
        node.queued = node.last_used
        heapq.heappush(self._heap, (node.last_used, next(self._order), node))

    def pop(self) -> Node | None:
        """The least recently used leaf without locks, taken from the queue; None when there is none."""
        while self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            if node.queued != last_used:
                continue  # queued again since, with a later use
            node.queued = -1
            if node.parent is None or node.children or node.locks or node.last_used != last_used:
                continue  # whoever makes it a leaf without locks again offers it again
            return node
        return None

    def compact(self, live: int) -> None:
        """Drops stale entries once they outnumber the `live` nodes of the tree."""
        if len(self._heap) <= 2 * live + 64:
            return
        kept = []
        for entry in self._heap:
            last_used, _, node = entry
            if node.queued != last_used:
                continue
            if node.parent is None or node.children or node.locks or node.last_used != last_used:
                node.queued = -1
                continue
            kept.append(entry)
        self._heap = kept
        heapq.heapify(kept)
