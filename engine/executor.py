"""The protocol between the step loop and what computes: `torch` anywhere, `cuda` on a GPU, `fake` for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from microserve.engine.plan import StepPlan, StepResult
    from microserve.kv.transfer.base import KvMemory
    from microserve.runtime.messages import Layout, ModelInfo


class DeviceLost(Exception):
    """Nothing can be computed any more, in this process: a GPU after an illegal access, for example."""


class Executor(Protocol):
    """Computes steps against its own KV pool. Every method is called from the step thread alone.

    `launch` may return before the step has finished; `collect` waits for the oldest launched step. `depth` says how
    many steps may be launched and uncollected at once (1: launch, collect, launch; 2: overlapped scheduling).
    An error from `launch` or `collect` is fatal for the sequences of that step, and nothing of it runs any more; it is
    not fatal for the engine, unless it is `DeviceLost`.
    """

    @property
    def model(self) -> ModelInfo: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def total_pages(self) -> int: ...

    @property
    def memory(self) -> KvMemory:
        """The pool as plain memory, for transfers. What other engines wrote there is read as if computed here."""
        ...

    @property
    def depth(self) -> int: ...

    def launch(self, plan: StepPlan) -> None: ...

    def ended(self) -> bool:
        """Whether `collect` would not wait for a device. Does not raise: what went wrong, `collect` says."""
        ...

    def collect(self) -> StepResult: ...

    def close(self) -> None: ...
