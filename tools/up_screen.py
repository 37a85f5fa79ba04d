"""What `microserve up` shows: one screen that follows the fleet on a terminal, plain lines anywhere else."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.tools.common import DEFAULT_ROUTER
from microserve.tools.supervisor import ChildState, describe_exit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.console import RenderableType
    from rich.live import Live

    from microserve.runtime.messages import StatusReply
    from microserve.tools.supervisor import Child

_SHOWN_LINES = 8
_LOG_LINE = re.compile(r"(?<=\| )\d{4}-\d\d-\d\dT(?P<time>\d\d:\d\d:\d\d)\S* (?P<level>\w+) +\w+:\S+@\w+ ")
"""What a daemon's line begins with: on the screen, its name stands before it already, and eighty columns are few."""


class Screen:
    """Both ways to show a run; `on` chooses. A context manager: leaving it gives the terminal back."""

    def __init__(self, engines: Sequence[str], router: str, *, on: bool) -> None:
        self._on = on
        self._router = router
        self._live: Live | None = None
        self._width = max(map(len, ["router", *engines]))
        self._recent: deque[str] = deque(maxlen=_SHOWN_LINES)
        self._status: StatusReply | None = None
        self._children: Sequence[Child] = ()
        self._phase = "starting"
        self._stopping = False

    def __enter__(self) -> Screen:
        if self._on:
            from rich.live import Live

            self._live = Live(self._render(), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back. Idempotent; later lines are printed."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def child_line(self, name: str, line: str) -> None:
        """A line that a child printed."""
        self._put(f"{name:{self._width}} | {line}")

    def line(self, line: str) -> None:
        """Something that we have to say."""
        self._put(f"{'up':{self._width}} | {line}")

    def announce(self, status: StatusReply) -> None:
        """Everything is ready: how to use it, above the screen, where it can be copied."""
        for line in usage_lines(status, self._router, command_name(sys.argv[0])):
            if self._live is None:
                print(line, flush=True)
            else:
                self._live.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def show(self, status: StatusReply | None, children: Sequence[Child], phase: str) -> None:
        """The state of things, every half second."""
        self._status, self._children, self._phase = status, children, phase
        if self._live is not None:
            self._live.update(self._render())

    def stopping(self) -> None:
        """Ctrl-C was heard."""
        self._stopping = True
        if self._live is not None:
            self._live.update(self._render())

    def _put(self, line: str) -> None:
        self._recent.append(_LOG_LINE.sub(r"\g<time> \g<level> ", line, count=1))
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.update(self._render())

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        from microserve.tools.fleet_view import FleetTable, headline

        parts: list[RenderableType] = []
        if self._status is not None:
            parts += [Text(headline(self._status)), Text(), FleetTable(self._status), Text()]
        parts += [Text(line, style="red") for line in troubles(self._children)]
        phase = "stopping: running requests finish" if self._stopping else self._phase
        parts.append(Text(phase, style="green" if phase == "ready" else "yellow"))
        parts += [Text(), *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._recent)]
        subtitle = "Ctrl-C again ends them now" if self._stopping else "Ctrl-C stops"
        return Panel(Group(*parts), title="microserve", subtitle=subtitle, border_style="dim")


def troubles(children: Sequence[Child]) -> list[str]:
    """What is wrong with children now, a line each."""
    return [
        f"{child.name} ended ({describe_exit(child.exit_code or 0)}) and is started again; restarts: {child.restarts}"
        for child in children
        if child.state is ChildState.WAITING and child.exit_code is not None
    ]


def usage_lines(status: StatusReply, router: str, command: str = "microserve") -> list[str]:
    """How to send a first request, ready to be copied. `command`: how our own command is called here."""
    model = status.engines[0].info.model.name if status.engines else "MODEL"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return [
        f"serving {model} at {status.http}/v1",
        f"try: curl {status.http}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        f"or:  {command} chat" + ("" if router == DEFAULT_ROUTER else f" --router {router}"),
    ]


def command_name(called: str) -> str:
    """How to call `microserve` again, where it was `called` so: its path, where the name alone would not be found."""
    return "microserve" if shutil.which("microserve") or Path(called).name != "microserve" else shlex.quote(called)
