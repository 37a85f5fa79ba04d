"""The prefix tree: token ids in whole pages on compressed edges, and the page that holds each.

An edge is a byte string of token ids (int32, native order) and a byte string of page numbers (int32), so that
comparing is one `memcmp` and joining a path is one `join`. Children are keyed by the bytes of their first page. Locks
count on nodes: a lock on a node counts on each of its ancestors too, so a node without locks has no locked descendant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from microserve.kv.pages import IntegrityError, PageArray

if TYPE_CHECKING:
    from collections.abc import Iterator

TokenArray = npt.NDArray[np.int32]

TOKEN_BYTES = 4
PAGE_ID_BYTES = 4


class Node:
    """One edge of the tree and what hangs below it.

    `tokens` holds whole pages; `page_ids` one int32 for each. `locks` counts the locks on this node or below it;
    `last_used` is the tree's tick at the last use; `queued` is the tick with which it stands in the eviction queue.
    """

    __slots__ = ("children", "last_used", "locks", "page_ids", "parent", "queued", "tokens")

    def __init__(self, parent: Node | None, tokens: bytes, page_ids: bytes, last_used: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.page_ids = page_ids
        self.children: dict[bytes, Node] | None = None
        self.locks = 0
        self.last_used = last_used
        self.queued = -1

    @property
    def page_count(self) -> int:
        return len(self.page_ids) // PAGE_ID_BYTES

    def pages(self) -> PageArray:
        """This edge's page numbers, int32 (read-only)."""
        return np.frombuffer(self.page_ids, dtype=np.int32)


class Walk:
    """Where a walk down the tree ended: the path of whole edges, and how many pages of one more edge agreed."""

    __slots__ = ("length", "partial", "partial_pages", "path")

    def __init__(self, path: list[Node], length: int, partial: Node | None, partial_pages: int) -> None:
        self.path = path
        self.length = length
        """Bytes of tokens that agreed, the partial edge included."""
        self.partial = partial
        self.partial_pages = partial_pages


class RadixTree:
    """Structure only: which page holds the KV of which tokens after which prefix. The cache says who owns pages."""

    def __init__(self, page_size: int) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.root = Node(None, b"", b"", 0)
        self.node_count = 0
        self.page_count = 0

    def walk(self, start: Node, data: bytes, position: int, end: int) -> Walk:
        """Follows `data[position:end]` (whole pages) down from `start`, which stands at `position`."""
        page_bytes = self.page_bytes
        path: list[Node] = []
        append = path.append
        node = start
        while position < end:
            children = node.children
            if children is None:
                break
            child = children.get(data[position : position + page_bytes])
            if child is None:
                break
            edge = child.tokens
            size = len(edge)
            if position + size <= end and data.startswith(edge, position):
                append(child)
                position += size
                node = child
                continue
            agreed = self._agreement(edge, data, position, end)
            return Walk(path, position + agreed * page_bytes, child, agreed)
        return Walk(path, position, None, 0)

    def _agreement(self, edge: bytes, data: bytes, position: int, end: int) -> int:
        """Whole pages of `edge` that `data[position:end]` begins with; at least 1, as the key agreed."""
        size = min(len(edge), end - position)
        ours = np.frombuffer(edge, dtype=np.int32, count=size // TOKEN_BYTES)
        theirs = np.frombuffer(data, dtype=np.int32, count=size // TOKEN_BYTES, offset=position)
        differs = ours != theirs
        first = int(differs.argmax()) if differs.any() else len(ours)
        return first * TOKEN_BYTES // self.page_bytes

    def split(self, node: Node, pages: int) -> Node:
        """Cuts `node` after `pages` pages; the new upper half is returned, `node` itself remains as the lower half.

        Locks on `node` stay on it, and count on the upper half as they do on any ancestor.
        """
        cut, cut_ids = pages * self.page_bytes, pages * PAGE_ID_BYTES
        parent = node.parent
        if parent is None or parent.children is None or not 0 < cut < len(node.tokens):
            raise IntegrityError(f"cannot split an edge of {node.page_count} pages after {pages}")
        upper = Node(parent, node.tokens[:cut], node.page_ids[:cut_ids], node.last_used)
        upper.locks = node.locks
        upper.children = {node.tokens[cut : cut + self.page_bytes]: node}
        parent.children[node.tokens[: self.page_bytes]] = upper
        node.parent, node.tokens, node.page_ids = upper, node.tokens[cut:], node.page_ids[cut_ids:]
        self.node_count += 1
        return upper

    def add(self, parent: Node, tokens: bytes, page_ids: bytes, last_used: int) -> Node:
        """Hangs a new edge below `parent`, which has no child that begins with the same page."""
        node = Node(parent, tokens, page_ids, last_used)
        if parent.children is None:
            parent.children = {}
        parent.children[tokens[: self.page_bytes]] = node
        self.node_count += 1
        self.page_count += node.page_count
        return node

    def trim(self, leaf: Node, pages: int) -> PageArray:
        """Takes the last `pages` pages off a leaf (the whole leaf, if it has no more) and returns them."""
        if leaf.children or leaf.parent is None or leaf.parent.children is None:
            raise IntegrityError("only a leaf can be trimmed")
        if pages >= leaf.page_count:
            del leaf.parent.children[leaf.tokens[: self.page_bytes]]
            if not leaf.parent.children:
                leaf.parent.children = None
            leaf.parent = None
            self.node_count -= 1
            self.page_count -= leaf.page_count
            return leaf.pages()
        taken = leaf.pages()[-pages:]
        leaf.tokens = leaf.tokens[: -pages * self.page_bytes]
        leaf.page_ids = leaf.page_ids[: -pages * PAGE_ID_BYTES]
        self.page_count -= pages
        return taken

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            if node is not self.root:
                yield node

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if an edge, a key, a parent or a count is wrong."""
        nodes = pages = 0
        for node in self.nodes():
            nodes += 1
            pages += node.page_count
            if not node.tokens or len(node.tokens) != node.page_count * self.page_bytes:
                raise IntegrityError(f"an edge of {len(node.tokens)} token bytes names {node.page_count} pages")
            parent = node.parent
            if parent is None or not parent.children or parent.children.get(node.tokens[: self.page_bytes]) is not node:
                raise IntegrityError("a node is not where its parent looks for it")
            if node.locks < 0 or sum(child.locks for child in (node.children or {}).values()) > node.locks:
                raise IntegrityError("a node has fewer locks than its children")
        if (nodes, pages) != (self.node_count, self.page_count):
            raise IntegrityError(
                f"the tree has {nodes} nodes and {pages} pages, counted as {self.node_count} and {self.page_count}"
            )
