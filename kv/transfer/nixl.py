"""Pushes over NIXL and UCX: NVLink, RDMA, shared memory or TCP, whatever UCX finds. The only module that imports nixl.

Where GPUs of one host reach each other, the pages are copied without UCX (`cuda_ipc`); their notification goes its way.
UCX is then told of no memory of the peer's GPU: what it once mapped it keeps, and a dead peer's pool would stay taken.

UCX is set up by environment variables that it reads when it is loaded; what is not set by us is the operator's.
Nothing happens behind our back: no thread of NIXL's runs, so transfers go on, notifications go out and peers are
answered only within `poll` and `arrivals`.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
import numpy as np

from microserve.kv.transfer.base import LinkReport, PostState, PostStatus
from microserve.kv.transfer.cuda_ipc import SharedMemory  # noqa: TC001 - msgspec reads it
from microserve.kv.transfer.mapped import POOL, SCRATCH, CopyPost, MappedPeers
from microserve.kv.transfer.plan import descriptors, planned
from microserve.kv.transfer.ucx_journal import UcxJournal
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import TransferFailed
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from microserve.kv.pages import PageArray
    from microserve.kv.transfer.base import KvMemory, Post
    from microserve.kv.transfer.cuda_ipc import NearMemory
    from microserve.kv.transfer.plan import DescriptorArray, Runs
    from microserve.runtime.clock import Clock

_WARM_BYTES: Final = 4096
_WAKING_BYTES: Final = 1 << 20
"""What wakes a link between GPUs, which slows down when it rests: a copy of 400 MB takes 1.01 ms, after 5 ms of rest
1.11, after 50 ms 1.38; with this much copied up to a millisecond before it, 1.02. 4 KiB do half of that."""
_MEASURED: Final = 2
"""Measured pushes of a probe; the best counts. The first still finds cold caches."""
_SCRATCH: Final = {"DRAM": 4 << 20, "VRAM": 32 << 20}
"""Bytes of each half of the scratch area: one that our probes read, one that the probes of peers write."""
_PROBED: Final = {"DRAM": 1, "VRAM": 8}
"""How often a measured push writes the scratch half: enough that a GPU's latency does not count."""
_PROBE: Final = b"microserve probe"
"""The notification of probes; `arrivals` shows it empty."""

_log = get_logger(__name__)


class _Metadata(msgspec.Struct, frozen=True):
    """What a peer is told of us. `host` says whether we share a machine."""

    agent: bytes
    """How its agent is connected to, and where it is greeted."""
    memory: bytes
    """What UCX needs to write into its pool and scratch area."""
    host: str
    segment: str
    device: int
    address: int
    page_bytes: int
    total_pages: int
    scratch: int
    scratch_bytes: int
    greeting: int
    """Where its host's memory is written by the first push of a connection to a peer that is mapped."""
    shared: tuple[SharedMemory, SharedMemory] | None = None
    """The pool and the scratch half that peers write, for peers that can map them."""


class NixlPost:
    """One push, by UCX."""

    __slots__ = ("error", "handle", "nbytes", "peer")

    def __init__(self, peer: str, handle: Any, nbytes: int) -> None:
        self.peer = peer
        self.handle = handle
        self.nbytes = nbytes
        self.error = ""
        """Why it counts as failed although UCX may still work on it."""

    def advance(self, agent: Any) -> str:
        """Drives it: "PROC", "DONE" or "ERR", as NIXL says it. Raises whatever NIXL raises."""
        return str(agent.check_xfer_state(self.handle))

    def release(self, agent: Any) -> None:
        agent.release_xfer_handle(self.handle)


