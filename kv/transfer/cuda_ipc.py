"""The GPU memory of peers on this host, mapped into our process, and copies into it by the GPU's copy engines.

UCX's `cuda_ipc` maps the same memory, and orders a copy for each run of pages: 4 to 9 µs each. Here the runs of a push
are one order, 1 µs each, so that a push of scattered pages is nearly as fast as one of a single run. No multiprocessor
takes part. The calls are those of the CUDA Driver API (cuIpc*, cuMemcpyBatchAsync).
"""

from __future__ import annotations

import ctypes
import os
from array import array
from contextlib import suppress
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from microserve.runtime.errors import TransferFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.kv.transfer.base import KvMemory
    from microserve.kv.transfer.plan import Runs

_BATCH_SINCE: Final = 13000
"""The CUDA version whose form of cuMemcpyBatchAsync is called here."""
_IN_STREAM_ORDER: Final = 1
_PEER_ACCESS: Final = 1


class SharedMemory(msgspec.Struct, frozen=True):
    """Memory that other processes of this host may map: by its allocation's handle, from `offset` bytes on."""

    handle: bytes
    offset: int


class Reach(Protocol):
    """Memory of a peer that is mapped here."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where it begins for us, in the order that it was asked for."""
        ...

    def copy(self, runs: Runs, source: int, target: int, page_bytes: int) -> Callable[[], bool]:
        """Begins to copy `runs` of pages, as `plan.runs` finds them, from our address `source` on to `target` on.

        What it returns says whether all is written; not to be asked again after that. Raises `TransferFailed` when it
        cannot be begun; then nothing is written any more.
        """
        ...

    def wake(self, source: int, target: int, nbytes: int) -> None:
        """Begins to copy `nbytes` that nobody awaits. Raises `TransferFailed`."""
        ...

    def close(self) -> None:
        """Waits for copies under way, and gives the memory back. Call once."""
        ...


class NearMemory(Protocol):
    """What lets processes of one host write each other's memory. For the transfer thread."""

    def share(self, address: int) -> SharedMemory:
        """What a peer needs to map our memory from `address` on. Raises `TransferFailed`."""
        ...

    def reach(self, areas: Sequence[SharedMemory]) -> Reach:
        """Maps memory of a peer. Raises `TransferFailed`, and what torch raises; then nothing is mapped."""
        ...


def near_memory(memory: KvMemory) -> NearMemory | None:
    """How peers on this host reach `memory` without UCX; None where they cannot, or UCX_TLS forbids it."""
    if not memory.device.startswith("cuda") or not _allowed(os.environ.get("UCX_TLS", "all")):
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return CudaIpc(driver, int(memory.device.partition(":")[2] or 0))


def _allowed(tls: str) -> bool:
    """Whether UCX_TLS, "all", "a,b" or "^a,b" (all but these), lets memory of GPUs be mapped."""
    names = set(tls.removeprefix("^").split(","))
    named = bool(names & {"all", "cuda", "cuda_ipc"})
    return named != tls.startswith("^")


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = [("reserved", ctypes.c_byte * 64)]


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", c_int), ("id", c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [("order", c_int), ("source", _Location), ("target", _Location), ("flags", c_uint)]


class CudaIpc:
    """Implements `NearMemory` for memory of the GPU `device`. One thread maps and copies."""

    def __init__(self, driver: Any, device: int) -> None:
        self._driver = driver
        self._device = device
        self._copier: _Copier | None = None

    def share(self, address: int) -> SharedMemory:
        _enter(self._driver, self._device)
        base, size, handle = c_uint64(), c_size_t(), _Handle()
        _call(self._driver, "cuMemGetAddressRange_v2", byref(base), byref(size), c_uint64(address))
        _call(self._driver, "cuIpcGetMemHandle", byref(handle), base)
        return SharedMemory(bytes(handle), address - base.value)

    def reach(self, areas: Sequence[SharedMemory]) -> Reach:
        _enter(self._driver, self._device)
        bases: list[int] = []
        try:
            for area in areas:
                if len(area.handle) != ctypes.sizeof(_Handle):
                    raise TransferFailed(f"a handle of {len(area.handle)} bytes is not one of CUDA's")
                base, handle = c_uint64(), _Handle.from_buffer_copy(area.handle)
                _call(self._driver, "cuIpcOpenMemHandle_v2", byref(base), handle, c_uint(_PEER_ACCESS))
                bases.append(base.value)
            if self._copier is None:
                self._copier = _Copier(self._driver, self._device)
        except Exception:  # torch raises what it likes, and nothing may stay mapped
            _unmap(self._driver, bases)
            raise
        addresses = tuple(base + area.offset for base, area in zip(bases, areas, strict=True))
        return _CudaReach(self._copier, bases, addresses)


