"""Which engine probably holds which prefix: what this router sent where, by page.

It costs no message, and what it says may be stale: an engine evicts, and other routers send, too. `prep_recv` and
`start_generate` match for real, so a wrong guess costs only the advantage.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

from microserve.runtime.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

E = TypeVar("E", bound="Hashable")

_CAPACITY = 500_000
"""Pages that are remembered."""
_SWEEP_AT = 64
"""Engines that are gone and still have their bit in the pages; then all pages are looked through once."""

_TOKEN_BYTES = 4


def page_names(model: str, prompt: bytes, page_size: int) -> list[int]:
    """A number for each whole page of a prompt (little-endian int32), which depends on every token before, too.

    The numbers are this process's own.
    """
    size = page_size * _TOKEN_BYTES
    name = hash((model, page_size))
    names = []
    for begin in range(0, len(prompt) - size + 1, size):
        name = hash((name, prompt[begin : begin + size]))
        names.append(name)
    return names


class PrefixIndex(Generic[E]):
    """Engines by page. An engine is a bit; a page is the set of engines that hold it, as a number."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        if capacity < 1:
            raise InternalError(f"an index of {capacity} pages holds nothing")
        self._capacity = capacity
        self._pages: OrderedDict[int, int] = OrderedDict()
        """The least recently used first; of one prompt, the last page first."""
        self._bits: dict[E, int] = {}
        self._free: list[int] = []
        self._gone = 0

    def __len__(self) -> int:
        return len(self._pages)

    def record(self, engine: E, names: Sequence[int]) -> None:
        """`engine` holds these pages of one prompt, from its first on."""
        bit, pages = self._bit(engine), self._pages
        for name in reversed(names):
            pages[name] = pages.get(name, 0) | bit
            pages.move_to_end(name)
        while len(pages) > self._capacity:
            pages.popitem(last=False)

    def drop(self, engine: E, name: int) -> None:
        """The engine does not hold this page, as far as we are to believe."""
        holders = self._pages.get(name, 0)
        if holders & (bit := self._bits.get(engine, 0)):
            if holders == bit:
                del self._pages[name]
            else:
                self._pages[name] = holders & ~bit

    def match(self, names: Sequence[int]) -> dict[E, int]:
        """How many pages, from the first on, each engine holds; those that hold none are left out."""
        found: dict[E, int] = {}
        engines = {bit: engine for engine, bit in self._bits.items()}
        alive = self._pages.get(names[0], 0) & ~self._gone if names else 0
        depth = 0
        for depth, name in enumerate(names):
            here = self._pages.get(name, 0) & alive
            # Engines are looked at where their prefix ends, and not at every page.
            for bit in _bits(alive ^ here):
                found[engines[bit]] = depth
            alive = here
            if not alive:
                break
        for bit in _bits(alive):
            found[engines[bit]] = depth + 1
        return found

    def depth(self, engine: E, names: Sequence[int]) -> int:
        """How many pages, from the first on, `engine` holds."""
        bit = self._bits.get(engine, 0)
        for depth, name in enumerate(names):
            if not self._pages.get(name, 0) & bit:
                return depth
        return len(names)

    def forget(self, engine: E) -> None:
        """The engine is gone: it holds nothing. Idempotent."""
        bit = self._bits.pop(engine, None)
        if bit is None:
            return
        self._gone |= bit
        if self._gone.bit_count() >= _SWEEP_AT:
            self._sweep()

    def check_integrity(self) -> None:
        """Raises `InternalError` when a page is held by nobody that was ever known."""
        known = self._gone
        for bit in self._bits.values():
            known |= bit
        for holders in self._pages.values():
            if not holders or holders & ~known:
                raise InternalError(f"a page is held by {holders:b}, of {known:b}")

    def _bit(self, engine: E) -> int:
        bit = self._bits.get(engine)
        if bit is None:
            used = len(self._bits) + self._gone.bit_count() + len(self._free)
            bit = self._bits[engine] = self._free.pop() if self._free else 1 << used
        return bit

    def _sweep(self) -> None:
        kept = ~self._gone
        self._pages = OrderedDict((name, left) for name, held in self._pages.items() if (left := held & kept))
        self._free.extend(_bits(self._gone))
        self._gone = 0


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