class NixlTransport:
    """Implements `Transport`. One agent, with the pool, a scratch area and 8 KiB of host memory registered.

    The agent bears our incarnation's name, `me`: peers refuse metadata that changes under a name. `devices` is
    UCX_NET_DEVICES: the network devices that may be used; "lo" keeps to this host.
    """

    def __init__(
        self,
        memory: KvMemory,
        me: str,
        *,
        devices: str = "lo",
        near: NearMemory | None = None,
        connect_limit: float = 5.0,
        clock: Clock = monotonic,
    ) -> None:
        """`near`: how pools of peers on this host are reached without UCX.

        `connect_limit`: seconds that a peer may take to answer a probe.

        Raises `TransferFailed` when NIXL is missing or does not start.
        """
        self.me = me
        self._memory = memory
        self._clock = clock
        self._connect_limit = connect_limit
        self._segment = "VRAM" if memory.device.startswith("cuda") else "DRAM"
        self._device = int(memory.device.partition(":")[2] or 0) if self._segment == "VRAM" else 0
        self._thread = 0
        """The thread that has the device's context."""
        self._peers: dict[str, _Metadata] = {}
        self._mapped = MappedPeers(near)
        self._written: set[str] = set()
        """Peers whose memory UCX knows."""
        self._broken: dict[str, str] = {}
        """Peers that NIXL has lost, and why."""
        self._left: list[NixlPost | CopyPost] = []
        """Posts that count as failed and that are still worked on."""
        self._closed = False
        self._journal = _journal()
        self._bind()
        size = _SCRATCH[self._segment]
        self._scratch, self._scratch_owner = _allocate(2 * size, memory.device)
        self._greeting, self._greeting_owner = _allocate(2 * _WARM_BYTES, "cpu")
        os.environ["UCX_NET_DEVICES"] = devices
        # UCX takes SIGHUP for its debugger, and a process could not be told to read its configuration again.
        os.environ["UCX_DEBUG_SIGNO"] = "0"
        try:
            self._agent = _open_agent(me)
            areas = [(memory.address, memory.page_bytes * memory.total_pages), (self._scratch, 2 * size)]
            listed = [(address, length, self._device, "") for address, length in areas]
            greeted = self._agent.get_reg_descs([(self._greeting, 2 * _WARM_BYTES, 0, "")], "DRAM")
            written = self._agent.get_reg_descs(listed, self._segment)
            self._registered = [self._agent.register_memory(each) for each in (greeted, written)]
            agent_metadata: bytes = self._agent.get_partial_agent_metadata(greeted, True, ["UCX"])
            memory_metadata: bytes = self._agent.get_partial_agent_metadata(written, False, ["UCX"])
        except ImportError as error:
            raise TransferFailed(f"NIXL is not installed here: {error}") from error
        except Exception as error:  # its errors have no base of their own
            raise TransferFailed(f"NIXL does not start: {error!r}; {'; '.join(self._journal.read())}") from error
        finally:
            self._journal.settled()
        self._metadata = _Metadata(
            agent=agent_metadata,
            memory=memory_metadata,
            host=_host(),
            segment=self._segment,
            device=self._device,
            address=memory.address,
            page_bytes=memory.page_bytes,
            total_pages=memory.total_pages,
            scratch=self._scratch + size,
            scratch_bytes=size,
            greeting=self._greeting + _WARM_BYTES,
            shared=self._mapped.share(memory.address, self._scratch + size),
        )

    @property
    def name(self) -> str:
        return "nixl"

    @property
    def mapped(self) -> frozenset[str]:
        """Peers whose pools are mapped here: pages go there without UCX."""
        return self._mapped.names

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._metadata)

    # --- connections -------------------------------------------------------------------------------------------------

    def connect(self, peer: str, metadata: bytes) -> _Probe:
        self._bind()
        return _Probe(self, peer, self._introduce(peer, metadata), self._connect_limit, self._clock)

    def _introduce(self, peer: str, metadata: bytes) -> str:
        """Makes `peer` known to the agent. Why it cannot be reached; empty when it may."""
        try:
            theirs = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            return f"the metadata of {peer} makes no sense: {error}"
        ours = self._metadata
        if theirs.page_bytes != ours.page_bytes:
            return f"{peer} has pages of {theirs.page_bytes} bytes, we of {ours.page_bytes}"
        if self._peers.get(peer, theirs) != theirs:
            return f"{peer} has other metadata than when it was connected"
        if (broken := self._broken.get(peer)) is not None:
            return broken
        if peer != self.me and (refused := self._load(peer, theirs.agent)):
            return refused
        self._peers[peer] = theirs
        if peer != self.me and theirs.shared is not None and theirs.host == ours.host:
            self._mapped.map(peer, theirs.shared)
        return "" if peer in self._mapped else self._learn(peer)

    def _learn(self, peer: str) -> str:
        """Tells UCX of the memory of a peer that is known. Why it cannot write there; empty when it can."""
        if peer == self.me or peer in self._written:
            return ""
        if error := self._load(peer, self._peers[peer].memory):
            # NIXL then knows nothing of this peer any more, and takes nothing of it under that name again.
            self._broken[peer] = error
            _log.warning("nothing can be pushed to a peer until one of us starts anew", peer=peer, reason=error)
            return error
        self._written.add(peer)
        return ""

    def _load(self, peer: str, metadata: bytes) -> str:
        """Why NIXL does not take these words of `peer`; empty when it does."""
        try:
            found = self._agent.add_remote_agent(metadata)
        except Exception as error:  # its errors have no base of their own
            return f"NIXL does not take the metadata of {peer}: {error!r}"
        if (named := found.decode() if isinstance(found, bytes) else found) != peer:
            if named not in self._peers:
                self._forget_agent(named)
            return f"the metadata is that of {named}, not of {peer}"
        return ""

    def unmap(self, peer: str) -> None:
        """From here on, UCX pushes to `peer`. Waits for copies under way."""
        if peer in self._mapped:
            self._bind()
            self._mapped.unmap(peer)

    def disconnect(self, peer: str) -> None:
        self.unmap(peer)
        self._written.discard(peer)
        if self._peers.pop(peer, None) is not None and peer != self.me:
            self._forget_agent(peer)

    def _forget_agent(self, peer: str) -> None:
        try:
            self._agent.remove_remote_agent(peer)
        except Exception as error:  # its errors have no base of their own
            _log.debug("NIXL did not forget a peer", peer=peer, error=repr(error))
        self._tell_warnings()

    def probe(self, peer: str, *, warm: bool) -> NixlPost | CopyPost | str:
        """Starts to push our scratch area into the peer's. `warm`: a little, by UCX, whatever pushes go by."""
        theirs = self._peers[peer]
        size = min(_SCRATCH[self._segment], theirs.scratch_bytes)
        size, times = (min(_WARM_BYTES, size), 1) if warm else (size, _PROBED[self._segment])
        # As many times the only page of a pool, which is the scratch area.
        found = [(0, 0, 1)] * times
        if warm and peer in self._mapped:
            here = descriptors(found, 0, self._greeting, size, 0)
            return self._write(peer, here, descriptors(found, 1, theirs.greeting, size, 0), ("DRAM", "DRAM"), _PROBE)
        made = None if warm else self._mapped.copy(peer, found, self._scratch, SCRATCH, size, _PROBE)
        return made or self._post(peer, found, self._scratch, theirs.scratch, size, _PROBE)

    def kind(self, peer: str) -> str:
        """What carries pages to `peer`: as UCX says; where it does not, as it must be."""
        self._tell_warnings()
        if peer in self._mapped:
            return "cuda_ipc"
        near = self._peers[peer].host == self._metadata.host
        relation = "self" if peer == self.me else "intra-node" if near else "inter-node"
        memory = "cuda" if self._segment == "VRAM" else "host"
        return self._journal.kind(self.me, relation, memory) or _likely_kind(near, memory, self.me == peer)

    def _tell_warnings(self) -> None:
        for warning in self._journal.read():
            _log.warning("UCX warns", every=1.0, warning=warning)

    # --- pushes ------------------------------------------------------------------------------------------------------

    def warm(self, peer: str) -> bool:
        if peer not in self._mapped:
            return False
        self._bind()
        size = min(_WAKING_BYTES, self._metadata.scratch_bytes, self._peers[peer].scratch_bytes)
        try:
            self._mapped.wake(peer, self._scratch, size)
            self._agent.send_notif(peer, _PROBE)
        except Exception as error:  # NIXL's have no base of their own; the push itself will say what is wrong
            _log.debug("a way could not be warmed", peer=peer, error=repr(error))
        return True

    def post(self, peer: str, source: PageArray, target: PageArray, notification: bytes) -> NixlPost | CopyPost | str:
        self._bind()
        theirs = self._metadata if peer == self.me else self._peers.get(peer)
        if theirs is None:
            return f"{peer} is not connected"
        ours = self._metadata
        found = planned(source, target, ours.total_pages, theirs.total_pages)
        if isinstance(found, str):
            return found
        made = self._mapped.copy(peer, found, ours.address, POOL, ours.page_bytes, notification)
        return made or self._post(peer, found, ours.address, theirs.address, ours.page_bytes, notification)

    def _post(
        self, peer: str, found: Runs, here: int, there: int, page_bytes: int, notification: bytes
    ) -> NixlPost | str:
        """A post by UCX of runs of pages, from our address `here` on to the peer's `there` on."""
        theirs = self._metadata if peer == self.me else self._peers[peer]
        ours = descriptors(found, 0, here, page_bytes, self._device)
        others = descriptors(found, 1, there, page_bytes, theirs.device)
        if error := self._learn(peer):
            return error
        return self._write(peer, ours, others, (self._segment, theirs.segment), notification)

    def _write(
        self, peer: str, ours: DescriptorArray, others: DescriptorArray, segments: tuple[str, str], notification: bytes
    ) -> NixlPost | str:
        """A post by UCX from `ours` to `others`, which lie in memory of those two kinds."""
        agent = self._agent
        here, there = segments
        try:
            handle = agent.initialize_xfer(
                "WRITE", agent.get_xfer_descs(ours, here), agent.get_xfer_descs(others, there), peer, notification
            )
        except Exception as error:  # its errors have no base of their own
            return _describe(peer, error)
        made = NixlPost(peer, handle, int(ours[:, 1].sum()))
        try:
            state = agent.transfer(handle)
        except Exception as error:  # as above: the connection is broken, or the peer is dead
            made.error = _describe(peer, error)
        else:
            if state != "ERR":
                return made
            made.error = f"UCX could not begin to push to {peer}"
        self.release(made)
        self._tell_warnings()
        return made.error

    def poll(self, post: Post) -> PostStatus:
        self._bind()
        ours = cast("NixlPost | CopyPost", post)
        if ours.error:
            return PostStatus(PostState.FAILED, ours.error)
        if ours.peer not in self._peers and ours.peer != self.me:
            ours.error = f"{ours.peer} was disconnected"
            return PostStatus(PostState.FAILED, ours.error)
        state, error = self._state(ours)
        if state == "PROC":
            return PostStatus(PostState.ACTIVE)
        if state == "DONE":
            return PostStatus(PostState.DONE)
        ours.error = error or f"UCX could not push to {ours.peer}"
        self._tell_warnings()
        return PostStatus(PostState.FAILED, ours.error)

    def _state(self, post: NixlPost | CopyPost) -> tuple[str, str]:
        try:
            return post.advance(self._agent), ""
        except Exception as error:  # its errors have no base of their own
            post.error = post.error or _describe(post.peer, error)
            return "ERR", post.error

    def release(self, post: Post) -> None:
        ours = cast("NixlPost | CopyPost", post)
        if self._state(ours)[0] == "PROC":
            # Released now, it would go on all the same, and NIXL would wait for it in here.
            self._left.append(ours)
            return
        try:
            ours.release(self._agent)
        except Exception as error:  # its errors have no base of their own; there is nothing left to lose
            _log.debug("NIXL did not release a transfer", peer=ours.peer, error=repr(error))

    def arrivals(self) -> list[tuple[str, bytes]]:
        self._bind()
        for post in tuple(self._left):
            if self._state(post)[0] != "PROC":
                self._left.remove(post)
                self.release(post)
        found: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return [
            (peer, b"" if notification == _PROBE else notification)
            for peer, notifications in found.items()
            for notification in notifications
        ]

    # --- the rest ----------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """CUDA knows a device by what is current in a thread; UCX needs it to be ours."""
        if self._segment == "VRAM" and self._thread != threading.get_ident():
            import torch

            torch.cuda.set_device(self._device)
            torch.cuda.current_stream(self._device).synchronize()
            self._thread = threading.get_ident()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bind()
        for peer in list(self._peers):
            self.disconnect(peer)
        for each in self._registered:
            try:
                self._agent.deregister_memory(each)
            except Exception as error:  # its errors have no base of their own; the process goes on without it
                _log.debug("NIXL did not let go of memory", error=repr(error))
        self._left.clear()
        del self._agent
        self._tell_warnings()


