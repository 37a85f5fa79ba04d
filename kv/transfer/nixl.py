"""The transport of engines: NIXL over UCX. One-sided writes from our pool into a peer's, on a host and between hosts.

The only module that imports nixl. What NIXL does that one has to know (version 1.5.1):

* On shared memory a post copies inside the call. The completion is notified to the peer when *we* poll.
* A dead peer raises from `transfer` or `check_xfer_state`; a stopped one leaves a transfer in progress for ever.
  A released transfer is not a stopped one, so a post is released only after it is done or has failed.
* Empty descriptor lists are errors; metadata that changed under a known agent name is refused, so the name holds the
  epoch; the agent is not thread-safe; its progress thread spins, so we poll instead.
* It listens on every interface unless `UCX_NET_DEVICES` says otherwise, and its metadata grants writes to all that is
  registered: it travels on authenticated sessions alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from microserve.kv.transfer.base import KvMemory, LinkReport, PostState, PostStatus
from microserve.kv.transfer.plan import descriptors, runs
from microserve.runtime.errors import ConfigError
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from microserve.kv.pages import PageArray

_CONNECT_TIMEOUT = 5.0
"""Seconds that a peer gets to answer the first push."""
_PROBES = 3
_HOST_PROBE_BYTES = 8 << 20
_DEVICE_PROBE_BYTES = 64 << 20
_POLL = 20e-6

_log = get_logger(__name__)


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer needs to write into our pool, and to probe the way."""

    agent: bytes
    host: str
    address: int
    page_bytes: int
    total_pages: int
    kind: str
    device: int
    scratch: int
    scratch_bytes: int


class NixlPost:
    """One push."""

    __slots__ = ("handle", "nbytes", "peer", "status")

    def __init__(self, peer: str, handle: Any, nbytes: int, status: PostStatus) -> None:
        self.peer = peer
        self.handle = handle
        self.nbytes = nbytes
        self.status = status