class _CudaReach:
    """Implements `Reach`."""

    def __init__(self, copier: _Copier, bases: Sequence[int], addresses: tuple[int, ...]) -> None:
        self.addresses = addresses
        self._copier = copier
        self._bases = bases

    def copy(self, runs: Runs, source: int, target: int, page_bytes: int) -> Callable[[], bool]:
        sources = array("Q", [source + run[0] * page_bytes for run in runs])
        targets = array("Q", [target + run[1] * page_bytes for run in runs])
        return self._copier.copy(sources, targets, array("Q", [run[2] * page_bytes for run in runs]))

    def wake(self, source: int, target: int, nbytes: int) -> None:
        self._copier.order(array("Q", [source]), array("Q", [target]), array("Q", [nbytes]))

    def close(self) -> None:
        self._copier.settle()
        _unmap(self._copier.driver, self._bases)


class _Copier:
    """Copies, one after the other, in a stream of its own: one for all peers, since torch hands streams out again."""

    def __init__(self, driver: Any, device: int) -> None:
        import torch

        self.driver = driver
        self._batch = _batch_copy(driver)
        self._attributes, self._first = _Attributes(order=_IN_STREAM_ORDER), c_size_t(0)
        self._options = (byref(self._attributes), byref(self._first), 1)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
        self._handle = c_void_p(self._stream.cuda_stream)
        self._events: list[Any] = []
        """Those of copies that have ended: making one takes longer than using it again."""

    def copy(self, sources: array[int], targets: array[int], sizes: array[int]) -> Callable[[], bool]:
        """As `Reach.copy`."""
        try:
            self.order(sources, targets, sizes)
            event = self._events.pop() if self._events else _event()
            event.record(self._stream)
        except Exception as error:  # torch raises what it likes, and a part may be ordered already
            self.settle()
            raise error if isinstance(error, TransferFailed) else TransferFailed(repr(error)) from error
        return partial(self._written, event)

    def _written(self, event: Any) -> bool:
        if not event.query():
            return False
        self._events.append(event)
        return True

    def order(self, sources: array[int], targets: array[int], sizes: array[int]) -> None:
        """Begins to copy. Raises `TransferFailed`; a part may be under way then."""
        if self._batch is None:
            for source, target, size in zip(sources, targets, sizes, strict=True):
                numbers = (c_uint64(target), c_uint64(source), c_size_t(size))
                _call(self.driver, "cuMemcpyDtoDAsync_v2", *numbers, self._handle)
            return
        # What CUDA reads while it is called: three arrays of pointers and lengths.
        arrays = [each.buffer_info()[0] for each in (targets, sources, sizes)]
        status = self._batch(*arrays, len(sizes), *self._options, self._handle)
        _check(self.driver, "cuMemcpyBatchAsync", status)

    def settle(self) -> None:
        """Waits for whatever is under way."""
        with suppress(RuntimeError):  # a GPU that is lost writes nothing more
            self._stream.synchronize()


def _enter(driver: Any, device: int) -> None:
    """Makes the device's context, the one that torch uses, current in this thread: torch itself may leave that until it
    launches something."""
    current, primary, number = c_void_p(), c_void_p(), c_int()
    _call(driver, "cuCtxGetCurrent", byref(current))
    if current.value is None:
        _call(driver, "cuDeviceGet", byref(number), c_int(device))
        _call(driver, "cuDevicePrimaryCtxRetain", byref(primary), number)
        _call(driver, "cuCtxSetCurrent", primary)


def _event() -> Any:
    import torch

    return torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]


def _batch_copy(driver: Any) -> Any:
    """cuMemcpyBatchAsync, or None before CUDA 13."""
    entry, found = c_void_p(), c_int()
    try:
        look = driver.cuGetProcAddress_v2
    except AttributeError:  # before CUDA 12
        return None
    status = look(b"cuMemcpyBatchAsync", byref(entry), c_int(_BATCH_SINCE), c_uint64(0), byref(found))
    if status or not entry.value:
        return None
    kind = ctypes.CFUNCTYPE(c_int, *[c_void_p] * 3, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p)
    return kind(entry.value)


def _unmap(driver: Any, bases: Sequence[int]) -> None:
    for base in bases:
        driver.cuIpcCloseMemHandle(c_uint64(base))  # whatever it says, there is nothing left to lose


def _call(driver: Any, name: str, *arguments: Any) -> None:
    _check(driver, name, getattr(driver, name)(*arguments))


def _check(driver: Any, name: str, status: int) -> None:
    if status:
        words = ctypes.c_char_p()
        driver.cuGetErrorString(c_int(status), byref(words))
        raise TransferFailed(f"{name}: {(words.value or b'unknown error').decode()} ({status})")