class _Probe:
    """A connection that is being made: one small push opens and warms it, the next ones are measured."""

    def __init__(self, transport: NixlTransport, peer: str, error: str, limit: float, clock: Clock) -> None:
        self._transport = transport
        self._peer = peer
        self._clock = clock
        self._limit = limit
        self._until = clock() + limit
        self._left = 1 + _MEASURED
        self._best = 0.0
        self._post: NixlPost | CopyPost | None = None
        self._began = 0.0
        self._error = error

    def poll(self) -> LinkReport | None:
        while not self._error:
            if self._post is None:
                if not self._left:
                    return LinkReport(self._transport.kind(self._peer), self._best)
                self._begin()
                continue
            status = self._transport.poll(self._post)
            if status.state is PostState.ACTIVE:
                if self._clock() <= self._until:
                    return None
                self._error = f"{self._peer} did not answer within {self._limit:g} s"
            self._end(status)
        self._transport.unmap(self._peer)
        return LinkReport("", error=self._error)

    def _begin(self) -> None:
        self._began = self._clock()
        made = self._transport.probe(self._peer, warm=self._left > _MEASURED)
        if isinstance(made, str):
            self._error = made
        else:
            self._post = made

    def _end(self, status: PostStatus) -> None:
        post, self._post = self._post, None
        if post is None:
            return
        if status.state is PostState.FAILED:
            self._error = status.error
        elif self._left <= _MEASURED and (seconds := self._clock() - self._began) > 0:
            self._best = max(self._best, post.nbytes / seconds / 1e9)
        self._left -= 1
        self._transport.release(post)


