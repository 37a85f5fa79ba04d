"""microserve: a ZeroMQ message-bus runtime for microserving LLMs.

The public names load on first use, so that ``import microserve`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microserve.router.strategy import Chunk, Fleet, Request, strategy
    from microserve.runtime.client import AsyncClient, Client
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import SamplingParams

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncClient": "microserve.runtime.client",
    "Chunk": "microserve.router.strategy",
    "Client": "microserve.runtime.client",
    "Fleet": "microserve.router.strategy",
    "MicroserveError": "microserve.runtime.errors",
    "Request": "microserve.router.strategy",
    "SamplingParams": "microserve.runtime.messages",
    "strategy": "microserve.router.strategy",
}

__all__ = [
    "AsyncClient",
    "Chunk",
    "Client",
    "Fleet",
    "MicroserveError",
    "Request",
    "SamplingParams",
    "__version__",
    "strategy",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'microserve' has no attribute {name!r}")
