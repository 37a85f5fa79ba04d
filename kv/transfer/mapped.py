"""Peers on this host whose memory is mapped here, and posts that copy into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from microserve.runtime.errors import TransferFailed
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.kv.transfer.cuda_ipc import NearMemory, Reach, SharedMemory
    from microserve.kv.transfer.plan import Runs

POOL: Final = 0
SCRATCH: Final = 1
"""Where a peer's areas stand among those that it shares."""

_log = get_logger(__name__)


class CopyPost:
    """One push by copies into mapped memory. Its notification is sent by whoever finds that all is written."""

    __slots__ = ("_told", "_written", "error", "nbytes", "notification", "peer")

    def __init__(self, peer: str, written: Callable[[], bool], nbytes: int, notification: bytes) -> None:
        self.peer = peer
        self.nbytes = nbytes
        self.notification = notification
        self.error = ""
        self._written = written
        self._told = False

    def advance(self, agent: Any) -> str:
        """As `NixlPost.advance`."""
        if self.error:
            return "ERR"
        if not self._told:
            if not self._written():
                return "PROC"
            agent.send_notif(self.peer, self.notification)
            self._told = True
        return "DONE"

    def release(self, agent: Any) -> None:
        """Nothing is held."""


class MappedPeers:
    """Which peers are mapped. Without `near`, none is. For the transfer thread, which has the device's context."""

    def __init__(self, near: NearMemory | None) -> None:
        self._near = near
        self._reached: dict[str, Reach] = {}

    @property
    def names(self) -> frozenset[str]:
        """The peers that are mapped."""
        return frozenset(self._reached)

    def __contains__(self, peer: str) -> bool:
        return peer in self._reached

    def share(self, pool: int, scratch: int) -> tuple[SharedMemory, SharedMemory] | None:
        """What peers need to map what begins at these addresses, `POOL` first; None where nobody can."""
        if self._near is None:
            return None
        try:
            return self._near.share(pool), self._near.share(scratch)
        except TransferFailed as error:
            _log.info("peers on this host push here through UCX", reason=str(error))
            return None

    def map(self, peer: str, areas: Sequence[SharedMemory]) -> None:
        """Maps what `peer`, on this host, shares. Where that cannot be, it is not mapped. Idempotent."""
        if self._near is None or peer in self._reached:
            return
        try:
            self._reached[peer] = self._near.reach(areas)
            _log.info("pushes go straight into the peer's pool", peer=peer)
        except Exception as error:  # torch raises what it likes, and UCX does it as well
            _log.info("pushes go through UCX", peer=peer, reason=str(error) or repr(error))

    def unmap(self, peer: str) -> None:
        """Waits for copies to `peer`, and gives its memory back: mapped, it stays taken when its process is dead."""
        if (reach := self._reached.pop(peer, None)) is not None:
            reach.close()

    def copy(
        self, peer: str, found: Runs, here: int, area: int, page_bytes: int, notification: bytes
    ) -> CopyPost | None:
        """Begins to copy runs of pages, from our address `here` on into an area of `peer`; None where it cannot be."""
        if (reach := self._reached.get(peer)) is None:
            return None
        try:
            written = reach.copy(found, here, reach.addresses[area], page_bytes)
        except Exception as error:  # whatever it was, nothing is under way, and UCX does it as well
            _log.warning("pushes go through UCX", peer=peer, reason=str(error) or repr(error))
            self.unmap(peer)
            return None
        return CopyPost(peer, written, sum(run[2] for run in found) * page_bytes, notification)

    def wake(self, peer: str, here: int, nbytes: int) -> None:
        """Begins to copy `nbytes` into the scratch area of `peer`, which is mapped. Raises `TransferFailed`."""
        reach = self._reached[peer]
        reach.wake(here, reach.addresses[SCRATCH], nbytes)