@functools.cache
def _journal() -> UcxJournal:
    """UCX has one log in a process, however many agents there are."""
    return UcxJournal()


def _open_agent(name: str) -> Any:
    """An agent with UCX alone and no thread. Raises whatever NIXL raises, and `ImportError`."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what goes wrong is a value here, and is told by us
    raise_exceptions = logging.raiseExceptions
    import nixl_cu13 as nixl

    # It sets up logging to standard output while it is imported, and turns off complaints for everybody.
    logging.raiseExceptions = raise_exceptions
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _allocate(size: int, device: str) -> tuple[int, object]:
    """`size` bytes that were touched, on `device`: their address, and what keeps them alive."""
    if device == "cpu":
        made = np.full(size, 1, dtype=np.uint8)
        return made.ctypes.data, made
    import torch

    tensor = torch.ones(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    return tensor.data_ptr(), tensor


def _host() -> str:
    """This machine, as long as it runs."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _likely_kind(near: bool, memory: str, ourselves: bool) -> str:
    """What UCX would choose, where its own word cannot be had."""
    allowed = os.environ.get("UCX_TLS", "all")
    if allowed == "tcp":
        return "tcp"
    if near or ourselves:
        return "cuda_ipc" if memory == "cuda" else "shm"
    # Devices of RDMA are named with their port, "mlx5_0:1"; interfaces of the kernel are not.
    return "rdma" if ":" in os.environ.get("UCX_NET_DEVICES", "") else "tcp"


def _describe(peer: str, error: Exception) -> str:
    return f"pushing to {peer}: {type(error).__name__.removeprefix('nixl')}: {error}"
