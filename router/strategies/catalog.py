"""Where strategies come from: built in, from entry points, and from a configured folder of Python files.

A file that cannot be used is a `Problem` with its line; the others load all the same.
"""

from __future__ import annotations

import asyncio
import difflib
import math
import stat
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Self

from microserve.router.strategies.balanced import balanced
from microserve.router.strategies.cache_aware import cache_aware
from microserve.router.strategies.context_migration import context_migration
from microserve.router.strategies.data_parallel import data_parallel
from microserve.router.strategies.files import LOAD_LIMIT, Problem, described, load_file
from microserve.router.strategies.prefill_decode import prefill_decode
from microserve.router.strategies.trial import NoTrial, try_files
from microserve.router.strategy import Strategy
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import ConfigError
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from microserve.runtime.clock import Clock

ENTRY_POINTS = "microserve.strategies"

LOOK_LIMIT = 5.0
"""Seconds that the files of a folder may take together in the router, when somebody waits for the list."""

BUILT_IN: tuple[Strategy, ...] = (data_parallel, cache_aware, prefill_decode, balanced, context_migration)

_log = get_logger(__name__)


_Stamp = tuple[int, int, int]
"""Of a file: when it was written, its size, its inode."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """The strategies that can be chosen, by name, and what was wrong with those that cannot.

    It can stand where `Sources` are expected: those of what never changes.
    """

    strategies: Mapping[str, Strategy]
    problems: tuple[Problem, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each comes from: "built in", an entry point, or a file."""

    @classmethod
    def built_in(cls) -> Catalog:
        """What comes with microserve, alone."""
        return load_catalog(None, entry_points=())

    def load(self) -> Self:
        """As `Sources.load`."""
        return self

    async def read(self) -> Self:
        """As `Sources.read`."""
        return self

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
    patience: float = math.inf,
) -> Catalog:
    """Everything that can be found now. Later sources replace earlier ones of the same name, which is told as a
    problem of the earlier: folder over entry point over built in, file over file by name. `patience` is as
    `StrategyFolder.load` has it. Raises `ConfigError` only when `folder` itself cannot be read."""
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
        for path, loaded in files.load(patience):
            if isinstance(loaded, Problem):
                problems.append(loaded)
            else:
                for each in loaded:
                    add(each, str(path))
    return Catalog(strategies, tuple(problems), sources)


class Sources:
    """Where a router finds strategies: what is built in, entry points, and a folder or none."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        built_in: Iterable[Strategy] = BUILT_IN,
        entry_points: Iterable[metadata.EntryPoint] | None = None,
    ) -> None:
        self._folder = None if folder is None else StrategyFolder(folder)
        self._built_in = tuple(built_in)
        self._entry_points = None if entry_points is None else tuple(entry_points)
        self._reading: asyncio.Future[Catalog] | None = None

    def load(self) -> Catalog:
        """What can be found now, however long it takes: not on an event loop that serves. Raises `ConfigError`."""
        return self._load(math.inf)

    async def read(self) -> Catalog:
        """What can be found now, read in a thread, by one at a time. Raises `ConfigError`."""
        while self._reading is not None:
            # It may have looked at a file before the change that this one is about.
            await asyncio.wait([self._reading])
        reading = asyncio.get_running_loop().run_in_executor(None, self._load, LOOK_LIMIT)
        self._reading = reading
        reading.add_done_callback(self._was_read)
        # Whoever asked may leave; the next one must wait for this thread all the same.
        return await asyncio.shield(reading)

    def _was_read(self, _reading: asyncio.Future[Catalog]) -> None:
        self._reading = None

    def _load(self, patience: float) -> Catalog:
        return load_catalog(self._folder, built_in=self._built_in, entry_points=self._entry_points, patience=patience)


class StrategyFolder:
    """A folder of Python files, each read once for each time that it changes: who looks at the list often must not pay
    for what the files do, nor the requests that run meanwhile. By one thread at a time."""

    def __init__(self, path: Path, *, limit: float = LOAD_LIMIT, clock: Clock = monotonic) -> None:
        """`limit`: seconds for each file."""
        self._path = path
        self._limit = limit
        self._clock = clock
        self._loaded: dict[Path, tuple[_Stamp, list[Strategy] | Problem]] = {}

    def load(self, patience: float = math.inf) -> list[tuple[Path, list[Strategy] | Problem]]:
        """What every file defines, or what is wrong with it. Raises `ConfigError` when the folder cannot be read.

        A file that has changed is tried in a process of its own, together with the others that have. Only if it ends
        well there, it is run here. Once that has taken `patience` seconds, the rest is left for the next time.
        """
        stamps = self._stamps()
        found = {
            path: known for path, stamp in stamps.items() if (known := self._loaded.get(path)) and known[0] == stamp
        }
        texts: dict[Path, str] = {}
        for path in stamps.keys() - found.keys():
            try:
                texts[path] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                found[path] = stamps[path], Problem(str(path), 0, described(error))
        self._loaded = found
        late = self._run(texts, stamps, patience)
        return [(path, late[path] if path in late else self._loaded[path][1]) for path in stamps]

    def _stamps(self) -> dict[Path, _Stamp]:
        """The files, by name, and what tells whether they are as they were."""
        if not self._path.is_dir():
            raise ConfigError(f"strategy folder {self._path} is not a folder")
        found = {}
        for path in sorted(self._path.glob("*.py")):
            if path.name.startswith("_"):
                continue
            try:
                seen = path.stat()
            except OSError:
                continue  # it has gone since it was listed
            if stat.S_ISREG(seen.st_mode):  # reading a pipe would wait for ever
                found[path] = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        return found

    def _run(self, texts: Mapping[Path, str], stamps: Mapping[Path, _Stamp], patience: float) -> dict[Path, Problem]:
        """Loads files; the problems of those for which there was no time."""
        files = sorted(texts.items())
        tried: list[Problem | None]
        try:
            tried = try_files(files, limit=self._limit)
        except NoTrial as error:
            _log.warning("strategy files are run without having been tried in a process of their own", error=error)
            tried = [None] * len(files)
        ends, late = self._clock() + patience, {}
        for (path, text), problem in zip(files, tried, strict=True):
            if problem is None and self._clock() >= ends:
                late[path] = Problem(str(path), 0, f"not read yet: others took {patience:g} s; look again")
            else:
                loaded = problem if problem is not None else load_file(path, text, limit=self._limit)
                self._loaded[path] = stamps[path], loaded
        return late


def _from_entry_point(point: metadata.EntryPoint) -> Strategy | Problem:
    source = f"entry point {point.name} = {point.value}"
    try:
        value = point.load()
    except BaseException as error:  # somebody else's package may raise anything; the router goes on
        return Problem(source, 0, described(error))
    if not isinstance(value, Strategy):
        return Problem(source, 0, "it is not a strategy (an async generator function under @strategy)")
    return value