class NixlTransport:
    """Implements `base.Transport`. A push to ourselves is a copy within the pool."""

    name = "nixl"

    def __init__(self, me: str, memory: KvMemory, *, devices: str) -> None:
        """`devices` are those that UCX may use (`UCX_NET_DEVICES`). Raises `ConfigError` when NIXL cannot start."""
        self.me = me
        self.memory = memory
        self._peers: dict[str, _Metadata] = {}
        self._own: deque[tuple[str, bytes]] = deque()
        self._lost: list[Any] = []
        """Transfers that nobody waits for and that have not ended: they must not be released."""
        self._thread = 0
        kind, _, number = memory.device.partition(":")
        self._kind = "VRAM" if kind == "cuda" else "DRAM"
        self._device = int(number or 0)
        self._agent = _open_agent(me, devices)
        self._scratch, scratch, size = _scratch(memory)
        regions = [(memory.address, memory.page_bytes * memory.total_pages, self._device, "")]
        regions.append((scratch, size, self._device, ""))
        try:
            self._registered = self._agent.register_memory(regions, self._kind)
        except Exception as error:  # its errors have no common base
            raise ConfigError(f"the KV pool cannot be registered with NIXL: {error!r}") from error
        self._metadata = _Metadata(
            agent=self._agent.get_agent_metadata(),
            host=host_id(),
            address=memory.address,
            page_bytes=memory.page_bytes,
            total_pages=memory.total_pages,
            kind=self._kind,
            device=self._device,
            scratch=scratch,
            scratch_bytes=size,
        )

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._metadata)

    def connect(self, peer: str, metadata: bytes) -> LinkReport:
        self._enter()
        if peer == self.me:
            return LinkReport("local")
        try:
            theirs = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.DecodeError as error:
            return LinkReport("", error=f"its metadata makes no sense: {error}")
        if theirs.page_bytes != self.memory.page_bytes:
            return LinkReport("", error=f"its pages have {theirs.page_bytes} bytes, ours {self.memory.page_bytes}")
        try:
            if peer not in self._peers:
                named = self._agent.add_remote_agent(theirs.agent)
                if (named.decode() if isinstance(named, bytes) else named) != peer:
                    return LinkReport("", error=f"its metadata is {named!r}'s")
                self._peers[peer] = theirs
            seconds = self._probe(peer, theirs)
        except Exception as error:  # as above: whatever it is, the peer cannot be reached
            self.disconnect(peer)
            return LinkReport("", error=f"it cannot be reached over NIXL: {error!r}")
        if seconds is None:
            self.disconnect(peer)
            return LinkReport("", error=f"it did not answer within {_CONNECT_TIMEOUT:g} s")
        rate = min(self._metadata.scratch_bytes, theirs.scratch_bytes) / seconds / 1e9
        return LinkReport(self._link_kind(theirs), rate)

    def disconnect(self, peer: str) -> None:
        if self._peers.pop(peer, None) is not None:
            with contextlib.suppress(Exception):  # it may be gone already, in more than one way
                self._agent.remove_remote_agent(peer)

    def post(self, peer: str, source: PageArray, target: PageArray, notification: bytes) -> NixlPost | str:
        self._enter()
        if len(source) == 0 or len(source) != len(target):
            return f"{len(source)} pages cannot go into {len(target)}"
        nbytes = len(source) * self.memory.page_bytes
        if peer == self.me:
            self._copy(source, target)
            self._own.append((self.me, notification))
            return NixlPost(peer, None, nbytes, PostStatus(PostState.DONE))
        theirs = self._peers.get(peer)
        if theirs is None:
            return f"{peer} is not connected"
        if int(target.max()) >= theirs.total_pages or int(target.min()) < 0:
            return f"{peer} has {theirs.total_pages} pages; a page outside of them was named"
        here, there = descriptors(runs(source, target), self.memory.address, theirs.address, self.memory.page_bytes)
        try:
            return self._start(peer, theirs, here, there, notification, nbytes)
        except Exception as error:  # a dead peer raises here, and its errors have no common base
            return f"the push could not begin: {error!r}"

    def poll(self, post: NixlPost) -> PostStatus:  # type: ignore[override, unused-ignore]
        if post.status.state is PostState.ACTIVE:
            post.status = self._look(post.handle)
        return post.status

    def release(self, post: NixlPost) -> None:  # type: ignore[override, unused-ignore]
        if post.handle is not None:
            with contextlib.suppress(Exception):  # of a transfer to a dead peer nothing is left to free
                self._agent.release_xfer_handle(post.handle)
            post.handle = None

    def arrivals(self) -> list[tuple[str, bytes]]:
        self._enter()
        found = list(self._own)
        self._own.clear()
        try:
            notified: dict[Any, list[bytes]] = self._agent.get_new_notifs()
        except Exception as error:  # whatever it is, later looks may be better
            _log.warning("notifications cannot be read", every=10.0, error=repr(error))
            return found
        for name, messages in notified.items():
            peer = name.decode() if isinstance(name, bytes) else name
            found.extend((peer, message) for message in messages if message != _PROBE)
        return found

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        if self._registered is not None:
            with contextlib.suppress(Exception):  # the process ends anyway
                self._agent.deregister_memory(self._registered)
            self._registered = None

    # --- inner -------------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """CUDA's current device belongs to the thread."""
        if self._kind == "VRAM" and self._thread != threading.get_ident():
            import torch

            torch.cuda.set_device(self._device)
            self._thread = threading.get_ident()

    def _start(
        self, peer: str, theirs: _Metadata, here: np.ndarray, there: np.ndarray, notification: bytes, nbytes: int
    ) -> NixlPost:
        local = self._agent.get_xfer_descs(_with_device(here, self._device), self._kind)
        remote = self._agent.get_xfer_descs(_with_device(there, theirs.device), theirs.kind)
        handle = self._agent.initialize_xfer("WRITE", local, remote, peer, notification)
        state = self._agent.transfer(handle)
        return NixlPost(peer, handle, nbytes, _status(state))

    def _look(self, handle: Any) -> PostStatus:
        try:
            return _status(self._agent.check_xfer_state(handle))
        except Exception as error:  # a dead peer raises here
            return PostStatus(PostState.FAILED, f"the push failed: {error!r}")

    def _probe(self, peer: str, theirs: _Metadata) -> float | None:
        """Warms the way, then the seconds of the fastest of a few pushes between scratch areas; None: no answer."""
        size = min(self._metadata.scratch_bytes, theirs.scratch_bytes)
        here = np.array([[self._metadata.scratch, size]], dtype=np.int64)
        there = np.array([[theirs.scratch, size]], dtype=np.int64)
        best = None
        until = time.monotonic() + _CONNECT_TIMEOUT
        for attempt in range(1 + _PROBES):
            began = time.monotonic()
            post = self._start(peer, theirs, here, there, _PROBE, size)
            while self.poll(post).state is PostState.ACTIVE:
                if time.monotonic() > until:
                    self._lost.append(post.handle)
                    return None
                time.sleep(_POLL)
            seconds = time.monotonic() - began
            self.release(post)
            if post.status.state is PostState.FAILED:
                raise RuntimeError(post.status.error)
            if attempt and (best is None or seconds < best):
                best = seconds
        return best

    def _copy(self, source: PageArray, target: PageArray) -> None:
        memory = self.memory
        if self._kind == "VRAM":
            import torch

            # The pool itself: `owner` is its tensor, pages first.
            pool: Any = memory.owner
            index = torch.from_numpy(np.ascontiguousarray(source, dtype=np.int64)).to(pool.device)
            where = torch.from_numpy(np.ascontiguousarray(target, dtype=np.int64)).to(pool.device)
            pool.index_copy_(0, where, pool.index_select(0, index))
            torch.cuda.current_stream(pool.device).synchronize()
            return
        size = memory.page_bytes
        for first, second, count in runs(source, target).tolist():
            ctypes.memmove(memory.address + second * size, memory.address + first * size, count * size)

    def _link_kind(self, theirs: _Metadata) -> str:
        """What UCX uses for large writes, as its own rules have it: it does not say."""
        allowed = os.environ.get("UCX_TLS", "all")
        only_tcp = allowed == "tcp" or set(allowed.split(",")) <= {"tcp", "self", "cuda_copy"}
        if theirs.host == self._metadata.host and not only_tcp:
            return "cuda_ipc" if "VRAM" in (self._kind, theirs.kind) else "shm"
        devices = os.environ.get("UCX_NET_DEVICES", "all")
        fabric = any(part.startswith(("mlx", "bnxt_re", "efa", "irdma")) for part in devices.split(","))
        return "tcp" if only_tcp or not fabric else "rdma"


