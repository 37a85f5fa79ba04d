"""Opens the transport that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.kv.transfer.loopback import LoopbackHub, LoopbackTransport

if TYPE_CHECKING:
    from microserve.kv.transfer.base import KvMemory, Transport


def open_transport(
    kind: str, memory: KvMemory, name: str, *, devices: str = "lo", registry: LoopbackHub | None = None
) -> Transport:
    """The transport `kind` ("auto", "nixl", "loopback") over `memory`, for the incarnation `name` of an engine.

    `devices`: network devices that may be used, for `nixl`. `registry`: where the engines of this process meet, for
    `loopback`. "auto" is `nixl`. Raises `TransferFailed` when it cannot be opened, and `ConfigError`.
    """
    if kind == "loopback":
        return LoopbackTransport(registry if registry is not None else LoopbackHub(), name, memory)
    # Imported here, so that whoever does not use it need not have it.
    from microserve.kv.transfer.cuda_ipc import near_memory
    from microserve.kv.transfer.nixl import NixlTransport

    return NixlTransport(memory, name, devices=devices, near=near_memory(memory))
