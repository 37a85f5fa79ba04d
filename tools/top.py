"""`microserve top`: watch and operate the fleet in the terminal."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING

from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import MicroserveError
from microserve.tools.common import CONNECT_TIMEOUT, add_key_option, add_router_option, command_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHORTEST = 0.1


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0, or 2 where there is no terminal."""
    parser = command_parser(
        "top", "Watch the fleet, its requests, strategies and caches, and operate them. Press ? for keys."
    )
    add_router_option(parser)
    add_key_option(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between looks (default: 1)")
    options = parser.parse_args(argv)
    if not options.interval >= _SHORTEST:
        parser.error(f"--interval: at least {_SHORTEST} s, not {options.interval}")
    # It draws on standard error, as textual does.
    if not (sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()):
        said = "needs a terminal for its input, output and errors; `microserve engines --json` does not"
        print(f"microserve top: {said}", file=sys.stderr)
        if sys.stdout.isatty() and not sys.stderr.isatty():
            # Whoever sends errors elsewhere would see nothing at all.
            print(f"microserve top: {said}")
        return 2
    try:
        import textual  # noqa: F401 - says so before anything is drawn
    except ImportError:
        print("microserve top: needs textual: pip install 'microserve[tui]'", file=sys.stderr)
        return 1
    threading.Thread(target=_end_with_terminal, name="terminal", daemon=True).start()
    try:
        return asyncio.run(_run(options.router, options.key_file, options.interval))
    except MicroserveError as error:
        print(f"microserve top: {error.message}", file=sys.stderr)
        return 1


def _end_with_terminal() -> None:
    """Ends the process when its terminal has gone. Whoever is no part of the terminal's session gets no SIGHUP, and
    textual would wait for the terminal on a whole core, for ever."""
    gone = select.poll()
    gone.register(sys.stdin, 0)  # for nothing but what is always told: that the other end is closed
    gone.poll()
    os._exit(128 + signal.SIGHUP)


async def _run(router: str, key_file: str | None, interval: float) -> int:
    # Imported here: other commands do without textual.
    from microserve.tools.tui.app import TopApp

    client = AsyncClient(router, connect_timeout=CONNECT_TIMEOUT, key_file=key_file)
    app = TopApp(client, router, interval=interval)
    try:
        await app.run_async()
    finally:
        await client.close()
    # A bug was shown with its traceback by then, and is no success.
    return app.return_code or 0
