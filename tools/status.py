"""`microserve status`: a router and its engines, as a table or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from microserve.runtime.client import Client
from microserve.tools.common import (
    CONNECT_TIMEOUT,
    CommandFailed,
    add_operator_options,
    command_parser,
    errors_told,
    plain,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.messages import FleetEngine, StatusReply


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0, or 1 when no router answers."""
    parser = command_parser("status", "Show a router, and the engines as it sees them.")
    add_operator_options(parser)
    options = parser.parse_args(argv)
    try:
        with (
            errors_told("status", options.router),
            Client(options.router, connect_timeout=CONNECT_TIMEOUT, key_file=options.key_file) as client,
        ):
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
    return json.dumps({**plain(status), "engines": [engine_json(engine) for engine in status.engines]}, indent=2)


def engine_json(engine: FleetEngine) -> dict[str, object]:
    """One engine as the router sees it."""
    return {
        "id": engine.info.engine_id,
        "state": engine.state,
        "charged": engine.charged,
        "last_seen": engine.last_seen,
        "info": plain(engine.info),
        "load": plain(engine.load),
    }


def show(status: StatusReply) -> None:
    # Imported here: JSON needs no tables.
    from microserve.tools.fleet_view import headline, print_fleet, table_console

    console = table_console()
    console.print(headline(status))
    if status.engines:
        print_fleet(console, status)
    else:
        console.print("no engines; start one with `microserve engine`")
