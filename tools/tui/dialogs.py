"""Questions that the TUI asks: may this be destroyed, what should be set, where should it go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, OptionList, Static

from microserve.runtime.errors import MicroserveError
from microserve.tools.common import visible

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from textual.app import ComposeResult

    from microserve.runtime.messages import StrategyInfo

_CANCEL: list[BindingType] = [Binding("escape", "cancel", "cancel")]


class Confirm(ModalScreen[bool]):
    """Yes or no; no is what Enter gives."""

    BINDINGS: ClassVar[list[BindingType]] = [*_CANCEL, Binding("y", "yes", "yes"), Binding("n", "cancel", "no")]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self._question = visible(question)
        self._yes = yes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(self._question, markup=False)
            with Horizontal(classes="buttons"):
                yield Button("No (n)", id="no")
                yield Button(f"{self._yes} (y)", id="yes", variant="error")

    def on_mount(self) -> None:
        self.query_one("#no").focus()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_yes(self) -> None:
        self.dismiss(True)

    def action_cancel(self) -> None:
        self.dismiss(False)


class Ask(ModalScreen[str | None]):
    """One line of text; None when it is cancelled. `check` says what is wrong with an answer, or ""."""

    BINDINGS: ClassVar[list[BindingType]] = _CANCEL

    def __init__(self, question: str, value: str, yes: str, check: Callable[[str], str] = lambda text: "") -> None:
        super().__init__()
        self._question = visible(question)
        self._value = value
        self._yes = yes
        self._check = check

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(self._question, markup=False)
            yield Input(self._value, id="answer")
            yield Static("", id="wrong", markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Cancel (Esc)", id="cancel")
                yield Button(f"{self._yes} (Enter)", id="yes", variant="warning")

    @on(Input.Submitted)
    @on(Button.Pressed, "#yes")
    def _submitted(self) -> None:
        answer = self.query_one("#answer", Input).value
        wrong = self._check(answer)
        if wrong:
            self.query_one("#wrong", Static).update(wrong)
        else:
            self.dismiss(answer)

    @on(Button.Pressed, "#cancel")
    def action_cancel(self) -> None:
        self.dismiss(None)


class Choose(ModalScreen[str | None]):
    """One of a few names; None when it is cancelled."""

    BINDINGS: ClassVar[list[BindingType]] = _CANCEL

    def __init__(self, question: str, names: Sequence[str]) -> None:
        super().__init__()
        self._question = visible(question)
        self._names = list(names)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(self._question, markup=False)
            yield OptionList(*self._names, markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Cancel (Esc)", id="cancel")

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._names[event.option_index])

    @on(Button.Pressed, "#cancel")
    def action_cancel(self) -> None:
        self.dismiss(None)


class EditStrategy(ModalScreen[bool]):
    """Settings, model and share of a strategy. Stays open until they are right; True when they were applied.

    `apply(settings, model, share, dry_run)` raises `MicroserveError` with what is wrong. Text is enough: the router
    knows the types.
    """

    BINDINGS: ClassVar[list[BindingType]] = [*_CANCEL, Binding("ctrl+s", "apply", "apply")]

    def __init__(
        self,
        strategy: StrategyInfo,
        present: Mapping[str, object],
        apply: Callable[[dict[str, str], str, float, bool], Awaitable[str]],
    ) -> None:
        super().__init__()
        self._strategy = strategy
        self._apply = apply
        # Names of Python, whose letters may be any: ids of widgets are ASCII.
        self._inputs = {
            setting.name: Input(
                str(present.get(setting.name, setting.default)),
                id=f"setting-{setting.name}" if setting.name.isascii() else None,
                compact=True,
            )
            for setting in strategy.settings
        }

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(visible(f"{self._strategy.name}: {self._strategy.summary}"), markup=False)
            with VerticalScroll(classes="fields"):
                for setting in self._strategy.settings:
                    with Horizontal(classes="field"):
                        yield Label(f"{setting.name} ({setting.type})", markup=False)
                        yield self._inputs[setting.name]
                with Horizontal(classes="field"):
                    yield Label("model (empty: every)")
                    yield Input("", id="model", compact=True)
                with Horizontal(classes="field"):
                    yield Label("share of traffic, %")
                    yield Input("100", id="share", compact=True)
            yield Static("", id="wrong", markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Check", id="check")
                yield Button("Apply (ctrl+s)", id="apply", variant="warning")
                yield Button("Cancel", id="cancel")

    @on(Button.Pressed, "#cancel")
    def action_cancel(self) -> None:
        self.dismiss(False)

    @on(Button.Pressed, "#check")
    async def _check(self) -> None:
        await self._send(dry_run=True)

    @on(Button.Pressed, "#apply")
    async def action_apply(self) -> None:
        # Checked first: what is wrong is told before anything changes.
        if await self._send(dry_run=True) and await self._send(dry_run=False):
            self.dismiss(True)

    async def _send(self, *, dry_run: bool) -> bool:
        wrong = self.query_one("#wrong", Static)
        settings = {name: field.value for name, field in self._inputs.items()}
        try:
            part = float(self.query_one("#share", Input).value) / 100
        except ValueError:
            wrong.update("share: a number above 0 and at most 100")
            return False
        try:
            said = await self._apply(settings, self.query_one("#model", Input).value.strip(), part, dry_run)
        except MicroserveError as error:
            wrong.update(error.message)
            return False
        wrong.update(said)
        return True


class Help(ModalScreen[None]):
    """Every key."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q", "close", "close"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Static(self._text)

    def action_close(self) -> None:
        self.dismiss()
