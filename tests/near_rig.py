"""Memory of "another process" that is in this one: what CUDA IPC does between processes, for tests without a GPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from microserve.kv.transfer.cuda_ipc import SharedMemory
from microserve.runtime.errors import TransferFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.kv.transfer.plan import Runs

_LOOKS = 2
"""Looks at a copy that find it under way."""


class LocalMemory:
    """Implements `NearMemory`. A copy is made when it is looked at for the third time, or its reach is closed."""

    def __init__(self) -> None:
        self.copied = 0
        """Bytes."""
        self.woken = 0
        """Bytes that nobody awaited."""
        self.open = 0
        """Areas that are mapped."""
        self.broken = ""
        """Why nothing can be mapped, or copied."""

    def share(self, address: int) -> SharedMemory:
        return SharedMemory(b"%d" % (address - 8), 8)

    def reach(self, areas: Sequence[SharedMemory]) -> LocalReach:
        if self.broken:
            raise TransferFailed(self.broken)
        self.open += len(areas)
        return LocalReach(self, tuple(int(area.handle) + area.offset for area in areas))


class LocalReach:
    """Implements `Reach`."""

    def __init__(self, memory: LocalMemory, addresses: tuple[int, ...]) -> None:
        self.addresses = addresses
        self._memory = memory
        self._ordered: list[_Copy] = []

    def copy(self, runs: Runs, source: int, target: int, page_bytes: int) -> Callable[[], bool]:
        if self._memory.broken:
            raise TransferFailed(self._memory.broken)
        pieces = [(source + a * page_bytes, target + b * page_bytes, count * page_bytes) for a, b, count in runs]
        self._memory.copied += sum(size for _, _, size in pieces)
        self._ordered.append(_Copy(pieces))
        return self._ordered[-1].look

    def wake(self, source: int, target: int, nbytes: int) -> None:
        if self._memory.broken:
            raise TransferFailed(self._memory.broken)
        self._memory.woken += nbytes

    def close(self) -> None:
        self._memory.open -= len(self.addresses)
        for copy in self._ordered:
            copy.make()


class _Copy:
    def __init__(self, pieces: list[tuple[int, int, int]]) -> None:
        self._pieces = pieces
        self._left = _LOOKS

    def look(self) -> bool:
        if self._left:
            self._left -= 1
            return False
        self.make()
        return True

    def make(self) -> None:
        for source, target, size in self._pieces:
            ctypes.memmove(target, source, size)
        self._pieces.clear()
        self._left = 0
