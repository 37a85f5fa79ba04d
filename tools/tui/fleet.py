"""The fleet: every engine a row, and the one under the cursor in detail, with its links to others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.widgets import Static

from microserve.runtime.errors import MicroserveError
from microserve.tools.common import visible
from microserve.tools.drain import question
from microserve.tools.fleet_view import duration, percent
from microserve.tools.tui.live_table import LiveTable
from microserve.tools.tui.model import (
    FleetTrack,
    LinkTrack,
    engine_words,
    matches,
    nbytes,
    number,
    pool_bar,
    pool_words,
    sparkline,
    state_text,
)
from microserve.tools.tui.pane import Pane

if TYPE_CHECKING:
    from textual import events
    from textual.app import ComposeResult

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import FleetEngine, InfoReply, PeerLink
    from microserve.tools.tui.live_table import Cell

_ALL = ("engine", "state", "model", "run>", "wait>", "KV pages", "tok/s>", "last minute", "hits>", "prefill/s>",
        "sent/s>", "recv/s>", "epoch", "up>")  # fmt: skip
_WIDTHS = (
    (160, 20, _ALL),
    (116, 12, tuple(name for name in _ALL if name not in ("prefill/s>", "epoch"))),
    (0, 12, ("engine", "state", "run>", "wait>", "KV pages", "tok/s>", "last minute", "hits>")),
)
"""From which width on, how wide a bar is, and which columns fit. The details below have the rest."""
_LEAST = 12
"""Columns of a long name that are left when others need the room; the details below have all of it."""
_MOST_LINKS = 5


class FleetPane(Pane):
    """Engines by name."""

    title = "Fleet"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "drain", "drain"),
        Binding("u", "resume", "resume"),
        Binding("c", "cache", "its cache"),
    ]

    def __init__(self, client: AsyncClient, track: FleetTrack, *, id: str) -> None:
        super().__init__(client, id=id)
        self._track = track
        self._links = LinkTrack()
        self._info: InfoReply | None = None
        self._trouble = ""
        # Held, not looked up: an answer may come while the screen is being taken down.
        self._table = LiveTable(id="engines")
        self._details = Static("", id="engine", classes="details", markup=False)

    def compose(self) -> ComposeResult:
        yield self._table
        yield self._details

    def on_mount(self) -> None:
        self._set_columns(self.app.size.width)

    def on_resize(self, event: events.Resize) -> None:
        self._set_columns(event.size.width)
        self.show()

    def focus_first(self) -> None:
        self._table.focus()

    def _set_columns(self, width: int) -> None:
        self._bar, self._columns = next((bar, columns) for least, bar, columns in _WIDTHS if width >= least)
        self._table.set_columns(self._columns, least=_LEAST)

    async def refresh_data(self, now: float) -> None:
        self.show()
        engine = self.selected
        if engine is None:
            self._info = None
            return
        try:
            # Only of the one that is shown: a hundred engines are not asked every second.
            info = await self.client.engine(engine.info.engine_id).info()
        except MicroserveError as error:
            self._info, self._trouble = None, error.message
        else:
            self._info, self._trouble = info, ""
            self._links.see((info.info.engine_id, info.info.epoch), info.links, now)
        self._show_details()

    def show(self) -> None:
        if self.status is None:
            return
        rows = [
            (engine.info.engine_id, self._row(engine))
            for engine in sorted(self.status.engines, key=lambda each: each.info.engine_id)
            if matches(self.pattern, engine.info.engine_id, engine.state, engine.info.model.name, *_labels(engine))
        ]
        self._table.show(rows)
        self._show_details()

    @property
    def selected(self) -> FleetEngine | None:
        """The engine under the cursor."""
        key = self._table.selected
        return next((each for each in self.status.engines if each.info.engine_id == key), None) if self.status else None

    def _row(self, engine: FleetEngine) -> list[Cell]:
        load, info = engine.load, engine.info
        track = self._track.track(info.engine_id)
        rates = track.rates
        cells: dict[str, Cell] = {
            "engine": info.engine_id,
            "state": state_text(engine.state),
            "model": info.model.name,
            "run>": f"{load.running}/{info.max_running}",
            "wait>": str(load.waiting),
            "KV pages": pool_bar(load, self._bar),
            "tok/s>": number(rates.tokens),
            "last minute": Text(sparkline(track.minute(self._bar), self._bar), "cyan"),
            "hits>": percent(load.prefix_hit_tokens, load.prefix_lookup_tokens),
            "prefill/s>": number(rates.prefilled),
            "sent/s>": nbytes(rates.sent),
            "recv/s>": nbytes(rates.received),
            "epoch": f"{info.epoch:x}",
            "up>": duration(max(0.0, time.time() - info.started_at)) if info.started_at else "-",
        }
        return [cells[name] for name in self._columns]

    @on(LiveTable.RowHighlighted)
    def _moved(self) -> None:
        self._info = None
        self._show_details()

    def _show_details(self) -> None:
        engine = self.selected
        if engine is None:
            hint = "no engine has this filter" if self.pattern else "no engines; start one with `microserve engine`"
            self._details.update("" if self.status is None else hint)
            return
        lines = [Text(line) for line in engine_words(engine, time.time())]
        lines.append(Text(pool_words(engine.load)))
        info = self._info
        if info is not None and info.info.engine_id == engine.info.engine_id:
            lines += [self._link_line(link) for link in info.links[:_MOST_LINKS]]
            if len(info.links) > _MOST_LINKS:
                lines.append(
                    Text(f"… and {len(info.links) - _MOST_LINKS} more: microserve engines {engine.info.engine_id}")
                )
        elif self._trouble:
            lines.append(Text(visible(self._trouble), "red"))
        self._details.update(Text("\n").join(lines))

    def _link_line(self, link: PeerLink) -> Text:
        sent, received = self._links.rates.get(link.engine_id, (0.0, 0.0))
        line = Text("→ ")
        line.append(f"{link.engine_id} ")
        line.append_text(state_text(link.state))
        if link.state != "ready":
            return line.append(f" {visible(link.detail)}", "dim")
        line.append(f" {link.transport} {link.gigabytes_per_second:.3g} GB/s measured", "dim")
        line.append(f"  sent {nbytes(link.sent_bytes)} ({nbytes(sent)}/s)  received {nbytes(received)}/s")
        if link.failures:
            line.append(f"  {link.failures} failed", "red")
        return line

    # --- actions -----------------------------------------------------------------------------------------------------

    def action_drain(self) -> None:
        engine = self.selected
        if engine is not None and self.status is not None:
            name = engine.info.engine_id
            ask = question(self.status, [name])
            self.act(f"{name} drains", self.client.engine(name).drain, ask=ask, yes="Drain")

    def action_resume(self) -> None:
        engine = self.selected
        if engine is not None:
            name = engine.info.engine_id
            ask = f"Resume {name}? It takes work again."
            self.act(f"{name} takes work", self.client.engine(name).resume, ask=ask, yes="Resume")

    def action_cache(self) -> None:
        engine = self.selected
        if engine is not None:
            self.app.call_later(self.app.run_action, f"app.show_cache({engine.info.engine_id!r})")


def _labels(engine: FleetEngine) -> list[str]:
    return [f"{name}={value}" for name, value in engine.info.labels.items()]
