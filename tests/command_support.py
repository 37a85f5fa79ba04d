"""The command line, run within the test or in a process of its own; a fleet for it that several tests share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.cluster import daemon_environ

from microserve.tools import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

PROGRAM = (sys.executable, "-P", "-m", "microserve.tools")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.code, self.err) == (0, ""), self
        return json.loads(self.out)


def command(cluster: Cluster | str, name: str, *arguments: str) -> Ended:
    """Runs a command here, as through a pipe, against a cluster's router (or the one at an endpoint)."""
    router = cluster if isinstance(cluster, str) else cluster.router
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([name, *arguments, "--router", router])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def usage_error(cluster: Cluster | str, name: str, *arguments: str) -> str:
    """What a command says of its wrong usage, without the usage itself."""
    ended = command(cluster, name, *arguments)
    assert (ended.code, ended.out) == (2, ""), ended
    return ended.err.splitlines()[-1].partition(": error: ")[2]


class Terminal:
    """A command in a process of its own, on a terminal of its own. A context manager: leaving it waits for the end."""

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environ = daemon_environ() | {"TERM": "xterm", "MICROSERVE_ROUTER": cluster.router}
        self._process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True,
            # Ctrl-C reaches whoever has the terminal as its own.
            preexec_fn=lambda: _take_terminal(theirs),
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self._read = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is not None:
            self._process.kill()
        self._process.wait(60)
        os.close(self._ours)

    def until(self, text: str) -> None:
        """Reads until `text` has been shown, after what was waited for before."""
        pieces = self._pieces()
        while (at := self.shown.find(text, self._read)) < 0:
            piece = next(pieces, None)
            if piece is None:
                raise AssertionError(f"{text!r} was not shown: {self.shown!r}")
            self.shown += piece
        self._read = at + len(text)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """Its exit code, once it has ended; `shown` is everything then."""
        for piece in self._pieces():
            self.shown += piece
        return self._process.wait(60)

    def _pieces(self) -> Iterator[str]:
        while True:
            try:
                piece = os.read(self._ours, 4096)
            except OSError:
                # The other end is closed.
                return
            if not piece:
                return
            yield piece.decode(errors="replace")


def _take_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
