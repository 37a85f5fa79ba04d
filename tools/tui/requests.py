"""Requests: what runs and waits, oldest first, then what has ended lately; the one under the cursor as a timeline."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.widgets import Static

from microserve.tools.common import visible
from microserve.tools.tui.live_table import LiveTable
from microserve.tools.tui.model import matches, seconds, state_text, timeline
from microserve.tools.tui.pane import Pane

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import RequestInfo, Requests
    from microserve.tools.tui.live_table import Cell

_COLUMNS = ("request", "state", "time>", "prompt>", "cached>", "out>", "TTFT>", "engines", "strategy", "model")
_LEAST = 24
"""Columns of a long id that are left when others need the room."""
_MOST = 200
_RECENT = 50


class RequestsPane(Pane):
    """Choices of requests, by arrival."""

    title = "Requests"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "abort", "abort"),
        Binding("e", "ended", "show/hide ended"),
    ]

    def __init__(self, client: AsyncClient, *, id: str) -> None:
        super().__init__(client, id=id)
        self._seen: Requests | None = None
        self._ended = True
        self._table = LiveTable(id="requests", first=True)
        self._more = Static("", id="more", classes="caption", markup=False)
        self._timeline = Static("", id="timeline", classes="details", markup=False)

    def compose(self) -> ComposeResult:
        yield self._table
        yield self._more
        yield self._timeline

    def on_mount(self) -> None:
        self._table.set_columns(_COLUMNS, least=_LEAST)

    def focus_first(self) -> None:
        self._table.focus()

    async def refresh_data(self, now: float) -> None:
        self._seen = await self.client.requests(recent=_RECENT, limit=_MOST)
        self.show()

    def show(self) -> None:
        if self._seen is None:
            return
        rows = [
            (key, _row(each))
            for key, each in self._listed().items()
            if matches(self.pattern, each.request_id, each.state, each.model, each.strategy, *each.engines)
        ]
        self._table.show(rows)
        more = self._seen.active - len(self._seen.requests)
        self._more.display = more > 0
        self._more.update(f"the oldest {len(self._seen.requests):,}; {more:,} more run or wait, which no filter finds")
        self._show_timeline()

    def _listed(self) -> dict[str, RequestInfo]:
        if self._seen is None:
            return {}
        # A client may give one name to several requests: they are counted, oldest first. The key of a request stays,
        # whatever becomes of others and of it, so that the cursor does, too.
        running, past = self._seen.requests, self._seen.recent
        times: Counter[str] = Counter()
        keys: dict[int, str] = {}
        for each in [*reversed(past), *running]:
            times[each.request_id] += 1
            keys[id(each)] = f"{each.request_id}/{times[each.request_id]}"
        return {keys[id(each)]: each for each in [*running, *(past if self._ended else ())]}

    @property
    def selected(self) -> RequestInfo | None:
        """The request under the cursor."""
        key = self._table.selected
        return self._listed().get(key) if key is not None else None

    @on(LiveTable.RowHighlighted)
    def _show_timeline(self) -> None:
        request = self.selected
        if request is None:
            self._timeline.update("no requests" if self._seen is not None and not self.pattern else "")
            return
        head = f"{request.request_id} · {request.state} · {request.model} · {request.strategy}"
        lines = [Text(visible(head), "bold"), *timeline(request, self.size.width)]
        if request.error:
            lines.append(Text(visible(request.error), "red"))
        self._timeline.update(Text("\n").join(lines))

    # --- actions -----------------------------------------------------------------------------------------------------

    def action_abort(self) -> None:
        request = self.selected
        if request is None:
            return
        if request.state not in ("running", "queued"):
            self.app.notify("this request has ended", severity="warning")
            return
        name = request.request_id

        async def abort() -> str:
            return {"freed": "ended", "unknown": "has ended already"}[await self.client.abort(name)]

        self.act(name, abort, ask=f"Abort request {name}? Its caller gets an error.", yes="Abort")

    def action_ended(self) -> None:
        self._ended = not self._ended
        self.show()


def _row(request: RequestInfo) -> list[Cell]:
    return [
        request.request_id,
        state_text(request.state),
        seconds(request.age if request.ended is None else request.ended),
        f"{request.prompt_tokens:,}",
        f"{request.cached_tokens:,}",
        f"{request.output_tokens:,}",
        seconds(request.first_token),
        ", ".join(request.engines) or "-",
        request.strategy,
        request.model,
    ]
