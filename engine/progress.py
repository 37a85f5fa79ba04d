"""What a start-up is doing: a bar on standard error where somebody looks, and a line for whoever waits for it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from microserve.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.runtime.clock import Clock

PATIENCE = 300.0
"""Seconds that a stage may go without a step forward."""
_EXACT = 100
"""Steps above which a stage is told in percent."""


class Progress:
    """Stages of a start-up. One thread reports, others may `look` at any time."""

    def __init__(self, *, bars: bool = False, clock: Clock = monotonic) -> None:
        """`bars` are drawn on standard error."""
        self._bars = bars
        self._clock = clock
        self._what = "starting"
        self._steps = ""
        self._patience = PATIENCE
        self._probe: Callable[[], int] | None = None
        self._probed = 0
        self._moved_at = clock()

    def look(self) -> str | None:
        """What is done now, in words; None when nothing has moved for so long that it is probably stuck."""
        probe = self._probe
        if probe is not None and (found := probe()) != self._probed:
            self._probed, self._steps = found, f"{found} so far"
            self._moved_at = self._clock()
        if self._clock() - self._moved_at > self._patience:
            return None
        return f"{self._what}: {self._steps}" if self._steps else self._what

    @contextmanager
    def stage(
        self, what: str, *, patience: float = PATIENCE, probe: Callable[[], int] | None = None
    ) -> Iterator[Callable[[int, int], None]]:
        """One stage; gives what is to be called with (done, in all).

        `probe` is asked by whoever looks how many things are done, where the work itself cannot tell.
        """
        # The probe goes first and comes last: whoever looks meanwhile must not ask it about another stage.
        self._probe = None
        self._what, self._steps, self._patience = what, "", patience
        self._moved_at = self._clock()
        if probe is not None:
            self._probed = probe()
        self._probe = probe
        try:
            if self._bars:
                with _bar(what) as draw:
                    yield self._reporter(draw)
            else:
                yield self._reporter(lambda done, total: None)
        finally:
            self._probe = None
            self._what, self._steps, self._patience = "starting", "", PATIENCE
            self._moved_at = self._clock()

    def _reporter(self, draw: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self._steps = f"{done}/{total}" if total <= _EXACT else f"{100 * done // total}%"
            self._moved_at = self._clock()
            draw(done, total)

        return report


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
