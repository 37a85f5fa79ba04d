"""microserve: a ZeroMQ message-bus runtime for microserving LLMs.

The public names load on first use, so that ``import microserve`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microserve.router.migration import migrate
    from microserve.router.strategy import Between, Chunk, Engine, Fleet, Kv, Request, Sending, strategy
    from microserve.runtime.client import AsyncClient, Client
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import SamplingParams

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncClient": "microserve.runtime.client",
    "Between": "microserve.router.strategy",
    "Chunk": "microserve.router.strategy",
    "Client": "microserve.runtime.client",
    "Engine": "microserve.router.strategy",
    "Fleet": "microserve.router.strategy",
    "Kv": "microserve.router.strategy",
    "MicroserveError": "microserve.runtime.errors",
    "Request": "microserve.router.strategy",
    "SamplingParams": "microserve.runtime.messages",
    "Sending": "microserve.router.strategy",
    "migrate": "microserve.router.migration",
    "strategy": "microserve.router.strategy",
}

__all__ = [
    "AsyncClient",
    "Between",
    "Chunk",
    "Client",
    "Engine",
    "Fleet",
    "Kv",
    "MicroserveError",
    "Request",
    "SamplingParams",
    "Sending",
    "__version__",
    "migrate",
    "strategy",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'microserve' has no attribute {name!r}")
