"""What a start-up is doing: a bar on standard error where somebody looks, and a line for whoever waits for it."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from microserve.runtime.clock import monotonic
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.runtime.clock import Clock

PATIENCE = 300.0
"""Seconds that a stage may go without a step forward."""
_EXACT = 100
"""Steps above which a stage is told in percent."""

_log = get_logger(__name__)


class Progress:
    """Stages of a start-up. One thread reports, others may `look` at any time."""

    def __init__(self, *, bars: bool = False, clock: Clock = monotonic) -> None:
        """`bars` are drawn on standard error."""
        self._bars = bars
        self._clock = clock
        self._stage = self._what = "starting"
        self._steps = ""
        self._patience = PATIENCE
        self._probe: Callable[[], int] | None = None
        self._probed = 0
        self._instead = ""
        self._logged = self._reported = False
        """Whether it was said that this stage is another one, and whether the work has told how far it is."""
        self._draw: Callable[[int, int | None], None] = _draw_nothing
        self._moved_at = clock()

    def look(self) -> str | None:
        """What is done now, in words; None when nothing has moved for so long that it is probably stuck."""
        probe = self._probe
        found = self._probed if probe is None else self._ask(probe)
        # The stage may have ended meanwhile, and another one begun: this is not about that.
        if probe is not None and self._probe is probe and found != self._probed:
            self._what = self._instead or self._what
            if self._instead and not self._logged:
                self._logged = True
                _log.info(self._what)
            self._probed, self._steps = found, f"{found} so far"
            self._moved_at = self._clock()
            if not self._reported:
                self._draw(found, None)
        if self._clock() - self._moved_at > self._patience:
            return None
        return f"{self._what}: {self._steps}" if self._steps else self._what

    def _ask(self, probe: Callable[[], int]) -> int:
        try:
            return probe()
        except OSError:  # what it looks at may go away while it looks
            return self._probed

    @contextmanager
    def stage(
        self, what: str, *, patience: float = PATIENCE, probe: Callable[[], int] | None = None, probed: str = ""
    ) -> Iterator[Callable[[int, int], None]]:
        """One stage; gives what is to be called with (done, in all).

        `probe` is asked by whoever looks how many things are done, where the work itself cannot tell. Once some are,
        the stage is called `probed`, until the work tells something itself.
        """
        # The probe goes first and comes last: whoever looks meanwhile must not ask it about another stage.
        self._probe = None
        self._stage = self._what = what
        self._steps, self._patience, self._instead = "", patience, probed
        self._logged = self._reported = False
        self._moved_at = self._clock()
        if probe is not None:
            self._probed = 0
            self._probed = self._ask(probe)
        try:
            with _bar(what) if self._bars else nullcontext(_draw_nothing) as draw:
                self._draw = draw
                self._probe = probe
                yield self._report
        finally:
            self._probe, self._draw = None, _draw_nothing
            self._stage = self._what = "starting"
            self._steps, self._patience, self._instead = "", PATIENCE, ""
            self._moved_at = self._clock()

    def _report(self, done: int, total: int) -> None:
        self._what, self._reported = self._stage, True
        self._steps = f"{done}/{total}" if total <= _EXACT else f"{100 * done // total}%"
        self._moved_at = self._clock()
        self._draw(done, total)


def _draw_nothing(done: int, total: int | None) -> None:
    """Where nobody looks."""


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
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
