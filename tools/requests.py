"""`microserve requests [REQUEST_ID]` and `requests abort REQUEST_ID...`: what runs, what ran; and ending it."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from microserve.runtime.errors import NotFound
from microserve.tools.common import (
    CommandFailed,
    add_operator_options,
    command_parser,
    confirm,
    plain,
    print_json,
    visible,
    with_router,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.console import Console
    from rich.text import Text

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import RequestInfo, Requests

_MOST_RECENT = 256
_COLUMNS = ("request", "state", "time>", "TTFT>", "prompt>", "cached>", "output>", "engines", "strategy", "model")
_SPARE = ("time>", "output>", "engines", "TTFT>", "prompt>", "cached>", "model", "strategy")
"""Columns that a narrow terminal may do without, the most wanted first."""
_AXIS = 30
"""Characters of a timeline."""


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 1 also when there is no such request."""
    parser = _parser()
    # Mixed: `requests abort --yes ID` and `requests --json ID` both mean what they say.
    options = parser.parse_intermixed_args(argv)
    words: list[str] = options.words
    if not 0 <= options.recent <= _MOST_RECENT:
        parser.error(f"--recent: {options.recent} is not between 0 and {_MOST_RECENT}")
    try:
        if words[:1] == ["abort"]:
            return _abort(parser, options, list(dict.fromkeys(words[1:])))
        if len(words) > 1:
            parser.error("`abort REQUEST_ID...` ends requests; without `abort`, one REQUEST_ID at a time")
        if words:
            found = with_router("requests", options, functools.partial(_find, request_id=words[0]))
            _show(found, as_json=options.json)
            return 0
        listed = with_router("requests", options, lambda client: client.requests(recent=options.recent))
    except CommandFailed as failed:
        return failed.code
    if options.json:
        print_json({name: plain(getattr(listed, name)) for name in ("active", "requests", "recent")})
    else:
        _show_all(listed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "requests",
        "Show what runs and waits at a router, oldest first; or one request with what was asked of engines for it; "
        "or end requests: their callers are told that they were cancelled.",
    )
    parser.usage = (
        "microserve requests [OPTIONS]\n"
        "       microserve requests [OPTIONS] REQUEST_ID\n"
        "       microserve requests [OPTIONS] abort REQUEST_ID..."
    )
    parser.add_argument("words", nargs="*", metavar="REQUEST_ID", help="of one request; after `abort`: of those to end")
    parser.add_argument(
        "--recent",
        type=int,
        default=0,
        metavar="N",
        help=f"also the last N that ended, newest first (at most {_MOST_RECENT})",
    )
    parser.add_argument("--yes", action="store_true", help="abort without asking")
    add_operator_options(parser)
    return parser


async def _find(client: AsyncClient, request_id: str) -> list[RequestInfo]:
    """Every request of that name, those that run first. Raises `NotFound`."""
    found = await client.requests(request_id=request_id)
    if not found.requests and not found.recent:
        raise NotFound(f"there is no request {request_id!r}; the last {_MOST_RECENT} that ended are remembered")
    return [*found.requests, *found.recent]


def _abort(parser: argparse.ArgumentParser, options: argparse.Namespace, names: list[str]) -> int:
    if not names:
        parser.error("abort: which REQUEST_ID?")
    what = f"request {visible(names[0])}" if len(names) == 1 else f"{len(names)} requests"
    confirm(parser, f"Abort {what}? Callers get an error.", yes=options.yes)

    async def abort(client: AsyncClient) -> dict[str, str]:
        return {name: await client.abort(name) for name in names}

    outcomes = with_router("requests", options, abort)
    if options.json:
        print_json([{"request_id": name, "outcome": outcome} for name, outcome in outcomes.items()])
    for name, outcome in outcomes.items():
        if outcome != "freed":
            print(f"microserve requests: {visible(name)} does not run", file=sys.stderr)
        elif not options.json:
            print(f"{visible(name)}: aborted")
    return 0 if set(outcomes.values()) == {"freed"} else 1


# --- text ----------------------------------------------------------------------------------------------------------


def _show_all(listed: Requests) -> None:
    # Imported here, and below: JSON needs no tables.
    from microserve.tools.fleet_view import print_fitting, table_console
    from microserve.tools.tui.model import seconds, state_text

    console = table_console()
    if not listed.requests and not listed.recent:
        console.print("no requests")
        return
    rows: list[list[str | Text]] = [
        [
            visible(request.request_id),
            state_text(visible(request.state)),
            # How long it took, of one that has ended.
            seconds(request.age if request.ended is None else request.ended),
            seconds(request.first_token),
            f"{request.prompt_tokens:,}",
            f"{request.cached_tokens:,}",
            f"{request.output_tokens:,}",
            visible(", ".join(request.engines)) or "-",
            visible(request.strategy),
            visible(request.model),
        ]
        for request in [*listed.requests, *listed.recent]
    ]
    print_fitting(console, _COLUMNS, rows, _SPARE)
    if listed.active > len(listed.requests):
        console.print(f"and {listed.active - len(listed.requests):,} more that run or wait")


def _show(found: Sequence[RequestInfo], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    from microserve.tools.fleet_view import table_console

    console = table_console()
    for index, request in enumerate(found):
        if index:
            console.print()
        show_one(console, request)


def show_one(console: Console, request: RequestInfo) -> None:
    """A request, and its sub-requests as a timeline."""
    from rich.text import Text

    from microserve.tools.fleet_view import plain_table, print_whole
    from microserve.tools.tui.model import nbytes, seconds, state_text

    head = Text(visible(request.request_id), "bold") + Text(" · ") + state_text(visible(request.state))
    first = "no token yet" if request.first_token is None else f"first token after {seconds(request.first_token)}"
    facts = [
        f"model {request.model}",
        f"strategy {request.strategy}",
        f"{request.prompt_tokens:,} prompt tokens, {request.cached_tokens:,} cached, {request.output_tokens:,} output",
        first,
        f"arrived {seconds(request.age)} ago" if request.ended is None else f"took {seconds(request.ended)}",
    ]
    console.print(head + Text(visible(" · ".join(["", *facts]))), soft_wrap=True)
    if request.error:
        console.print(Text(visible(request.error), "red"), soft_wrap=True)
    if not request.sub_requests:
        console.print("nothing was asked of an engine")
        return
    figures = ("start>", "took>", "matched>", "computed>", "reused>", "moved>")
    table = plain_table("verb", "engine", "range", *figures, "outcome", "")
    whole = max([request.ended or request.age, *(sub.ended or 0.0 for sub in request.sub_requests), 1e-6])
    for sub in request.sub_requests:
        table.add_row(
            visible(sub.verb),
            visible(sub.engine),
            f"[{sub.begin:,}, {sub.end:,})",
            seconds(sub.started),
            "-" if sub.ended is None else seconds(sub.ended - sub.started),
            *(f"{count:,}" if count else "-" for count in (sub.matched, sub.computed, sub.reused)),
            nbytes(sub.bytes) if sub.bytes else "-",
            state_text("running" if sub.ended is None else visible(sub.outcome)),
            _bar(sub.started, sub.ended, whole),
        )
    print_whole(console, table)


def _bar(started: float, ended: float | None, whole: float) -> Text:
    """When that was, on an axis of `whole` seconds."""
    from rich.text import Text

    first = min(_AXIS - 1, int(_AXIS * started / whole))
    last = max(first + 1, min(_AXIS, round(_AXIS * (whole if ended is None else ended) / whole)))
    return Text.assemble(
        ("·" * first, "dim"), ("▓" if ended is None else "█") * (last - first), ("·" * (_AXIS - last), "dim")
    )
