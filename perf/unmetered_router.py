"""A router that counts nothing of its requests and remembers none: what metrics and tracing are held against."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import microserve.router.core as core
import microserve.router.daemon as daemon
import microserve.router.sub_requests as sub_requests
from microserve.router.inspection import Inspection
from microserve.router.metrics import RouterMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.router.dispatch import Generation
    from microserve.router.pending import SubRecord


def _nothing(_seconds: float) -> None:
    pass


class Unmetered(RouterMetrics):
    """Answers scrapes, with nothing in them about requests."""

    def gap_observer(self, model: str, version: str) -> Callable[[float], None]:
        return _nothing

    def ended(self, generation: Generation) -> None:
        pass

    def sub_ended(self, record: SubRecord) -> None:
        pass


class Forgetful(Inspection):
    """Remembers nothing."""

    def ended(self, generation: Generation) -> None:
        pass


if __name__ == "__main__":
    daemon.RouterMetrics = Unmetered  # type: ignore[attr-defined]
    core.Inspection = Forgetful  # type: ignore[attr-defined]
    sub_requests.MOST_RECORDS = 0
    sys.exit(daemon.main())
