"""Strategies: what serves, with what each version achieved; what can be chosen; what was, and the way back."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.widgets import Static

from microserve.tools.tui.dialogs import EditStrategy
from microserve.tools.tui.live_table import LiveTable
from microserve.tools.tui.model import matches, number, seconds
from microserve.tools.tui.pane import Pane

if TYPE_CHECKING:
    from collections.abc import Mapping

    from textual.app import ComposeResult

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import ActiveStrategy, Strategies, VersionFigures
    from microserve.tools.tui.live_table import Cell

_TIMES = ("ttft", "tpot", "jct")
_KINDS = ("mean", "p99", "p50")
# What 80 columns hold comes first.
_SERVING = ("version", "share>", "done>", "err>", "TTFT>", "TPOT>", "JCT>", "TTFT p99>", "TPOT p99>", "JCT p99>",
            "TTFT p50>", "TPOT p50>", "JCT p50>", "model", "settings")  # fmt: skip
_EVERY = 2.0
"""Seconds between looks: the router reads the sources of strategies again for each."""


class StrategiesPane(Pane):
    """Three tables: versions, choices, history."""

    title = "Strategies"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "edit", "edit and apply"),
        Binding("b", "roll_back", "roll back"),
    ]

    def __init__(self, client: AsyncClient, *, id: str) -> None:
        super().__init__(client, id=id)
        self._seen: Strategies | None = None
        self._looked = -_EVERY
        self._versions = LiveTable(id="versions")
        self._choices = LiveTable(id="choices")
        self._history = LiveTable(id="history")
        self._problems = Static("", id="problems", classes="details", markup=False)

    def compose(self) -> ComposeResult:
        yield Static("serving: times without p50 or p99 are means since the router's start", classes="caption")
        yield self._versions
        yield Static("to choose from: Enter edits and applies", classes="caption")
        yield self._choices
        yield Static("history: b rolls back the change under the cursor, and those after it", classes="caption")
        yield self._history
        yield self._problems

    def on_mount(self) -> None:
        self._versions.set_columns(_SERVING)
        self._choices.set_columns(("strategy", "settings", "what it does", "source"))
        self._history.set_columns(("change>", "at", "model", "serves", "why"))

    def focus_first(self) -> None:
        self._choices.focus()

    async def refresh_data(self, now: float) -> None:
        if now - self._looked >= _EVERY:
            self._looked = now
            await self._look()

    async def _look(self) -> None:
        self._seen = await self.client.strategies()
        self.show()

    def show(self) -> None:
        seen = self._seen
        if seen is None:
            return
        rows = _version_rows(seen)
        self._versions.show([row for row in rows if matches(self.pattern, *map(str, row[1]))])
        choices = [
            (each.name, [each.name, _settings({s.name: s.default for s in each.settings}), each.summary, each.source])
            for each in seen.strategies
            if matches(self.pattern, each.name, each.summary, each.source)
        ]
        self._choices.show(choices)
        history = [
            (
                str(change.number),
                [
                    str(change.number),
                    f"{datetime.fromtimestamp(change.at):%Y-%m-%d %H:%M:%S}",
                    change.model or "*",
                    ", ".join(f"{each.version} {each.share:.0%}" for each in change.active),
                    change.reason,
                ],
            )
            for change in seen.history
        ]
        self._history.show([row for row in history if matches(self.pattern, *row[1])])
        self._problems.update(Text("\n".join(seen.problems), "red"))

    # --- actions -----------------------------------------------------------------------------------------------------

    @on(LiveTable.RowSelected, "#choices")
    def action_edit(self) -> None:
        self._edit()

    @work
    async def _edit(self) -> None:
        name = self._choices.selected
        seen = self._seen
        strategy = next((each for each in seen.strategies if each.name == name), None) if seen is not None else None
        if strategy is None or seen is None:
            return
        present = next((each.settings for each in seen.active if each.name == name), {})

        async def apply(settings: dict[str, str], model: str, share: float, dry_run: bool) -> str:
            reply = await self.client.set_strategy(strategy.name, settings, model=model, share=share, dry_run=dry_run)
            serves = ", ".join(f"{each.version} {each.share:.0%}" for each in reply.active)
            return f"{'it would be' if dry_run else 'serves'}: {serves}"

        if await self.app.push_screen_wait(EditStrategy(strategy, present, apply)):
            self.app.notify(f"{strategy.name} serves new requests", markup=False)
            self._looked = -_EVERY

    def action_roll_back(self) -> None:
        seen = self._seen
        if seen is None or not seen.history:
            return
        table = self._history
        change = seen.history[0]
        if table.has_focus and table.selected is not None:
            change = next((each for each in seen.history if str(each.number) == table.selected), change)
        number, model = (change.number, change.model) if table.has_focus else (None, change.model)

        async def roll_back() -> str:
            reply = await self.client.rollback_strategy(model=model, number=number)
            self._looked = -_EVERY
            return ", ".join(f"{each.version} {each.share:.0%}" for each in reply.active)

        what = f"change {number}" if number is not None else "the last change"
        of = f"model {model}" if model else "every model"
        self.act("serves", roll_back, ask=f"Roll back {what} of {of}?", yes="Roll back")


def _version_rows(seen: Strategies) -> list[tuple[str, list[Cell]]]:
    """What serves first, then versions that did; a version by each model that it served."""
    figures = {(each.version, each.model): each for each in seen.figures}
    rows: list[tuple[str, list[Cell]]] = []
    for active in seen.active:
        served = [key for key in figures if key[0] == active.version and active.model in ("", key[1])]
        for key in served or [(active.version, active.model)]:
            rows.append((f"{key}/{active.model}", _version_row(active, key, figures.pop(key, None))))
    rows += [(f"{key}/past", _version_row(None, key, each)) for key, each in figures.items()]
    return rows


def _version_row(active: ActiveStrategy | None, key: tuple[str, str], figures: VersionFigures | None) -> list[Cell]:
    version, model = key
    cells: list[Cell] = [
        version if active is not None else Text(version, "dim"),
        f"{active.share:.0%}" if active is not None else "-",
    ]
    if figures is None:
        cells += ["0", "0", *["-"] * (len(_TIMES) * len(_KINDS))]
    else:
        cells += [number(figures.requests), number(figures.errors)]
        cells += [seconds(getattr(figures, f"{name}_{kind}")) for kind in _KINDS for name in _TIMES]
    return [*cells, model or "*", _settings(active.settings) if active is not None else ""]


def _settings(settings: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
