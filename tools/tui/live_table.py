"""A table that follows changing data: only what differs is drawn again, and the cursor stays where it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from textual.widgets import DataTable
from textual.widgets.data_table import ColumnKey, RowDoesNotExist

from microserve.tools.common import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

Cell = str | Text


class LiveTable(DataTable[Cell]):
    """Rows with keys, shown whole with `show`."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, cursor_type="row", zebra_stripes=False, cell_padding=1)
        self._titles: tuple[str, ...] = ()
        self._shown: dict[str, tuple[Cell, ...]] = {}

    def set_columns(self, titles: Sequence[str]) -> None:
        """Other columns; the rows have to be shown again. A title that ends in ">" is of numbers, at the right."""
        if tuple(titles) == self._titles:
            return
        self.clear(columns=True)
        self._shown.clear()
        self._titles = tuple(titles)
        for title in titles:
            self.add_column(title.rstrip(">"), key=title)

    def show(self, rows: Sequence[tuple[str, Sequence[Cell]]]) -> None:
        """These rows in this order. Keys are unique."""
        wanted = {key: tuple(self._aligned(cells)) for key, cells in rows}
        if list(wanted) == list(self._shown):
            self._update(wanted)
        else:
            self._rebuild(wanted)
        self._shown = wanted

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor."""
        keys = list(self._shown)
        return keys[self.cursor_row] if 0 <= self.cursor_row < len(keys) else None

    def select(self, key: str) -> None:
        """Puts the cursor on a row, if it is there."""
        try:
            self.move_cursor(row=self.get_row_index(key), scroll=True)
        except RowDoesNotExist:
            return

    def _aligned(self, cells: Sequence[Cell]) -> list[Cell]:
        # A plain string would be read as markup, and names that others chose are none.
        return [
            Text(visible(cell), justify="right" if title.endswith(">") else "left") if isinstance(cell, str) else cell
            for title, cell in zip(self._titles, cells, strict=True)
        ]

    def _update(self, wanted: dict[str, tuple[Cell, ...]]) -> None:
        for key, cells in wanted.items():
            before = self._shown[key]
            if cells == before:
                continue
            for title, cell, old in zip(self._titles, cells, before, strict=True):
                if cell != old:
                    # Columns only grow: to shrink one the table would measure all of its cells, for each that changed.
                    wider = _width(cell) > self.columns[ColumnKey(title)].content_width
                    self.update_cell(key, title, cell, update_width=wider)

    def _rebuild(self, wanted: dict[str, tuple[Cell, ...]]) -> None:
        selected, row, scroll = self.selected, self.cursor_row, self.scroll_offset
        self.clear()
        for key, cells in wanted.items():
            self.add_row(*cells, key=key)
        if selected in wanted:
            row = list(wanted).index(selected)
        if wanted:
            self.move_cursor(row=min(max(0, row), len(wanted) - 1), scroll=False)
        self.scroll_to(scroll.x, scroll.y, animate=False)


def _width(cell: Cell) -> int:
    return cell.cell_len if isinstance(cell, Text) else len(cell)
