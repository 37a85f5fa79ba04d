"""The log of events: who joined and left, what expired, what was refused, what was changed."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING

from rich.text import Text
from textual.widgets import RichLog

from microserve.tools.common import visible
from microserve.tools.tui.model import event_style, matches
from microserve.tools.tui.pane import Pane

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.app import ComposeResult

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import FleetEvent

_MOST = 1000


class EventsPane(Pane):
    """The newest event at the bottom."""

    title = "Events"

    def __init__(self, client: AsyncClient, *, id: str) -> None:
        super().__init__(client, id=id)
        self._events: deque[FleetEvent] = deque(maxlen=_MOST)
        self._last = 0
        self._router = 0
        self._log = RichLog(id="log", max_lines=_MOST, wrap=False, highlight=False, markup=False)

    def compose(self) -> ComposeResult:
        yield self._log

    def focus_first(self) -> None:
        self._log.focus()

    async def refresh_data(self, now: float) -> None:
        router = self.status.epoch if self.status is not None else 0
        if router != self._router:
            # Another router process: it counts anew.
            self._router, self._last = router, 0
        found = await self.client.events(after=self._last, limit=_MOST)
        self._last = found.last
        self._events.extend(found.events)
        self._write(found.events)

    def show(self) -> None:
        self._log.clear()
        self._write(list(self._events))

    def _write(self, events: Sequence[FleetEvent]) -> None:
        # Who has scrolled back reads on: what is new does not pull away what is seen.
        follow = self._log.is_vertical_scroll_end
        for event in events:
            if matches(self.pattern, event.kind, event.engine, event.detail):
                self._log.write(_line(event), scroll_end=follow)


def _line(event: FleetEvent) -> Text:
    line = Text(f"{datetime.fromtimestamp(event.at):%m-%d %H:%M:%S} ", "dim")
    line.append(event.kind.ljust(14), event_style(event.kind))
    if event.engine:
        line.append(f"{event.engine} ")
        line.append(f"@{event.epoch:x} ", "dim")
    return line.append(visible(event.detail))
