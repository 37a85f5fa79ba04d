"""The KV cache of one engine: who owns which page, and which tokens it holds. Joins allocator, tree and eviction.

Pure: page numbers, token ids and an injected clock; called from one thread.

Steps in flight. A step that was launched may touch its pages until it retires, so between `begin_step` and
`retire_step` what is given back is kept: pages that are freed stay OWNED, and locks that are released stay held, until
the last step launched before that has retired. So a page of the tree without locks is named by no step, and
`allocate` may reuse what it evicts at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from microserve.kv.eviction import LeafQueue
from microserve.kv.pages import EMPTY, IntegrityError, PageAllocator, PageArray, PageState
from microserve.kv.prefix import CacheStatistics, Match, PrefixInfo, PrefixLock
from microserve.kv.radix import PAGE_ID_BYTES, TOKEN_BYTES, Node, RadixTree

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class _Pin:
    lock: PrefixLock
    expires: float


class KvCache:
    """Pages and prefixes of one engine's pool."""

    def __init__(self, total_pages: int, page_size: int, *, clock: Callable[[], float]) -> None:
        if page_size < 1:
            raise ValueError(f"a page holds at least one token, not {page_size}")
        self.page_size = page_size
        self.total_pages = total_pages
        self.allocator = PageAllocator(total_pages)
        self._clock = clock
        self._tree = RadixTree(page_size)
        self._leaves = LeafQueue()
        self._tick = 0
        self._evictable = 0
        self._locks = 0
        self._pins: dict[bytes, _Pin] = {}
        self._launched = 0
        self._retired = 0
        # What waits for a step to retire, oldest first: (step, pages or lock). Pages in it count as OWNED.
        self._limbo: deque[tuple[int, PageArray | PrefixLock]] = deque()
        self._lookup_tokens = self._hit_tokens = self._evicted_pages = self._inserted_pages = 0

    # --- looking up ------------------------------------------------------------------------------------------------

    def match(self, tokens: npt.ArrayLike) -> Match:
        """What the tree holds of `tokens` (int32 [n]). Locks nothing, and does not count as a use."""
        data, end = self._prepare(tokens, None)
        walk = self._tree.walk(self._tree.root, data, 0, end)
        parts = [node.page_ids for node in walk.path]
        if walk.partial is not None:
            parts.append(walk.partial.page_ids[: walk.partial_pages * PAGE_ID_BYTES])
        return Match(walk.length // TOKEN_BYTES, np.frombuffer(b"".join(parts), dtype=np.int32))

    def acquire(self, tokens: npt.ArrayLike, limit: int | None = None) -> PrefixLock:
        """Locks the longest cached prefix of `tokens` in whole pages, of at most `limit` tokens (default: all of them).

        The lock may be of length 0. Release it exactly once; `insert` consumes it and gives another.
        """
        data, end = self._prepare(tokens, limit)
        walk = self._tree.walk(self._tree.root, data, 0, end)
        path = walk.path
        if walk.partial is not None:
            path.append(self._tree.split(walk.partial, walk.partial_pages))
        self._lookup_tokens += end // TOKEN_BYTES
        self._hit_tokens += walk.length // TOKEN_BYTES
        pages = np.frombuffer(b"".join([node.page_ids for node in path]), dtype=np.int32)
        self._hold(path)
        self._locks += 1
        return PrefixLock(path[-1] if path else self._tree.root, walk.length // TOKEN_BYTES, pages)

    # --- pages -----------------------------------------------------------------------------------------------------

    def available(self) -> int:
        """Pages that `allocate` could give now: the free ones and the evictable ones. O(1)."""
        return self.allocator.count(PageState.FREE) + self._evictable

    def allocate(self, count: int, state: PageState = PageState.OWNED) -> PageArray | None:
        """`count` pages in `state`, evicting the least recently used where needed; adjacent where possible.

        OWNED by the caller, or LEASED. None, and nothing changed, when not that many are available.
        """
        missing = count - self.allocator.count(PageState.FREE)
        if missing > self._evictable:
            return None
        if missing > 0:
            self._evict(missing)
        return self.allocator.take(count, state)

    def convert(self, pages: PageArray, origin: PageState, target: PageState) -> None:
        """Takes LEASED or QUARANTINED pages to another state at once: no step names them."""
        if origin not in (PageState.LEASED, PageState.QUARANTINED):
            raise IntegrityError(f"pages that are {origin.name} change by free() and insert()")
        self.allocator.move(pages, origin, target)

    def free(self, pages: PageArray) -> None:
        """Gives OWNED pages back; with steps in flight, once the last of them has retired."""
        if len(pages) == 0:
            return
        if self._launched > self._retired:
            self._limbo.append((self._launched, np.array(pages, dtype=np.int32)))
        else:
            self.allocator.move(pages, PageState.OWNED, PageState.FREE)

    def insert(self, tokens: npt.ArrayLike, pages: PageArray, lock: PrefixLock) -> PrefixLock:
        """A request's complete pages enter the tree. Consumes `lock` and returns one over all of `tokens`.

        `tokens` has `len(pages) * page_size` ids. The first `lock.length / page_size` pages are the locked ones; the
        others are OWNED by the caller and become the tree's. Where the tree has the same tokens already, its pages are
        used and the caller's are freed: the returned lock's `pages` are those to use from now on.
        """
        data, end = self._prepare(tokens, None)
        held = lock.length // self.page_size
        if not lock.held:
            raise IntegrityError("insert() with a lock that was released")
        if end != len(pages) * self._tree.page_bytes or len(pages) < held:
            raise IntegrityError(f"{end // TOKEN_BYTES} tokens for {len(pages)} pages, {held} of them locked")
        if pages[:held].tobytes() != lock.pages.tobytes():
            raise IntegrityError("the first pages are not those of the lock")
        if len(pages) == held:
            return lock
        walk = self._tree.walk(lock.node, data, lock.length * TOKEN_BYTES, end)
        path = walk.path
        if walk.partial is not None:
            path.append(self._tree.split(walk.partial, walk.partial_pages))
        known = walk.length // self._tree.page_bytes
        duplicates, fresh = pages[held:known], pages[known:]
        deepest = path[-1] if path else lock.node
        if len(fresh):
            self.allocator.move(fresh, PageState.OWNED, PageState.CACHED)
            ids = np.ascontiguousarray(fresh, dtype=np.int32).tobytes()
            deepest = self._tree.add(deepest, data[walk.length : end], ids, self._tick)
            path.append(deepest)
            self._evictable += len(fresh)  # until _hold() below takes it out again
            self._inserted_pages += len(fresh)
        canonical = np.frombuffer(b"".join([lock.pages.tobytes(), *(node.page_ids for node in path)]), dtype=np.int32)
        self._hold(path)
        self.free(duplicates)
        lock.held = False
        return PrefixLock(deepest, end // TOKEN_BYTES, canonical)

    def release(self, lock: PrefixLock) -> None:
        """Gives a lock back; with steps in flight, once the last of them has retired. A second release is an error."""
        if not lock.held:
            raise IntegrityError("a prefix lock was released twice")
        lock.held = False
        if self._launched > self._retired:
            self._limbo.append((self._launched, lock))
        else:
            self._drop(lock)

    # --- steps in flight -------------------------------------------------------------------------------------------

    def begin_step(self) -> int:
        """A step is about to be launched: what is given back from now on waits for it."""
        self._launched += 1
        return self._launched

    def retire_step(self, step: int) -> None:
        """The step (and every earlier one) touches no page any more."""
        if not self._retired < step <= self._launched:
            raise IntegrityError(
                f"step {step} retires, but {self._retired} had retired and {self._launched} were launched"
            )
        self._retired = step
        while self._limbo and self._limbo[0][0] <= step:
            _, what = self._limbo.popleft()
            if isinstance(what, PrefixLock):
                self._drop(what)
            else:
                self.allocator.move(what, PageState.OWNED, PageState.FREE)

    # --- pins and eviction -----------------------------------------------------------------------------------------

    def pin(self, tokens: npt.ArrayLike, ttl: float) -> int:
        """Keeps what is cached of `tokens` for `ttl` seconds; again renews it. Returns how many tokens that is."""
        if ttl <= 0:
            raise ValueError(f"a pin lives longer than {ttl} s")
        length = self.match(tokens).length
        if length == 0:
            return 0
        key = np.ascontiguousarray(tokens, dtype=np.int32).tobytes()[: length * TOKEN_BYTES]
        expires = self._clock() + ttl
        pin = self._pins.get(key)
        if pin is not None:
            pin.expires = expires
        else:
            self._pins[key] = _Pin(self._quiet_lock(tokens, length), expires)
        return length

    def unpin(self, tokens: npt.ArrayLike) -> int:
        """Ends the pin on the longest pinned prefix of `tokens`. Returns the tokens that were pinned, or 0."""
        data, end = self._prepare(tokens, None)
        for size in range(end, 0, -self._tree.page_bytes):
            pin = self._pins.pop(data[:size], None)
            if pin is not None:
                self.release(pin.lock)
                return size // TOKEN_BYTES
        return 0

    def next_pin_end(self) -> float | None:
        """When the first pin's time is over; None without pins."""
        return min((pin.expires for pin in self._pins.values()), default=None)

    def sweep(self) -> int:
        """Ends pins whose time is over. Returns how many."""
        if not self._pins:
            return 0
        now = self._clock()
        expired = [key for key, pin in self._pins.items() if pin.expires <= now]
        for key in expired:
            self.release(self._pins.pop(key).lock)
        return len(expired)

    def evict(self, tokens: npt.ArrayLike | None = None) -> int:
        """Frees cached pages that nobody locked or pinned: all, or those of `tokens` that no other prompt shares.

        Returns how many were freed.
        """
        if tokens is None:
            count = self._evictable
            self._evict(count)
            return count
        data, end = self._prepare(tokens, None)
        walk = self._tree.walk(self._tree.root, data, 0, end)
        if walk.partial is not None or not walk.path:
            return 0  # nothing is cached of it, or a longer prompt shares all of it
        freed = 0
        node = walk.path[-1]
        while node.parent is not None and not node.children and not node.locks:
            parent = node.parent
            freed += node.page_count
            self._trim(node, node.page_count)
            node = parent
        return freed

    # --- looking at it ---------------------------------------------------------------------------------------------

    def statistics(self) -> CacheStatistics:
        """Pages by state and counters."""
        count = self.allocator.count
        return CacheStatistics(
            total=self.total_pages,
            free=count(PageState.FREE),
            owned=count(PageState.OWNED),
            cached=count(PageState.CACHED),
            leased=count(PageState.LEASED),
            quarantined=count(PageState.QUARANTINED),
            evictable=self._evictable,
            pinned=sum(pin.lock.length for pin in self._pins.values()) // self.page_size,
            nodes=self._tree.node_count,
            locks=self._locks,
            lookup_tokens=self._lookup_tokens,
            hit_tokens=self._hit_tokens,
            evicted_pages=self._evicted_pages,
            inserted_pages=self._inserted_pages,
        )

    def largest_prefixes(self, count: int) -> list[PrefixInfo]:
        """The `count` longest prefixes that end at a leaf, longest first."""
        depth: dict[Node, int] = {self._tree.root: 0}
        leaves: list[tuple[int, Node]] = []
        for node in self._tree.nodes():
            depth[node] = (depth[node.parent] if node.parent is not None else 0) + node.page_count
            if not node.children:
                leaves.append((depth[node], node))
        leaves.sort(key=lambda item: item[0], reverse=True)
        pinned = {id(pin.lock.node) for pin in self._pins.values()}
        infos = []
        for pages, leaf in leaves[:count]:
            path = self._path(leaf)
            tokens = np.frombuffer(b"".join(node.tokens for node in path), dtype=np.int32)
            infos.append(PrefixInfo(tokens, pages, leaf.locks, any(id(node) in pinned for node in path)))
        return infos

    def check_integrity(self, *, deep: bool = True) -> None:
        """Proves that every page is in exactly one place. Raises `IntegrityError` that says what is wrong.

        Walks the whole tree: for tests and for `Stats`, not for every step. Not `deep`: compares counts alone, in a
        time that does not grow with the pool.
        """
        self.allocator.check_integrity(deep=deep)
        cached = self.allocator.count(PageState.CACHED)
        if self._tree.page_count != cached:
            raise IntegrityError(f"{self._tree.page_count} pages in the tree, {cached} counted")
        if not 0 <= self._evictable <= cached:
            raise IntegrityError(f"{self._evictable} pages are counted as evictable, of {cached}")
        limbo = sum(len(what) for _, what in self._limbo if not isinstance(what, PrefixLock))
        if limbo > self.allocator.count(PageState.OWNED):
            raise IntegrityError(f"{limbo} pages wait for a step, more than the OWNED ones")
        if deep:
            self._check_tree()

    def _check_tree(self) -> None:
        self._tree.check_integrity()
        cached = np.frombuffer(b"".join([node.page_ids for node in self._tree.nodes()]), dtype=np.int32)
        if len(np.unique(cached)) != len(cached):
            raise IntegrityError("a page is in the tree twice")
        if len(wrong := self.allocator.astray(cached, PageState.CACHED)):
            raise IntegrityError(f"pages in the tree that are not CACHED: {wrong[:8].tolist()}")
        evictable = sum(node.page_count for node in self._tree.nodes() if not node.locks)
        if evictable != self._evictable:
            raise IntegrityError(f"{evictable} pages are evictable, counted as {self._evictable}")
        if self._tree.root.locks:
            raise IntegrityError("the root is never locked")
        top = sum(node.locks for node in (self._tree.root.children or {}).values())
        if top > self._locks:
            raise IntegrityError(f"{top} locks reach the tree, {self._locks} are held")

    # --- inner ------------------------------------------------------------------------------------------------------

    def _prepare(self, tokens: npt.ArrayLike, limit: int | None) -> tuple[bytes, int]:
        """The token bytes, and how many of them are whole pages within `limit` tokens."""
        array = np.ascontiguousarray(tokens, dtype=np.int32)
        length = len(array) if limit is None else max(0, min(limit, len(array)))
        return array.tobytes(), length // self.page_size * self._tree.page_bytes

    def _quiet_lock(self, tokens: npt.ArrayLike, length: int) -> PrefixLock:
        """A lock that does not count as a lookup."""
        lookups, hits = self._lookup_tokens, self._hit_tokens
        lock = self.acquire(tokens, length)
        self._lookup_tokens, self._hit_tokens = lookups, hits
        return lock

    def _hold(self, path: list[Node]) -> None:
        self._tick += 1
        tick = self._tick
        taken = 0
        for node in path:
            if node.locks == 0:
                taken += len(node.page_ids)
            node.locks += 1
            node.last_used = tick
        self._evictable -= taken // PAGE_ID_BYTES

    def _drop(self, lock: PrefixLock) -> None:
        self._tick += 1
        tick = self._tick
        given = 0
        node: Node | None = lock.node
        while node is not None and node.parent is not None:
            if node.locks < 1:
                raise IntegrityError("a lock was released on a node that has none")
            node.locks -= 1
            node.last_used = tick
            if node.locks == 0:
                given += len(node.page_ids)
            node = node.parent
        self._evictable += given // PAGE_ID_BYTES
        self._locks -= 1
        self._leaves.offer(lock.node)
        self._leaves.compact(self._tree.node_count)

    def _evict(self, count: int) -> None:
        while count > 0:
            leaf = self._leaves.pop()
            if leaf is None:
                raise IntegrityError(f"{self._evictable} pages are counted as evictable, but no leaf is")
            taken = min(count, leaf.page_count)
            self._trim(leaf, taken)
            count -= taken

    def _trim(self, leaf: Node, pages: int) -> None:
        parent = leaf.parent
        freed = self._tree.trim(leaf, pages)
        self._evictable -= len(freed)
        self._evicted_pages += len(freed)
        self.allocator.move(freed, PageState.CACHED, PageState.FREE)
        if leaf.parent is not None:
            self._leaves.offer(leaf)
        elif parent is not None:
            self._leaves.offer(parent)

    @staticmethod
    def _path(node: Node) -> list[Node]:
        path = []
        step: Node | None = node
        while step is not None and step.parent is not None:
            path.append(step)
            step = step.parent
        path.reverse()
        return path


__all__ = [
    "EMPTY",
    "CacheStatistics",
    "IntegrityError",
    "KvCache",
    "Match",
    "PrefixInfo",
    "PrefixLock",
]
