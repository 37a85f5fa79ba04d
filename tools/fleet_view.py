"""How a router and its engines are shown: one table, used by `status` and by `up`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import ConsoleOptions

    from microserve.runtime.messages import FleetEngine, StatusReply

_STYLES = {"ready": "green", "draining": "yellow", "connecting": "yellow", "degraded": "red", "silent": "red"}
_COLUMNS = ("engine", "state", "model", "executor", "requests>", "running>", "waiting>", "KV used>", "prefix hits>",
            "tokens>", "heard>")  # fmt: skip
_SPARE = ("model", "heard>", "KV used>", "waiting>", "requests>", "tokens>", "executor", "prefix hits>")
"""Columns that a narrow terminal may do without, the most wanted first."""

_WIDEST = 1000


def table_console() -> Console:
    """Where tables are printed. Piped, nothing is cut off or folded: whoever reads it has no columns."""
    width = None if sys.stdout.isatty() else _WIDEST
    # What is printed has names in it that others chose: they are no markup.
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def plain_table(*columns: str) -> Table:
    """A table without lines. A column whose name ends with ">" holds numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for name in columns:
        table.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left")
    return table


def print_whole(console: Console, table: Table) -> None:
    """A table as wide as it has to be: a terminal folds its lines, and names and numbers that are cut are of no use."""
    wanted = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    before, console.width = console.width, max(console.width, wanted)
    console.print(table)
    console.width = before


def print_fitting(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], spare: Sequence[str]
) -> None:
    """A table without as many of the `spare` columns, from the last on, as it takes to fit; it says which. What is
    shown is whole: see `print_whole`."""
    table, shown = _fitting(console, columns, rows, spare, console.width)
    print_whole(console, table)
    left_out = ", ".join(name.removesuffix(">") for name in columns if name not in shown)
    if left_out:
        console.print(f"left out to fit: {left_out}; --json has all", style="dim", soft_wrap=True)


def _fitting(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    spare: Sequence[str],
    width: int,
) -> tuple[Table, list[str]]:
    """The table of at most `width` cells, and its columns."""
    shown = list(columns)
    table = _table(columns, rows, shown)
    for name in reversed(spare):
        if console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum <= width:
            break
        shown.remove(name)
        table = _table(columns, rows, shown)
    return table, shown


def _table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], shown: Sequence[str]) -> Table:
    table = plain_table(*shown)
    for row in rows:
        table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in shown))
    return table


def headline(status: StatusReply) -> str:
    """The router in one line."""
    parts = [
        f"router {status.router}",
        f"up {duration(status.uptime)}",
        f"strategy {status.strategy}",
        f"{status.active_requests} running",
        f"{status.queued_requests} queued",
        f"{status.requests_total} served",
    ]
    return " · ".join([*parts, status.http] if status.http else parts)


class FleetTable:
    """The engines, one a row, in as many columns as fit where it is drawn."""

    def __init__(self, status: StatusReply) -> None:
        self._rows = [_cells(engine) for engine in status.engines]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield _fitting(console, _COLUMNS, self._rows, _SPARE, options.max_width)[0]


def print_fleet(console: Console, status: StatusReply) -> None:
    """The same, as much as fits."""
    print_fitting(console, _COLUMNS, [_cells(engine) for engine in status.engines], _SPARE)


def _cells(engine: FleetEngine) -> list[str | Text]:
    load, info = engine.load, engine.info
    return [
        info.engine_id,
        Text(engine.state, style=_STYLES.get(engine.state, "")),
        info.model.name,
        info.executor,
        str(engine.charged),
        f"{load.running}/{info.max_running}",
        str(load.waiting),
        percent(load.total_pages - load.free_pages, load.total_pages),
        percent(load.prefix_hit_tokens, load.prefix_lookup_tokens),
        str(load.generated_tokens),
        f"{engine.last_seen:.1f} s ago",
    ]


def percent(part: int, whole: int) -> str:
    """A share as a whole percentage; "-" of nothing."""
    return f"{100 * part / whole:.0f}%" if whole else "-"


def duration(seconds: float) -> str:
    """Seconds as people say them: "45s", "3m 20s", "2h 5m", "4d 1h"."""
    whole = int(seconds)
    for size, unit, smaller, sub in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{sub}"
    return f"{whole}s"
