"""How a router and its engines are shown: one table, used by `status` and by `up`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from microserve.runtime.messages import FleetEngine, StatusReply

_STYLES = {"ready": "green", "draining": "yellow", "connecting": "yellow", "degraded": "red", "silent": "red"}


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


def fleet_table(status: StatusReply) -> Table:
    """The engines, one a row."""
    figures = ("requests>", "running>", "waiting>", "KV used>", "prefix hits>", "tokens>", "heard>")
    table = plain_table("engine", "state", "model", "executor", *figures)
    for engine in status.engines:
        table.add_row(*_cells(engine))
    return table


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
