"""`microserve drain ENGINE...`: engines finish what they have and take nothing new; with `--wait`, until it is done."""

from __future__ import annotations

import argparse
import asyncio
import functools
import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from microserve.runtime.errors import Conflict
from microserve.tools.common import (
    CommandFailed,
    add_operator_options,
    command_parser,
    confirm,
    counted,
    print_json,
    visible,
    with_router,
)
from microserve.tools.engines import named_engines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress, TaskID

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import StatusReply

_EVERY = 0.25
"""Seconds between looks at what is left."""


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 1 also when engines are not done in time."""
    parser = command_parser("drain", "Let engines finish what they have, and take nothing new. `resume` undoes it.")
    parser.add_argument("engines", nargs="+", metavar="ENGINE", help="their ids")
    parser.add_argument(
        "--wait",
        nargs="?",
        type=_seconds,
        const=math.inf,
        default=None,
        metavar="SECONDS",
        help="until nothing is left (after the engines; without SECONDS: however long it takes)",
    )
    parser.add_argument("--yes", action="store_true", help="without asking")
    add_operator_options(parser)
    options = parser.parse_args(argv)
    names = list(dict.fromkeys(options.engines))
    try:
        status = with_router("drain", options, functools.partial(_checked, names=names))
        confirm(parser, question(status, names), yes=options.yes)
        with Shown(on=options.wait is not None and not options.json) as shown:
            left = with_router("drain", options, lambda client: drain(client, names, options.wait, shown))
    except CommandFailed as failed:
        return failed.code
    if options.json:
        print_json([asdict(each) | {"drained": each.drained} for each in left])
    else:
        for each in left:
            # What is late has been shown, and is an error below.
            if options.wait is None or each.drained:
                print(f"{visible(each.engine)}: {each.words()}")
    late = [f"{each.engine} ({each.what()})" for each in left if not each.drained]
    if options.wait is None or not late:
        return 0
    print(f"microserve drain: not done within {options.wait:g} s: {visible(', '.join(late))}", file=sys.stderr)
    return 1


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (engines are named before --wait)")
    return seconds


async def _checked(client: AsyncClient, names: list[str]) -> StatusReply:
    status = await client.status()
    named_engines(status, names)
    return status


def question(status: StatusReply, names: Sequence[str]) -> str:
    """What is asked before; it says when nobody would be left to serve a model."""
    chosen = named_engines(status, names)
    left = {each.info.model.name for each in status.engines if each.state == "ready" and each not in chosen}
    orphaned = sorted({each.info.model.name for each in chosen} - left)
    running = sum(each.charged for each in chosen)
    asked = f"Drain {', '.join(names)}? What runs there ({counted(running, 'request')}) is finished."
    if orphaned:
        asked += f" Nobody would be left to serve {', '.join(orphaned)}."
    return visible(asked)


@dataclass(frozen=True, slots=True)
class Left:
    """What an engine still has to do."""

    engine: str
    state: str
    requests: int
    leases: int
    """Open ones: KV is on its way, or somebody means to send some."""

    @property
    def drained(self) -> bool:
        return self.state == "draining" and not self.requests and not self.leases

    def what(self) -> str:
        leases = f" and {counted(self.leases, 'lease')}" if self.leases else ""
        return f"{counted(self.requests, 'request')}{leases}"

    def words(self) -> str:
        return "drained" if self.drained else f"{self.state}, {self.what()} left"


async def drain(client: AsyncClient, names: Sequence[str], limit: float | None, shown: Shown) -> list[Left]:
    """Drains engines; with a `limit` in seconds, returns when nothing is left or that time is over.

    Raises `Conflict` when somebody resumes one of them meanwhile.
    """
    await asyncio.gather(*(client.engine(name).drain() for name in names))
    left = await look(client, names)
    if limit is None:
        return left
    try:
        async with asyncio.timeout(limit):
            while True:
                shown(left)
                for each in left:
                    if each.state != "draining":
                        raise Conflict(f"somebody resumed {each.engine}: it is {each.state}")
                if all(each.drained for each in left):
                    return left
                await asyncio.sleep(_EVERY)
                left = await look(client, names)
    except TimeoutError:
        return left


async def look(client: AsyncClient, names: Sequence[str]) -> list[Left]:
    """What is left on engines, as they say themselves, and as the router has it."""
    charged = {each.info.engine_id: each.charged for each in (await client.status()).engines}

    async def one(name: str) -> Left:
        engine = client.engine(name)
        state = (await engine.info()).load.state
        values = (await engine.stats()).values
        # Live ones include sends, whose pages others read; prepared receives become leases when there is room.
        live = int(values.get("scheduler_live", 0))
        leases = int(values.get("lease_open", 0) + values.get("lease_preparing", 0))
        return Left(name, state, max(live, charged.get(name, 0)), leases)

    return list(await asyncio.gather(*map(one, names)))


class Shown:
    """How far engines are, while somebody waits: bars on a terminal, lines otherwise. A context manager."""

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._said: dict[str, Left] = {}
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Shown:
        if self._on and sys.stdout.isatty():
            # Imported here: lines need no bars.
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, transient=True)
            self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, left: Sequence[Left]) -> None:
        """What is left now."""
        for each in left:
            before = self._said.get(each.engine)
            if not self._on or each == before:
                continue
            self._said[each.engine] = each
            text = f"{visible(each.engine)}: {each.words()}"
            if self._progress is not None:
                self._move(self._progress, each, text)
            elif not each.drained:
                # That it is drained is said at the end.
                print(text, flush=True)

    def _move(self, progress: Progress, left: Left, text: str) -> None:
        count = left.requests + left.leases
        if left.engine not in self._bars:
            self._bars[left.engine] = progress.add_task(text, total=max(1, count))
        bar = self._bars[left.engine]
        total = max(progress.tasks[progress.task_ids.index(bar)].total or 1, count)
        progress.update(bar, description=text, total=total, completed=total - count)
