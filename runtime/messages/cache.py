"""The prefix tree of an engine."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from microserve.runtime.messages.base import Message, TokenBytes


class CacheMatch(Message, tag="cache_match", frozen=True):
    """How much of a prompt the prefix tree holds. Reply: `CacheMatched`."""

    prompt: TokenBytes


class CachePin(Message, tag="cache_pin", frozen=True):
    """Keep what is cached of a prompt for `ttl` seconds; again renews it. Reply: `CacheMatched`: the tokens pinned."""

    prompt: TokenBytes
    ttl: Annotated[float, Meta(gt=0, le=31_536_000)]


class CacheUnpin(Message, tag="cache_unpin", frozen=True):
    """End the pin on the longest pinned prefix of a prompt. Reply: `CacheMatched`: the tokens that were pinned."""

    prompt: TokenBytes


class CacheEvict(Message, tag="cache_evict", frozen=True):
    """Free cached pages that nobody uses or pinned: all, or a prompt's own. Reply: `CacheEvicted`."""

    prompt: TokenBytes | None = None


class CachePrefixes(Message, tag="cache_prefixes", frozen=True):
    """The longest prefixes of the tree, longest first. Reply: `Prefixes`."""

    count: Annotated[int, Meta(ge=1, le=1000)] = 20


class CacheMatched(Message, tag="cache_matched", frozen=True):
    tokens: int


class CacheEvicted(Message, tag="cache_evicted", frozen=True):
    pages: int


class PrefixEntry(Struct, frozen=True, kw_only=True):
    """One prefix of the tree. `prompt` is all of its token ids."""

    prompt: TokenBytes
    pages: int
    references: int
    pinned: bool


class Prefixes(Message, tag="prefixes", frozen=True):
    prefixes: list[PrefixEntry]
