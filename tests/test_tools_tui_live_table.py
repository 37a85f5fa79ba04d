"""The table that follows changing data: what it draws, where its cursor stays, what keys and the mouse do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rich.text import Text
from textual.app import App

from microserve.tools.tui.live_table import LiveTable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from textual.app import ComposeResult
    from textual.geometry import Region
    from textual.pilot import Pilot

    from microserve.tools.tui.live_table import Cell


class Watched(LiveTable):
    """Remembers what it was asked to draw again: lines, or () for all of them."""

    drawn: list[tuple[int, ...]]

    def refresh(self, *regions: Region, repaint: bool = True, layout: bool = False, recompose: bool = False) -> Watched:
        if not hasattr(self, "drawn"):
            self.drawn = []
        self.drawn.append(tuple(region.y for region in regions))
        return super().refresh(*regions, repaint=repaint, layout=layout, recompose=recompose)


class Shown(App[None]):
    """A table of ten lines: its titles, and nine rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Watched(id="table")
        self.table.set_columns(("name", "count>"))
        self.said: list[str] = []

    def compose(self) -> ComposeResult:
        yield self.table

    def on_live_table_row_highlighted(self, message: LiveTable.RowHighlighted) -> None:
        self.said.append(f"on {message.key}")

    def on_live_table_row_selected(self, message: LiveTable.RowSelected) -> None:
        self.said.append(f"chose {message.key}")

    def lines(self) -> list[str]:
        return [self.table.render_line(y).text.rstrip() for y in range(10)]


def run(work: Callable[[Shown, Pilot[None]], Awaitable[None]]) -> None:
    async def main() -> None:
        app = Shown()
        async with app.run_test(size=(30, 10)) as pilot:
            app.table.focus()
            await pilot.pause()
            await work(app, pilot)

    asyncio.run(main())


def rows(*names: str, count: str = "1") -> list[tuple[str, Sequence[Cell]]]:
    return [(name, [name, count]) for name in names]


MANY = [f"row{index:02}" for index in range(30)]


def test_only_lines_that_say_something_else_are_drawn_again() -> None:
    async def work(app: Shown, pilot: Pilot[None]) -> None:
        table = app.table
        table.show(rows(*MANY))
        await pilot.pause()
        assert app.lines()[:3] == [" name   count", " row00      1", " row01      1"]
        table.drawn.clear()
        table.show(rows(*MANY))
        assert table.drawn == []
        changed = rows(*MANY)
        # The second is seen, the last is not.
        changed[1], changed[-1] = ("row01", ["row01", "2"]), ("row29", ["row29", "2"])
        table.show(changed)
        assert table.drawn == [(2,)]
        assert app.lines()[2] == " row01      2"
        table.drawn.clear()
        changed[2] = ("row02", ["row02", "1,000,000"])
        table.show(changed)
        # A column has grown: everything has moved.
        assert () in table.drawn
        assert app.lines()[:4] == [
            " name       count",
            " row00          1",
            " row01          2",
            " row02  1,000,000",
        ]
        # It does not jump back while the same rows are there.
        table.show(rows(*MANY))
        assert app.lines()[0] == " name       count"
        table.show(rows("row00"))
        assert app.lines()[:3] == [" name   count", " row00      1", ""]

    run(work)


def test_the_cursor_stays_with_its_row() -> None:
    async def work(app: Shown, pilot: Pilot[None]) -> None:
        table = app.table
        table.show(rows("a", "b", "c"))
        await pilot.press("down")
        assert table.selected == "b"
        table.show(rows("x", "y", "a", "b", "c"))
        assert table.selected == "b"
        # It is gone: the one in its place.
        table.show(rows("x", "y", "a", "c"))
        assert table.selected == "c"
        table.show(rows("x"))
        assert table.selected == "x"
        table.show([])
        assert table.row_count == 0
        await pilot.press("down", "enter", "end")
        table.show(rows("z"))
        await pilot.pause()
        assert app.said == ["on a", "on b", "on c", "on x", "on None", "on z"]
        assert table.get_row_at(0) == ["z", "1"]

    run(work)


def test_a_row_under_the_cursor_that_was_seen_stays_in_sight() -> None:
    async def work(app: Shown, pilot: Pilot[None]) -> None:
        table = app.table
        table.show(rows(*MANY))
        await pilot.press("down")
        table.show(rows(*(f"new{index:02}" for index in range(20)), *MANY))
        await pilot.pause()
        assert table.selected == "row01"
        assert app.lines()[9] == " row01      1"

    run(work)


def test_names_give_way_to_what_would_not_be_seen() -> None:
    async def work(app: Shown, pilot: Pilot[None]) -> None:
        table = app.table
        table.set_columns(("name", "count>", "state"), least=8)
        table.show([("a", ["engine-with-a-long-name", "1", "ready"])])
        await pilot.pause()
        assert app.lines()[:2] == [" name            count  state", " engine-…g-name      1  ready"]
        assert table.virtual_size.width == 30
        await pilot.resize_terminal(20, 10)
        await pilot.pause()
        # Down to what it needs: what lacks then is to be scrolled to.
        assert app.lines()[:1] == [" name      count  st"]
        assert table.virtual_size.width == 24
        await pilot.resize_terminal(60, 10)
        await pilot.pause()
        assert app.lines()[1] == " engine-with-a-long-name      1  ready"

    run(work)


def test_keys_and_the_mouse() -> None:
    async def work(app: Shown, pilot: Pilot[None]) -> None:
        table = app.table
        table.show(rows(*MANY))
        await pilot.pause()
        found = []
        for key in ("up", "pagedown", "pagedown", "end", "down", "pageup", "home"):
            await pilot.press(key)
            await pilot.pause()
            assert f" {table.selected} " in "\n".join(app.lines())
            found.append(table.selected)
        assert found == ["row00", "row08", "row16", "row29", "row29", "row21", "row00"]
        app.said.clear()
        await pilot.press("enter")
        await pilot.click("#table", offset=(3, 4))
        await pilot.click("#table", offset=(3, 4))
        await pilot.click("#table", offset=(3, 0))
        await pilot.press("end")
        await pilot.pause()
        await pilot.click("#table", offset=(3, 1))
        await pilot.pause()
        assert app.said == ["chose row00", "on row03", "chose row03", "on row29", "on row21"]

    run(work)


def test_colours_are_ours_and_text_is_what_it_is() -> None:
    async def work(app: Shown, pilot: Pilot[None]) -> None:
        table = app.table
        state: list[tuple[str, Sequence[Cell]]] = [
            ("first", ["[b]x[/y]\x1b[2J", "1"]),
            ("second", [Text("ready", "green"), "日本"]),
        ]
        table.show(state)
        await pilot.pause()
        assert app.lines()[1:3] == [" [b]x[/y]\\x1b[2J      1", f" ready{' ' * 13}日本"]
        strip = table.render_line(2)
        [drawn] = [segment for segment in strip if segment.text == "ready"]
        assert drawn.style is not None
        assert drawn.style.color is not None
        assert drawn.style.color.name == "green"
        # Under the cursor there is one colour.
        await pilot.press("down")
        assert len({segment.style for segment in table.render_line(2)}) == 1
        # Other columns: the cursor stays.
        table.set_columns(("name",))
        assert app.lines()[:2] == [" name", ""]
        table.show([("first", ["a"]), ("second", ["b"])])
        assert table.selected == "second"

    run(work)
