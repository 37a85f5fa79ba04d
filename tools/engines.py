"""`microserve engines [ENGINE]`: the engines of a fleet as a table, or one of them in every detail."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.runtime.errors import NotFound, PeerError
from microserve.tools.common import (
    CommandFailed,
    add_operator_options,
    command_parser,
    counted,
    plain,
    print_json,
    visible,
    with_router,
)
from microserve.tools.status import engine_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.text import Text

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import FleetEngine, InfoReply, PeerLink, StatsReply, StatusReply

_PAGES = ("free", "owned", "cached", "leased", "quarantined")
_COLUMNS = (
    *("engine", "state", "model", "requests>", "running>", "waiting>", *(f"{name}>" for name in _PAGES)),
    *("tokens>", "hits>", "sent>", "received>", "epoch>", "up>"),
)
_SPARE = ("model", "waiting>", "hits>", "free>", "cached>", "tokens>", "quarantined>", "up>", "requests>", "leased>",
          "owned>", "epoch>", "sent>", "received>")  # fmt: skip
"""Columns that a narrow terminal may do without, the most wanted first."""


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 1 also when an engine that was asked for does not answer."""
    parser = command_parser("engines", "Show the engines of a fleet, or one of them with its links and statistics.")
    parser.add_argument("engine", nargs="?", default=None, metavar="ENGINE", help="its id (default: all, as a table)")
    add_operator_options(parser)
    options = parser.parse_args(argv)
    try:
        if options.engine is not None:
            found = with_router("engines", options, functools.partial(look, engine_id=options.engine))
            return _show(found, as_json=options.json)
        status = with_router("engines", options, lambda client: client.status())
    except CommandFailed as failed:
        return failed.code
    if options.json:
        print_json([engine_json(engine) for engine in status.engines])
    else:
        _show_all(status)
    return 0


