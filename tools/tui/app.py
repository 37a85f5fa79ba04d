"""The application: asks the router once an interval, shows what it says in one of five panes, says when it is gone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.widgets import ContentSwitcher, Footer, Static

from microserve.runtime.errors import MicroserveError, PeerLost
from microserve.tools.common import visible
from microserve.tools.fleet_view import duration
from microserve.tools.tui.cache import CachePane
from microserve.tools.tui.dialogs import Help
from microserve.tools.tui.events import EventsPane
from microserve.tools.tui.fleet import FleetPane
from microserve.tools.tui.model import FleetTrack, fitting, number, sparkline, totals_line
from microserve.tools.tui.requests import RequestsPane
from microserve.tools.tui.strategies import StrategiesPane

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import StatusReply
    from microserve.tools.tui.pane import Pane

PATIENCE = 5.0
"""Seconds after which a router that says nothing counts as lost."""

_HELP = """[b]1[/b]…[b]5[/b]         the panes; Tab between the tables of one
[b]↑ ↓ Enter[/b]   move, act; [b]← →[/b] what is cut off; the mouse, too
[b]/[/b]           filter: words, all of them; [b]Esc[/b] ends it
[b]q[/b], Ctrl-C   quit

[b]Fleet[/b]       [b]d[/b] drain  [b]u[/b] resume: take work again  [b]c[/b] its cache
  pages:    [green]█[/green] owned [yellow]▓[/yellow] leased [red]╳[/red] quarantined [blue]▒[/blue] cached
[b]Requests[/b]    [b]a[/b] abort  [b]e[/b] show or hide those that ended
[b]Strategies[/b]  [b]e[/b] edit and apply  [b]b[/b] roll back
[b]Cache[/b]       [b]\\[[/b] [b]][/b] another engine  [b]p[/b] pin  [b]u[/b] unpin
            [b]m[/b] migrate  [b]e[/b] evict  [b]E[/b] evict all
[b]Events[/b]      what happened, the newest at the bottom

What destroys asks first. Every action is a command, too:
microserve engines, requests, strategy, cache, drain, resume
"""


class TopApp(App[None]):
    """`client` belongs to who made it."""

    CSS_PATH = "top.tcss"
    ENABLE_COMMAND_PALETTE = False
    VERTICAL_BREAKPOINTS = [(0, "-short"), (16, "-tall")]  # noqa: RUF012 - as textual declares it
    TITLE = "microserve top"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(index), f"show({index})", show=False) for index in range(1, 6)),
        Binding("escape", "escape", show=False),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def __init__(
        self,
        client: AsyncClient,
        endpoint: str,
        *,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._client = client
        self._endpoint = endpoint
        self._interval = interval
        self._clock = clock
        self._track = FleetTrack()
        self._status: StatusReply | None = None
        self._lost_at: float | None = None
        self._refusal = ""
        self._old = False
        """Whether the router's last answer was a refusal: what is shown was so before."""
        self._due = asyncio.Event()
        self.panes: dict[str, Pane] = {
            "fleet": FleetPane(client, self._track, id="fleet"),
            "requests": RequestsPane(client, id="requests-pane"),
            "strategies": StrategiesPane(client, id="strategies"),
            "cache": CachePane(client, id="cache"),
            "events": EventsPane(client, id="events"),
        }
        # Held, not looked up: an answer may come while the screen is being taken down.
        self._router = Static("", id="router", markup=False)
        self._totals = Static("", id="totals", markup=False)
        self._tabs = Static("", id="tabs")
        self._banner = Static("", id="banner", markup=False)
        self._switcher = ContentSwitcher(*self.panes.values(), initial="fleet", id="panes")

    def compose(self) -> ComposeResult:
        yield from (self._router, self._totals, self._tabs, self._banner, self._switcher)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self._show_tabs()
        self._show_head()
        self.pane.focus_first()
        self.run_worker(self._follow(), name="follow")

    @property
    def pane(self) -> Pane:
        """The one that is shown."""
        return next(pane for pane in self.panes.values() if pane.id == self._switcher.current)

    # --- following the router ----------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            began = self._clock()
            await self._look()
            self._due.clear()
            left = self._interval - (self._clock() - began)
            try:
                async with asyncio.timeout(max(0.05, left)):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                status = await self._client.status()
        except (PeerLost, TimeoutError):
            self._lost_at = self._lost_at if self._lost_at is not None else self._clock()
        except MicroserveError as error:
            # There is a router, and it does not want us: a key that was revoked, say.
            self._refusal, self._old, self._lost_at = error.message, True, None
        else:
            await self._see(status)
        self._show_head()

    async def _see(self, status: StatusReply) -> None:
        pane, now = self.pane, self._clock()
        self._status, self._lost_at, self._old = status, None, False
        self._track.see(status, now)
        for each in self.panes.values():
            each.status = status
        try:
            async with asyncio.timeout(PATIENCE):
                await pane.refresh_data(now)
        except TimeoutError:
            # The router has just answered: somebody behind it does not.
            self._refusal = f"{pane.title}: no answer within {PATIENCE:g} s"
        except MicroserveError as error:
            # An engine that has just gone, say. What is shown stays, and the next look tells more.
            self._refusal = error.message
        else:
            self._refusal = ""

    # --- what is above the panes -------------------------------------------------------------------------------------

    def _show_head(self) -> None:
        status, banner = self._status, self._banner
        lost = self._lost_at
        self._switcher.set_class(lost is not None or self._old, "stale")
        if lost is not None:
            banner.update(f"no router answers at {self._endpoint} for {self._clock() - lost:.0f} s; trying again …")
        else:
            banner.update(visible(self._refusal))
        banner.display = bool(lost is not None or self._refusal)
        if status is None:
            self._router.update(f"microserve top · {self._endpoint}")
            return
        parts = [f"router {status.router} {status.version}", f"up {duration(status.uptime)}", status.strategy]
        self._router.update(fitting([*parts, status.http] if status.http else parts, self.size.width - 2))
        totals = totals_line(status, self.size.width - 2, f"{number(self._track.tokens)} tok/s ")
        left = max(0, self.size.width - 2 - totals.cell_len)
        totals.append(sparkline(self._track.history, 20)[-left:] if left else "", "cyan")
        self._totals.update(totals)

    def _show_tabs(self) -> None:
        shown = self.pane
        tabs = []
        for index, pane in enumerate(self.panes.values(), start=1):
            title = f"{index} {pane.title}"
            tabs.append(
                f"[@click=app.show({index})]{f'[reverse] {title} [/reverse]' if pane is shown else f' {title} '}[/]"
            )
        self._tabs.update(" ".join(tabs))

    # --- keys --------------------------------------------------------------------------------------------------------

    def action_show(self, index: int) -> None:
        """Shows the pane of this number, counted from 1."""
        pane = list(self.panes.values())[index - 1]
        self._switcher.current = pane.id
        self._show_tabs()
        pane.show()
        pane.focus_first()
        self._due.set()

    def action_show_cache(self, engine_id: str) -> None:
        """Shows the prefix tree of an engine."""
        pane = self.panes["cache"]
        if isinstance(pane, CachePane):
            pane.choose(engine_id)
        self.action_show(list(self.panes).index("cache") + 1)

    def action_escape(self) -> None:
        self.pane.end_filter()

    def action_help(self) -> None:
        self.push_screen(Help(_HELP))
