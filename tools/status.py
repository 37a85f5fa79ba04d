"""`microserve status`: a router and its engines, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import msgspec

from microserve.runtime.client import Client
from microserve.tools.common import CONNECT_TIMEOUT, CommandFailed, add_router_option, command_parser, errors_told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.messages import StatusReply


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0, or 1 when no router answers."""
    parser = command_parser("status", "Show a router, and the engines as it sees them.")
    add_router_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        with errors_told("status", options.router), Client(options.router, connect_timeout=CONNECT_TIMEOUT) as client:
            status = client.status()
    except CommandFailed as failed:
        return failed.code
    if options.json:
        print(as_json(status))
    else:
        show(status)
    return 0


def as_json(status: StatusReply) -> str:
    """Every field, defaults too: who reads JSON must not have to know them."""
    engines = [
        {
            "id": engine.info.engine_id,
            "state": engine.state,
            "charged": engine.charged,
            "last_seen": engine.last_seen,
            "info": _plain(engine.info),
            "load": _plain(engine.load),
        }
        for engine in status.engines
    ]
    return json.dumps({**_plain(status), "engines": engines}, indent=2)


def _plain(struct: msgspec.Struct) -> dict[str, object]:
    return {
        field: _plain(value) if isinstance(value, msgspec.Struct) else value
        for field, value in msgspec.structs.asdict(struct).items()
    }


def show(status: StatusReply) -> None:
    # Imported here: JSON needs no tables.
    from rich.console import Console

    from microserve.tools.fleet_view import fleet_table, headline

    # Piped, nothing is cut off: whoever reads it has no columns.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(headline(status))
    if status.engines:
        console.print(fleet_table(status))
    else:
        console.print("no engines; start one with `microserve engine`")
