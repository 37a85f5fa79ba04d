"""Runs checks beside each other: one that fails or hangs is a finding, and the others go on."""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from microserve.tools.checks.finding import problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from microserve.tools.checks.finding import Finding

_GRACE = 0.75
"""Seconds beyond their own limit that checks get to say that it was reached."""


class Check(NamedTuple):
    """What is looked at, in a word or two, and how."""

    name: str
    look: Callable[[], list[Finding]]


def run_checks(checks: Sequence[Check], seconds: float) -> Iterator[list[Finding]]:
    """What each has found, in their order; what has not ended after `seconds` (and some) is given up."""
    deadline = monotonic() + seconds + _GRACE
    running = [_Running(check) for check in checks]
    for each in running:
        yield each.findings(deadline, seconds)


def guarded(check: Check) -> list[Finding]:
    """What a check finds; that it fails is a finding, too."""
    try:
        return check.look()
    except Exception as error:  # whatever it is, the other checks are still of use
        words = f"this check has failed itself: {type(error).__name__}: {error}"
        return [problem(check.name, words, "please report it; the other checks do not depend on it")]


class _Running:
    def __init__(self, check: Check) -> None:
        self._check = check
        self._found: list[Finding] | None = None
        # A daemon thread: what hangs (a dead file server, a driver) does not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"check {check.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._found = guarded(self._check)

    def findings(self, deadline: float, seconds: float) -> list[Finding]:
        self._thread.join(max(0.0, deadline - monotonic()))
        if self._found is None:
            words = f"this check does not end within {seconds:g} s"
            return [problem(self._check.name, words, "what it asks hangs; try again with a longer --timeout")]
        return self._found
