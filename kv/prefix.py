"""What the cache hands out: matches and locks of prefixes, and views for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microserve.kv.pages import PageArray
    from microserve.kv.radix import Node, TokenArray


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree holds of a prompt: `length` tokens (whole pages) in `pages`, int32."""

    length: int
    pages: PageArray


class PrefixLock:
    """The right to read the pages of a prefix until it is released. `pages` int32 cover `length` tokens."""

    __slots__ = ("held", "length", "node", "pages")

    def __init__(self, node: Node, length: int, pages: PageArray) -> None:
        self.node = node
        self.length = length
        self.pages = pages
        self.held = True


@dataclass(frozen=True, slots=True)
class PrefixInfo:
    """One prefix of the tree, from the root to the end of an edge, for people to look at."""

    tokens: TokenArray
    pages: int
    """Pages from the root to its end."""
    references: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Pages by state (they add up to `total`), and what was counted since the start."""

    total: int
    free: int
    owned: int
    cached: int
    leased: int
    quarantined: int
    evictable: int
    pinned: int
    """Pages under pins (a page under two pins counts twice)."""
    nodes: int
    locks: int
    lookup_tokens: int
    hit_tokens: int
    evicted_pages: int
    inserted_pages: int