_PROBE = b"probe"


def host_id() -> str:
    """What tells one running host from another: the id of this boot."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _open_agent(me: str, devices: str) -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("UCX_NET_DEVICES", devices)
    try:
        from nixl_cu13._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise ConfigError(f"transport nixl needs the package nixl-cu13: {error}") from error
    try:
        return nixl_agent(me, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    except Exception as error:  # its errors have no common base
        raise ConfigError(f"NIXL cannot start: {error!r}") from error


def _scratch(memory: KvMemory) -> tuple[object, int, int]:
    """An area that peers may write to at any time: (its owner, address, bytes)."""
    if memory.device.startswith("cuda"):
        import torch

        tensor = torch.zeros(_DEVICE_PROBE_BYTES, dtype=torch.uint8, device=memory.device)
        return tensor, tensor.data_ptr(), _DEVICE_PROBE_BYTES
    area = np.zeros(_HOST_PROBE_BYTES, dtype=np.uint8)
    return area, area.ctypes.data, _HOST_PROBE_BYTES


def _with_device(parts: np.ndarray, device: int) -> np.ndarray:
    return np.concatenate((parts, np.full((len(parts), 1), device, dtype=parts.dtype)), axis=1)


def _status(state: str) -> PostStatus:
    if state == "DONE":
        return PostStatus(PostState.DONE)
    if state == "PROC":
        return PostStatus(PostState.ACTIVE)
    return PostStatus(PostState.FAILED, "NIXL reports an error")
