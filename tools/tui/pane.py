"""What the panes have in common: a filter, and calls on the router whose refusals are told and lose nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input

from microserve.runtime.errors import MicroserveError
from microserve.tools.common import visible
from microserve.tools.tui.dialogs import Confirm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import StatusReply


class Pane(Vertical):
    """One view of the fleet. `refresh_data` is called once an interval while it is shown."""

    title: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = [Binding("slash", "filter", "filter", key_display="/")]

    def __init__(self, client: AsyncClient, *, id: str) -> None:
        super().__init__(id=id)
        self.client = client
        self.pattern = ""
        self.status: StatusReply | None = None
        """The router's last answer."""

    async def refresh_data(self, now: float) -> None:
        """Asks for what this pane shows, and shows it. `now` in seconds, monotonic. Raises `MicroserveError`."""

    def show(self) -> None:
        """Draws again what is known."""

    # --- filter ------------------------------------------------------------------------------------------------------

    def action_filter(self) -> None:
        """Opens the line at the bottom."""
        if self.query("#filter"):
            self.query_one("#filter").focus()
            return
        line = Input(
            self.pattern, placeholder="filter: words, all of them; Enter keeps, Esc ends", id="filter", compact=True
        )
        self.mount(line)
        line.focus()

    @on(Input.Changed, "#filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        self.pattern = event.value
        self.show()

    @on(Input.Submitted, "#filter")
    def _filter_kept(self) -> None:
        self.focus_first()

    def end_filter(self) -> bool:
        """Shows everything again. Whether there was a filter."""
        lines = self.query("#filter")
        had = bool(self.pattern) or bool(lines)
        self.pattern = ""
        lines.remove()
        if had:
            self.focus_first()
            self.show()
        return had

    def focus_first(self) -> None:
        """Puts the keyboard on what the pane is about."""

    # --- actions -----------------------------------------------------------------------------------------------------

    @work
    async def act(self, what: str, call: Callable[[], Awaitable[object]], *, ask: str = "", yes: str = "Yes") -> None:
        """Does something to the fleet, after `ask` was agreed to, and says how it went."""
        if ask and not await self.app.push_screen_wait(Confirm(ask, yes)):
            return
        try:
            said = await call()
        except MicroserveError as error:
            self.app.notify(visible(f"{what}: {error.message}"), severity="error", markup=False)
            return
        self.app.notify(visible(f"{what}: {said}" if isinstance(said, str) and said else what), markup=False)
