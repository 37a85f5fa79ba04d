"""`microserve events`: what happened in the fleet, as the router has it; with `--follow`, also what happens next."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from microserve.runtime.errors import PeerError
from microserve.tools.common import (
    CommandFailed,
    add_operator_options,
    command_parser,
    plain,
    visible,
    with_router,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import Events, FleetEvent

_MOST = 1000
"""Events that a router gives at a time, and keeps."""
_EVERY = 0.5
"""Seconds between looks."""


def main(argv: Sequence[str]) -> int:
    """The command; its exit code. `--follow` ends with Ctrl-C."""
    parser = command_parser("events", "Show what happened in the fleet, oldest first.")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="only events with a number above N")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="the newest N alone (default: 200)")
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what happens next")
    add_operator_options(parser)
    options = parser.parse_args(argv)
    if options.after < 0:
        parser.error(f"--after: {options.after} is below 0")
    if not 1 <= options.limit <= _MOST:
        parser.error(f"--limit: {options.limit} is not between 1 and {_MOST}")
    show = _show_json if options.json else _show
    try:
        if options.follow:
            work = functools.partial(follow, after=options.after, limit=options.limit, show=show, say=_say)
            with_router("events", options, work)
            return 0
        found = with_router("events", options, lambda client: client.events(after=options.after, limit=options.limit))
    except CommandFailed as failed:
        return failed.code
    for event in found.events:
        show(event)
    return 0


async def follow(
    client: AsyncClient,
    after: int,
    limit: int,
    show: Callable[[FleetEvent], None],
    say: Callable[[str], None],
    *,
    every: float = _EVERY,
) -> None:
    """Shows events for ever, across restarts of the router. Raises `PeerLost` when there is none at the beginning."""
    router, found = await _ask(client, after, limit)
    known = after
    while True:
        gap = found.events[0].seq - known - 1 if found.events and known else 0
        if gap > 0:
            say(f"{gap:,} events in between are not shown")
        for event in found.events:
            show(event)
        known = max(known, found.last)
        await asyncio.sleep(every)
        lost = False
        while True:
            try:
                now, found = await _ask(client, known, _MOST)
            except PeerError as error:
                if not lost:
                    say(f"{error.message}; waiting for it")
                    lost = True
                await asyncio.sleep(every)
                continue
            if now == router:
                break
            say("another router process: events are numbered from 1 again")
            router, known = now, 0


async def _ask(client: AsyncClient, after: int, limit: int) -> tuple[int, Events]:
    """The epoch of the router that answers, and its events."""
    epoch = (await client.connect()).session.peer.epoch
    return epoch, await client.events(after=after, limit=limit)


def _show(event: FleetEvent) -> None:
    at = datetime.fromtimestamp(event.at, UTC)
    who = f"{event.engine}@{event.epoch:x}" if event.engine else ""
    text = "  ".join(part for part in (who, event.detail) if part)
    print(f"{event.seq:5}  {at:%Y-%m-%d %H:%M:%S}Z  {visible(event.kind):13}  {visible(text)}".rstrip(), flush=True)


def _show_json(event: FleetEvent) -> None:
    print(json.dumps(plain(event)), flush=True)


def _say(text: str) -> None:
    print(f"microserve events: {visible(text)}", file=sys.stderr, flush=True)