def named_engines(status: StatusReply, names: Iterable[str]) -> list[FleetEngine]:
    """The engines of those names, each once. Raises `NotFound`, which says what engines there are."""
    known = {engine.info.engine_id: engine for engine in status.engines}
    for name in names:
        if name not in known:
            raise NotFound(f"there is no engine {name!r}; there are: {', '.join(sorted(known)) or 'none'}")
    return [known[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True, slots=True)
class Details:
    """One engine: as the router sees it, and what it says itself; `error` says why it does not."""

    engine: FleetEngine
    info: InfoReply | None = None
    stats: StatsReply | None = None
    error: str = ""


async def look(client: AsyncClient, engine_id: str) -> Details:
    """Asks the router for an engine, and then the engine. Raises `NotFound`."""
    [engine] = named_engines(await client.status(), [engine_id])
    remote = client.engine(engine_id)
    try:
        return Details(engine, await remote.info(), await remote.stats())
    except PeerError as error:
        # Silent or lost: what the router knows of it is the more wanted.
        return Details(engine, error=error.message)


def _show(found: Details, *, as_json: bool) -> int:
    if as_json:
        links = None if found.info is None else plain(found.info.links)
        load = found.engine.load if found.info is None else found.info.load
        about = {"load": plain(load), "links": links, "stats": plain(found.stats), "error": found.error}
        print_json(engine_json(found.engine) | about)
    else:
        _show_details(found)
    return 1 if found.error else 0


# --- text ----------------------------------------------------------------------------------------------------------


def _show_all(status: StatusReply) -> None:
    # Imported here, and below: JSON needs no tables.
    from microserve.tools.fleet_view import percent, print_fitting, table_console
    from microserve.tools.tui.model import nbytes

    console = table_console()
    if not status.engines:
        console.print("no engines; start one with `microserve engine`")
        return
    now = time.time()
    rows: list[list[str | Text]] = []
    for engine in sorted(status.engines, key=lambda each: each.info.engine_id):
        info, load = engine.info, engine.load
        rows.append(
            [
                visible(info.engine_id),
                _state(engine.state),
                visible(info.model.name),
                f"{engine.charged:,}",
                f"{load.running:,}/{info.max_running:,}",
                f"{load.waiting:,}",
                *(f"{getattr(load, name + '_pages'):,}" for name in _PAGES),
                f"{load.generated_tokens:,}",
                percent(load.prefix_hit_tokens, load.prefix_lookup_tokens),
                nbytes(load.sent_bytes),
                nbytes(load.received_bytes),
                f"{info.epoch:x}",
                _uptime(engine, now),
            ]
        )
    print_fitting(console, _COLUMNS, rows, _SPARE)


def _show_details(found: Details) -> None:
    from rich.text import Text

    from microserve.tools.fleet_view import percent, plain_table, print_whole, table_console
    from microserve.tools.tui.model import nbytes

    console = table_console()
    engine = found.engine
    info, load = engine.info, engine.load
    if found.info is not None:
        info, load = found.info.info, found.info.load
    state = engine.state if found.info is None else load.state
    labels = " ".join(f"{name}={value}" for name, value in sorted(info.labels.items()))
    layout, model = info.layout, info.model
    facts: list[tuple[str, str | Text]] = [
        ("engine", visible(info.engine_id)),
        ("state", _state(state)),
        ("model", visible(f"{model.name}, revision {model.revision}, context {model.max_context:,}")),
        ("executor", info.executor),
        ("labels", visible(labels) or "none"),
        ("endpoint", visible(info.endpoint)),
        ("epoch", f"{info.epoch:x}, up {_uptime(engine, time.time())}, heard {engine.last_seen:.1f} s ago"),
        (
            "layout",
            f"{layout.page_size} tokens a page, {layout.dtype}, {layout.layers} layers, "
            f"{layout.kv_heads} KV heads of {layout.head_dim}, rank {layout.tp_rank} of {layout.tp_size}",
        ),
        (
            "load",
            f"{load.running:,} of {info.max_running:,} running, {load.waiting:,} waiting, "
            f"{load.queued_tokens:,} tokens to prefill, {counted(engine.charged, 'request')} of the router",
        ),
        (
            "pages",
            ", ".join(f"{getattr(load, name + '_pages'):,} {name}" for name in _PAGES) + f" of {load.total_pages:,}",
        ),
        (
            "tokens",
            f"{load.generated_tokens:,} generated, {load.prefilled_tokens:,} prefilled, "
            f"{percent(load.prefix_hit_tokens, load.prefix_lookup_tokens)} of "
            f"{load.prefix_lookup_tokens:,} found cached",
        ),
        ("steps", f"{load.steps:,}, {load.preemptions:,} preemptions"),
        (
            "KV moved",
            f"{nbytes(load.sent_bytes)} sent, {nbytes(load.received_bytes)} received, "
            f"{load.push_failures:,} pushes failed",
        ),
    ]
    if found.stats is not None:
        whole = found.stats.integrity == "ok"
        facts.append(("integrity", Text(visible(found.stats.integrity), "green" if whole else "red")))
    for name, text in facts:
        console.print(Text(f"{name:10}", "bold") + (text if isinstance(text, Text) else Text(text)), soft_wrap=True)
    if found.info is not None and found.info.links:
        console.print()
        table = plain_table(
            "link to", "state", "transport", "GB/s probed>", "GB/s sent>", "sent>", "received>", "failed>", ""
        )
        for link in found.info.links:
            table.add_row(*_link_cells(link))
        print_whole(console, table)
    if found.stats is not None:
        console.print()
        table = plain_table("statistic", "value>")
        for name, value in sorted(found.stats.values.items()):
            table.add_row(visible(name), f"{value:,.10g}")
        print_whole(console, table)
    if found.error:
        console.print(Text(f"\nit does not answer: {visible(found.error)}", "red"), soft_wrap=True)


def _link_cells(link: PeerLink) -> list[str | Text]:
    from microserve.tools.tui.model import nbytes

    sent = link.sent_bytes / link.sent_seconds / 1e9 if link.sent_seconds else 0.0
    return [
        visible(link.engine_id),
        _state(link.state),
        visible(link.transport) or "-",
        f"{link.gigabytes_per_second:.2f}" if link.gigabytes_per_second else "-",
        f"{sent:.2f}" if sent else "-",
        nbytes(link.sent_bytes),
        nbytes(link.received_bytes),
        f"{link.failures:,}",
        visible(link.detail),
    ]


def _state(state: str) -> Text:
    from microserve.tools.tui.model import state_text

    return state_text(visible(state))


def _uptime(engine: FleetEngine, now: float) -> str:
    from microserve.tools.fleet_view import duration

    started = engine.info.started_at
    return duration(max(0.0, now - started)) if started else "-"
