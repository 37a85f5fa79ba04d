"""Which transport an engine uses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from microserve.kv.transfer.loopback import LoopbackHub, LoopbackTransport
from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from microserve.kv.transfer.base import KvMemory, Transport


def open_transport(
    kind: str, memory: KvMemory, *, name: str, devices: str = "lo", hub: LoopbackHub | None = None
) -> Transport:
    """The transport `kind`: "nixl", "loopback", or "auto" (nixl where it is installed, else loopback).

    `name` is "engine_id:epoch in hex". `hub` is where loopback transports meet. Raises `ConfigError`.
    """
    if kind == "auto":
        kind = "nixl" if find_spec("nixl_cu13") is not None else "loopback"
    if kind == "loopback":
        return LoopbackTransport(hub if hub is not None else LoopbackHub(), name, memory)
    if kind != "nixl":
        raise ConfigError(f"transport {kind!r} is neither auto, nixl nor loopback")
    from microserve.kv.transfer.nixl import NixlTransport

    return NixlTransport(name, memory, devices=devices)
