"""Runs one strategy file: what it defines, or what is wrong with it and where."""

from __future__ import annotations

import re
import sys
import threading
import traceback
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from microserve.router.strategy import Strategy
from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

LOAD_LIMIT = 2.0
"""Seconds that a file may take to define its strategies."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a source of strategies could not be used. `line` is 0 where it is not known."""

    source: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.message}" if self.line else f"{self.source}: {self.message}"


def load_file(path: Path, text: str, *, limit: float = LOAD_LIMIT) -> list[Strategy] | Problem:
    """As `run_file`, in a thread of its own and for at most `limit` seconds.

    A file that does not end leaves its thread behind, which is why every file is tried in a process of its own first
    (see `trial`).
    """
    found: list[list[Strategy] | Problem] = []
    thread = threading.Thread(target=lambda: found.append(run_file(path, text)), name=f"load {path.name}", daemon=True)
    thread.start()
    thread.join(limit)
    return found[0] if found else endless(path, limit, _where(thread, str(path)))


def run_file(path: Path, text: str) -> list[Strategy] | Problem:
    """The strategies that a Python file of this text defines (at least one), or what is wrong with it.

    It is run in a module of its own, so that a changed file can be loaded again beside the old version.
    """
    module = types.ModuleType(f"microserve_strategy_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException as failure:  # a user's file may raise anything; it is reported and the router goes on
        said = f"it calls exit({failure.code!r})" if isinstance(failure, SystemExit) else described(failure)
        line = _line(failure, str(path))
        # What is wrong with a strategy names its own line already.
        own_line = re.match(rf"{re.escape(str(path))}:(\d+): ", said)
        return Problem(str(path), int(own_line[1]) if own_line else line, said[own_line.end() :] if own_line else said)
    own = [value for value in vars(module).values() if isinstance(value, Strategy) and _defined_in(value, str(path))]
    if not own:
        return Problem(str(path), 0, "it defines no strategy (an async generator function under @strategy)")
    # The whole file is the version's source: a strategy may call helpers that stand beside it.
    return [replace(each, source=text) for each in own]


def endless(path: Path, limit: float, line: int) -> Problem:
    """A file that still ran after `limit` seconds, at `line`."""
    return Problem(str(path), line, f"it does not finish within {limit:g} s")


def described(error: BaseException) -> str:
    """What went wrong, in a line."""
    if isinstance(error, ConfigError):
        return error.message
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    return f"{type(error).__name__}: {error}"


def _defined_in(value: Strategy, path: str) -> bool:
    code = getattr(value.function, "__code__", None)
    return code is not None and code.co_filename == path


def _where(thread: threading.Thread, path: str) -> int:
    """The line of the file at which a thread is."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_filename != path:
        frame = frame.f_back
    return frame.f_lineno if frame is not None else 0


def _line(error: BaseException, path: str) -> int:
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 0
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return (frames[-1].lineno or 0) if frames else 0
