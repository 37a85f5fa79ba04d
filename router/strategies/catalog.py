"""Where strategies come from: built in, from entry points, and from a configured folder of Python files.

A file that cannot be used is a `Problem` with its line; the others load all the same.
"""

from __future__ import annotations

import difflib
import re
import sys
import threading
import traceback
import types
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING

from microserve.router.strategies.balanced import balanced
from microserve.router.strategies.cache_aware import cache_aware
from microserve.router.strategies.context_migration import context_migration
from microserve.router.strategies.data_parallel import data_parallel
from microserve.router.strategies.prefill_decode import prefill_decode
from microserve.router.strategy import Strategy
from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

ENTRY_POINTS = "microserve.strategies"

LOAD_LIMIT = 2.0
"""Seconds that a file may take to define its strategies."""

BUILT_IN: tuple[Strategy, ...] = (data_parallel, cache_aware, prefill_decode, balanced, context_migration)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a source of strategies could not be used. `line` is 0 where it is not known."""

    source: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.message}" if self.line else f"{self.source}: {self.message}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """The strategies that can be chosen, by name, and what was wrong with those that cannot."""

    strategies: Mapping[str, Strategy]
    problems: tuple[Problem, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each comes from: "built in", an entry point, or a file."""

    @classmethod
    def built_in(cls) -> Catalog:
        """What comes with microserve, alone."""
        return load_catalog(None, entry_points=())

    def get(self, name: str) -> Strategy:
        """The strategy `name`. Raises `ConfigError` that says which there are, and what failed to load."""
        found = self.strategies.get(name)
        if found is not None:
            return found
        near = difflib.get_close_matches(name, self.strategies, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        # First: where a file is broken, that is most likely why.
        broken = f" ({'; '.join(map(str, self.problems))})" if self.problems else ""
        raise ConfigError(f"no strategy '{name}'{broken}; {hint}there are: {', '.join(sorted(self.strategies))}")


def load_catalog(
    folder: Path | StrategyFolder | None = None,
    *,
    built_in: Iterable[Strategy] = BUILT_IN,
    entry_points: Iterable[metadata.EntryPoint] | None = None,
) -> Catalog:
    """Everything that can be found now. Later sources replace earlier ones of the same name, which is told as a
    problem of the earlier: folder over entry point over built in, file over file by name. Raises `ConfigError` only
    when `folder` itself cannot be read."""
    strategies = {each.name: each for each in built_in}
    sources = dict.fromkeys(strategies, "built in")
    problems: list[Problem] = []

    def add(found: Strategy, source: str) -> None:
        if found.name in strategies:
            problems.append(Problem(sources[found.name], 0, f"'{found.name}' is replaced by the one of {source}"))
        strategies[found.name], sources[found.name] = found, source

    for point in metadata.entry_points(group=ENTRY_POINTS) if entry_points is None else entry_points:
        found = _from_entry_point(point)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            add(found, f"entry point {point.value}")
    if folder is not None:
        files = folder if isinstance(folder, StrategyFolder) else StrategyFolder(folder)
        for path, loaded in files.load():
            if isinstance(loaded, Problem):
                problems.append(loaded)
            else:
                for each in loaded:
                    add(each, str(path))
    return Catalog(strategies, tuple(problems), sources)


class StrategyFolder:
    """A folder of Python files, each run once for each time that it changes: who looks at the list often must not pay
    for what the files do, nor the requests that run meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: dict[Path, tuple[tuple[int, int, int], list[Strategy] | Problem]] = {}

    def load(self) -> list[tuple[Path, list[Strategy] | Problem]]:
        """What every file defines, or what is wrong with it. Raises `ConfigError` when the folder cannot be read."""
        if not self._path.is_dir():
            raise ConfigError(f"strategy folder {self._path} is not a folder")
        found = {}
        for path in sorted(self._path.glob("*.py")):
            if path.name.startswith("_"):
                continue
            try:
                stat = path.stat()
            except OSError:
                continue  # it has gone since it was listed
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            known = self._loaded.get(path)
            found[path] = known if known is not None and known[0] == stamp else (stamp, load_file(path))
        self._loaded = found
        return [(path, loaded) for path, (_, loaded) in found.items()]


def load_file(path: Path, *, limit: float = LOAD_LIMIT) -> list[Strategy] | Problem:
    """The strategies that a Python file defines (at least one), or what is wrong with it: also that it does not finish
    within `limit` seconds.

    The file is run in a module of its own, so that a changed file can be loaded again beside the old version.
    """
    name = f"microserve_strategy_{path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    raised: list[BaseException] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Problem(str(path), 0, _describe(error))

    def run() -> None:
        try:
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        except BaseException as error:  # a user's file may raise anything; it is reported and the router goes on
            raised.append(error)

    # A thread that nobody has to wait for: a file that never ends is left behind.
    thread = threading.Thread(target=run, name=f"load {path.name}", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return Problem(str(path), _where(thread, str(path)), f"it does not finish within {limit:g} s")
    if raised:
        failure = raised[0]
        said = f"it calls exit({failure.code!r})" if isinstance(failure, SystemExit) else _describe(failure)
        line = _line(failure, str(path))
        # What is wrong with a strategy names its own line already.
        own_line = re.match(rf"{re.escape(str(path))}:(\d+): ", said)
        return Problem(str(path), int(own_line[1]) if own_line else line, said[own_line.end() :] if own_line else said)
    own = [value for value in vars(module).values() if isinstance(value, Strategy) and _defined_in(value, str(path))]
    if not own:
        return Problem(str(path), 0, "it defines no strategy (an async generator function under @strategy)")
    # The whole file is the version's source: a strategy may call helpers that stand beside it.
    return [replace(each, source=text) for each in own]


def _from_entry_point(point: metadata.EntryPoint) -> Strategy | Problem:
    source = f"entry point {point.name} = {point.value}"
    try:
        value = point.load()
    except BaseException as error:  # somebody else's package may raise anything; the router goes on
        return Problem(source, 0, _describe(error))
    if not isinstance(value, Strategy):
        return Problem(source, 0, "it is not a strategy (an async generator function under @strategy)")
    return value


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


def _describe(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return error.message
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    return f"{type(error).__name__}: {error}"
