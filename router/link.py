"""One engine as the router sees it: what it said about itself, the session with it, and what it is charged with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from microserve.runtime.messages import EngineInfo, Load
    from microserve.runtime.rpc import RpcClient

REQUEST_TOKENS = 64
"""What a request that decodes weighs against prompt tokens that wait for prefill."""

_FULL = 0.8
"""Share of a pool in use from which an engine is likely to preempt."""


class Charge:
    """What one choice adds to the load of one engine: a request, and prompt tokens that the engine is to compute.

    Taken when the engine is picked or asked for something; released by the dispatcher.
    """

    __slots__ = ("_link", "_open", "_tokens")

    def __init__(self, link: EngineLink, tokens: int) -> None:
        self._link = link
        self._tokens = tokens
        self._open = True
        link.charged_tokens += tokens
        link.charged_requests += 1

    def expect(self, tokens: int) -> None:
        """The engine has so many prompt tokens to compute for it; 0 when they are computed, and a decoding request is
        left. No effect after the release."""
        if self._open:
            self._link.charged_tokens += tokens - self._tokens
            self._tokens = tokens

    @property
    def weight(self) -> int:
        """What it adds to the engine's `work`."""
        return self._tokens + REQUEST_TOKENS if self._open else 0

    def release(self) -> None:
        """Give the charge back. Idempotent."""
        if self._open:
            self._open = False
            self._link.charged_tokens -= self._tokens
            self._link.charged_requests -= 1


class EngineLink:
    """One incarnation of one engine: what it said about itself, our session with it, and our charges on it."""

    __slots__ = (
        "_foreign",
        "charged_requests",
        "charged_tokens",
        "client",
        "info",
        "load",
        "picked",
        "prepared",
        "seen",
        "silent",
        "task",
    )

    def __init__(self, info: EngineInfo, load: Load, seen: float) -> None:
        self.info = info
        self.client: RpcClient | None = None
        self.task: asyncio.Task[None] | None = None
        self.prepared = False
        self.silent = False
        self.charged_requests = 0
        self.charged_tokens = 0
        self.picked = 0
        self.report(load, seen)

    @property
    def id(self) -> str:
        return self.info.engine_id

    def report(self, load: Load, seen: float) -> None:
        """The engine said how loaded it is. What is not ours is other routers' and is kept until the next report."""
        self.load = load
        self.seen = seen
        requests = max(0, load.running + load.waiting - self.charged_requests)
        tokens = max(0, load.queued_tokens - self.charged_tokens)
        self._foreign = tokens + requests * REQUEST_TOKENS

    @property
    def state(self) -> str:
        """As operators see it: "silent", "connecting", or the state that the engine reports."""
        if self.silent:
            return "silent"
        if self.client is None or self.client.closed or not self.prepared:
            return "connecting"
        return self.load.state

    @property
    def pickable(self) -> bool:
        client = self.client
        return (
            client is not None
            and not client.closed
            and self.prepared
            and not self.silent
            and self.load.state in ("ready", "degraded")
        )

    @property
    def work(self) -> float:
        """What stands before a new request, in prompt tokens, whoever sent it; more when the pool is nearly full."""
        work: float = self.charged_tokens + self.charged_requests * REQUEST_TOKENS + self._foreign
        load = self.load
        if load.total_pages:
            used = 1.0 - (load.free_pages + load.cached_pages) / load.total_pages
            if used > _FULL:
                work = (work + REQUEST_TOKENS) * (1.0 + 10.0 * (used - _FULL))
        return work

    def carries(self, label: str) -> bool:
        """Whether the engine has the label: "name" with any value but a negative one, or "name=value"."""
        name, equals, value = label.partition("=")
        found = self.info.labels.get(name)
        if found is None:
            return False
        return found == value if equals else found.lower() not in ("0", "false", "no", "off")
