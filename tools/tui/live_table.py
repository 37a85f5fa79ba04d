"""A table that follows changing data: a line is drawn again only when what it says has changed.

Drawn by itself and not a `DataTable`: that one draws every cell of every line that is seen when one of them changes,
and measures whole columns, which is too much for a hundred engines each second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from microserve.tools.common import visible
from microserve.tools.tui.model import cut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.style import Style
    from textual import events

Cell = str | Text
"""Plain text, which others may have chosen, or our own in colours."""


class LiveTable(ScrollView, can_focus=True):
    """Rows with keys, shown whole with `show`; a cursor that stays with the row that it is on.

    With `first`, it stays on the first row, whichever that is, until somebody moves it: rows that come and go must not
    carry the view away from what is new.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"live-table--header", "live-table--cursor"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False),
        Binding("down", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "move_to(0)", show=False),
        Binding("end", "move_to(-1)", show=False),
        Binding("enter", "choose", show=False),
    ]

    @dataclass
    class RowHighlighted(Message):
        """The cursor is on another row, or on none."""

        table: LiveTable
        key: str | None

        @property
        def control(self) -> LiveTable:
            return self.table

    @dataclass
    class RowSelected(Message):
        """Enter, or a click on the row under the cursor."""

        table: LiveTable
        key: str

        @property
        def control(self) -> LiveTable:
            return self.table

    def __init__(self, *, id: str | None = None, first: bool = False) -> None:
        super().__init__(id=id)
        self._first = self._at_first = first
        self._titles: tuple[str, ...] = ()
        self._least = 0
        self._widths: list[int] = []
        self._keys: list[str] = []
        self._rows: dict[str, tuple[Cell, ...]] = {}
        self._cursor = 0

    def set_columns(self, titles: Sequence[str], *, least: int = 0) -> None:
        """Other columns; the rows have to be shown again. A title that ends in ">" is of numbers, at the right.

        With `least`, what is in the first column (names, plain text) gives way down to that width where others would
        not be seen.
        """
        if (tuple(titles), least) == (self._titles, self._least):
            return
        self._titles, self._least = tuple(titles), least
        self._keys, self._rows = [], {}
        self._measure(self._rows)
        self.refresh()

    def show(self, rows: Sequence[tuple[str, Sequence[Cell]]]) -> None:
        """These rows in this order. Keys are unique."""
        selected, before = self.selected, self._rows
        self._rows = wanted = {key: tuple(map(_cell, cells)) for key, cells in rows}
        if list(wanted) == self._keys:
            self._refresh_changed(before, wanted)
            return
        seen = self._sees(self._cursor)
        self._keys = list(wanted)
        self._measure(wanted)
        row = self._keys.index(selected) if selected in wanted and not self._at_first else self._cursor
        self._cursor = max(0, min(row, len(self._keys) - 1))
        self.refresh()
        if seen:
            self._reveal()
        if self.selected != selected:
            self.post_message(self.RowHighlighted(self, self.selected))

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def titles(self) -> list[str]:
        """What is above the columns."""
        return [title.rstrip(">") for title in self._titles]

    @property
    def row_count(self) -> int:
        return len(self._keys)

    def get_row_at(self, index: int) -> list[Cell]:
        """The cells of a row."""
        return list(self._rows[self._keys[index]])

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor."""
        return self._keys[self._cursor] if self._cursor < len(self._keys) else None

    # --- drawing -----------------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        left, top = self.scroll_offset
        width, base = self.size.width, self.rich_style
        index = y - 1 + top
        if y == 0:
            style = base + self.get_component_rich_style("live-table--header")
            cells: Sequence[Cell] = self.titles
        elif index < len(self._keys) and self._keys[index] in self._rows:
            under = index == self._cursor
            style = base + self.get_component_rich_style("live-table--cursor") if under else base
            cells = self._rows[self._keys[index]]
        else:
            return Strip.blank(width, base)
        segments: list[Segment] = []
        # What is under the cursor has its colours alone.
        plain = style is not base
        for title, room, cell in zip(self._titles, self._rooms(), cells, strict=True):
            segments += self._draw(cell, room, style, right=title.endswith(">"), plain=plain)
        return Strip(segments).crop_extend(left, left + width, style)

    def _draw(self, cell: Cell, room: int, style: Style, *, right: bool, plain: bool) -> list[Segment]:
        if isinstance(cell, Text) and not plain:
            console = self.app.console
            own = style + console.get_style(cell.style)
            # Rich leaves the style of the whole to us where nothing in it has one of its own.
            drawn = [
                Segment(segment.text, style + segment.style if segment.style is not None else own)
                for segment in cell.render(console)
            ]
            lacking = max(0, room - cell.cell_len)
            return [Segment(" ", style), *drawn, Segment(" " * (lacking + 1), style)]
        text = cut(str(cell), room)
        text = " " * (room - cell_len(text)) + text if right else set_cell_size(text, room)
        return [Segment(f" {text} ", style)]

    def _refresh_changed(self, before: dict[str, tuple[Cell, ...]], wanted: dict[str, tuple[Cell, ...]]) -> None:
        """Draws the lines that are seen and say something else now. A column that has to grow moves all of them."""
        changed = [index for index, (key, cells) in enumerate(wanted.items()) if cells != before[key]]
        if self._grow([wanted[self._keys[index]] for index in changed]):
            self.refresh()
            return
        top, (width, height) = self.scroll_offset.y, self.size
        lines = [index - top + 1 for index in changed]
        seen = [Region(0, line, width, 1) for line in lines if 0 < line < height]
        if seen:
            self.refresh(*seen)

    def _measure(self, rows: dict[str, tuple[Cell, ...]]) -> None:
        self._widths = [len(title) for title in self.titles]
        self._grow(list(rows.values()))
        self._resize()

    def _grow(self, rows: Sequence[tuple[Cell, ...]]) -> bool:
        """Makes columns wide enough for these rows. While the same rows are shown they only grow, and do not jump."""
        before = self._widths
        wanted = [max(map(_width, column)) for column in zip(*rows, strict=True)] if rows else before
        self._widths = list(map(max, wanted, before))
        if self._widths == before:
            return False
        self._resize()
        return True

    def _rooms(self) -> list[int]:
        """How wide the columns are drawn."""
        if not self._least or not self._widths:
            return self._widths
        first, *rest = self._widths
        left = self.size.width - sum(rest) - 2 * len(self._widths)
        return [min(first, max(self._least, left)), *rest]

    def _resize(self) -> None:
        size = Size(sum(self._rooms()) + 2 * len(self._widths), len(self._keys) + 1)
        if size != self.virtual_size:
            self.virtual_size = size

    def on_resize(self) -> None:
        self._resize()

    # --- the cursor --------------------------------------------------------------------------------------------------

    def move_cursor(self, *, row: int) -> None:
        """Puts the cursor on a row, and the row on the screen."""
        row = max(0, min(row, len(self._keys) - 1))
        self._at_first = self._first and row == 0
        if row != self._cursor:
            self._cursor = row
            self.refresh()
            self.post_message(self.RowHighlighted(self, self.selected))
        self._reveal()

    def _sees(self, row: int) -> bool:
        top = self.scroll_offset.y
        return top <= row < top + self.size.height - 1

    def _reveal(self) -> None:
        if not self._sees(self._cursor):
            below = self._cursor >= self.scroll_offset.y
            self.scroll_to(y=self._cursor - (max(1, self.size.height - 1) - 1 if below else 0), animate=False)

    def action_move(self, step: int) -> None:
        self.move_cursor(row=self._cursor + step)

    def action_page(self, step: int) -> None:
        self.move_cursor(row=self._cursor + step * max(1, self.size.height - 2))

    def action_move_to(self, index: int) -> None:
        self.move_cursor(row=index if index >= 0 else len(self._keys) - 1)

    def action_choose(self) -> None:
        if self.selected is not None:
            self.post_message(self.RowSelected(self, self.selected))

    def on_click(self, event: events.Click) -> None:
        index = event.y - 1 + self.scroll_offset.y
        if event.y == 0 or index >= len(self._keys):
            return
        if index == self._cursor:
            self.action_choose()
        else:
            self.move_cursor(row=index)


def _cell(cell: Cell) -> Cell:
    return visible(cell) if isinstance(cell, str) and not cell.isprintable() else cell


def _width(cell: Cell) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell_len(cell)
