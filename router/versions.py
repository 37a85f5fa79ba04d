"""Which program serves which request: versions by model and by share of traffic, their history, and the way back.

Requests in flight keep the program that they began with; a change is about the next request. Every change can be rolled
back. With a folder, what serves is kept across restarts.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from microserve.runtime.errors import ConfigError, InvalidRequest, ModelNotFound, NotFound
from microserve.runtime.log import get_logger
from microserve.runtime.messages import (
    ActiveStrategy,
    SettingInfo,
    Strategies,
    StrategyChange,
    StrategyInfo,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from microserve.router.strategies.catalog import Catalog, Sources
    from microserve.router.strategy import Program, Strategy

EVERY = ""
"""The model name that stands for every model without versions of its own."""

LEAST_SHARE = 1e-6
"""Less of the traffic serves nobody, and tells nothing about a version."""

_HISTORY = 100
_MOST_MODELS = 256
"""Models with strategies of their own: each is a label of metrics."""
_STORE_FORMAT = 2

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Lane:
    """A version and the share of a model's traffic that it serves."""

    program: Program
    share: float
    since: float
    """Unix time, seconds."""


Lanes = tuple[Lane, ...]
"""Of one model; the shares add up to 1. The last one is the newcomer, if there are two."""


class Step(msgspec.Struct, frozen=True):
    """What served a model before a change that was not rolled back."""

    number: int
    """Of the change."""
    model: str
    before: list[ActiveStrategy] | None
    """None: it had no versions of its own."""


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept across restarts. Format 1 had nothing but what serves."""

    format: int
    active: list[ActiveStrategy]
    steps: list[Step] = []
    history: list[StrategyChange] = []
    """The newest first."""


class Versions:
    """What serves, per model. `sources` are read again whenever somebody looks at them or chooses from them.

    Used on the event loop, which never waits for them; it is made wherever waiting does no harm.
    """

    def __init__(
        self,
        configured: Program,
        sources: Sources | Catalog,
        *,
        store: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`configured` serves until something else is set, or was set before the last restart and is in `store`."""
        self._sources = sources
        self._store = store
        self._now = now
        self._lanes: dict[str, Lanes] = {EVERY: (Lane(configured, 1.0, now()),)}
        self._steps: list[Step] = []
        """In the order of the changes."""
        self._before: dict[int, Lanes | None] = {}
        """What the steps go back to, by number. One that cannot be gone back to after a restart has none."""
        self.changed: Callable[[str], None] = lambda told: None
        """Told of every change, in words."""
        self.models: Callable[[], Collection[str]] = tuple
        """The models that there are, as far as is known: none of another name gets versions of its own."""
        self._history: deque[StrategyChange] = deque(maxlen=_HISTORY)
        self._number = 0
        stored = _read_store(store) if store is not None and store.exists() else None
        if stored is None or not stored.history:
            self._record(EVERY, "configured", quiet=True)
        if stored is not None:
            self._restore(stored)

    async def read(self) -> Catalog:
        """The sources of strategies as they are now. Raises `ConfigError` when they cannot be read at all."""
        return await self._sources.read()

    def read_from(self, sources: Sources) -> None:
        """Sources of strategies are elsewhere from now on. What serves is not touched."""
        self._sources = sources

    # --- serving -----------------------------------------------------------------------------------------------------

    def choose(self, model: str, request_id: str) -> Program:
        """The program for a request. The same request id goes the same way on every router that is set alike."""
        lanes = self._lanes.get(model) or self._lanes[EVERY]
        if len(lanes) == 1:
            return lanes[0].program
        place = zlib.crc32(request_id.encode()) / 2**32
        newcomer = lanes[-1]
        return newcomer.program if place < newcomer.share else lanes[0].program

    @property
    def default(self) -> Program:
        """What serves most of the requests for models without versions of their own."""
        return max(self._lanes[EVERY], key=lambda lane: lane.share).program

    @property
    def summary(self) -> str:
        """What serves models without versions of their own, in a line: one version, or two with their shares."""
        lanes = self._lanes[EVERY]
        if len(lanes) == 1:
            return lanes[0].program.version
        return ", ".join(f"{lane.program.version} {lane.share:.0%}" for lane in lanes)

    def serving(self) -> list[ActiveStrategy]:
        """Every version that serves, and its share."""
        return [entry for model, lanes in self._lanes.items() for entry in _shown(model, lanes)]

    def active_versions(self) -> set[str]:
        """Every version that may be given to a request now."""
        return {lane.program.version for lanes in self._lanes.values() for lane in lanes}

    # --- changing ----------------------------------------------------------------------------------------------------

    async def set(
        self,
        name: str,
        settings: Mapping[str, object],
        *,
        model: str = EVERY,
        share: float = 1.0,
        dry_run: bool = False,
        by: str = "",
    ) -> list[ActiveStrategy]:
        """Serves `share` of a model's next requests by strategy `name`; what would serve, or does now. `by`: who asks.

        With a `share` below 1, the rest stays with what serves most of them now. Sources are read again. Raises and
        changes nothing: `InvalidRequest` (no such strategy, a setting that is wrong, a source that is broken), or
        `ModelNotFound`.
        """
        try:
            strategy = (await self.read()).get(name)
        except ConfigError as error:
            raise InvalidRequest(error.message, param="name") from error
        # Nothing is awaited from here on: what is checked is what is changed.
        self._check(model, share)
        lane = Lane(strategy.configure(settings), share, self._now())
        lanes = (lane,) if share == 1.0 else self._beside(lane, model)
        if not dry_run:
            part = f" for {share:.0%}" if share < 1.0 else ""
            self._change(model, lanes, f"set {lane.program.version}{part}{_by(by)}")
        return _shown(model, lanes)

    def _check(self, model: str, share: float) -> None:
        if not LEAST_SHARE <= share <= 1.0:
            raise InvalidRequest(
                f"share lies between {LEAST_SHARE:g} (one in a million) and 1, not {share}", param="share"
            )
        if model == "*" or not model.isprintable():
            # Operators see "*" for every model, and lines as lines.
            raise InvalidRequest(f"{model!r} is no name of a model; leave it out for every model", param="model")
        if model not in self._lanes and (there := self.models()) and model not in there:
            raise ModelNotFound(
                f"no engine serves model '{model}'; there is: {', '.join(sorted(there))}", param="model"
            )
        if model not in self._lanes and len(self._lanes) >= _MOST_MODELS:
            raise InvalidRequest(f"{_MOST_MODELS} models have strategies of their own already", param="model")

    def _beside(self, lane: Lane, model: str) -> Lanes:
        """What serves most of a model's traffic now, which keeps the rest of it, and the newcomer."""
        present = self._lanes.get(model) or self._lanes[EVERY]
        base = max(present, key=lambda each: each.share)
        version = lane.program.version
        if base.program.version == version:
            raise InvalidRequest(
                f"{version} serves most of the traffic already: a share is for another one", param="share"
            )
        return (Lane(base.program, 1.0 - lane.share, base.since), lane)

    def roll_back(self, *, model: str = EVERY, number: int | None = None, by: str = "") -> list[ActiveStrategy]:
        """Back to what served `model` before its last change, or before change `number`. Raises `NotFound`. `by`: who
        asks."""
        own = [step for step in self._steps if step.model == model]
        if number is not None:
            own = [step for step in own if step.number >= number]
            if not own or own[0].number != number:
                raise NotFound(
                    f"change {number} is none of {_named(model)}, or was rolled back already", param="number"
                )
        elif own:
            own = own[-1:]
        else:
            raise NotFound(f"there is no earlier state of {_named(model)} to go back to", param="model")
        back = own[0]
        if back.number not in self._before:
            was = ", ".join(each.version for each in back.before or ())
            raise NotFound(
                f"change {back.number} cannot be rolled back: {was} served before it, and could not be restored when "
                "this router started; its log says why. An earlier change can be given by its number",
                param="number",
            )
        lanes = self._before[back.number]
        for step in own:
            self._forget(step)
        if lanes is None:
            self._lanes.pop(model, None)  # it may not have been restored
        else:
            self._lanes[model] = lanes
        self._record(model, f"rolled back change {back.number}{_by(by)}")
        self._save()
        # A model that has no versions of its own any more follows the default, and is shown so.
        return _shown(model if model in self._lanes else EVERY, self._lanes.get(model) or self._lanes[EVERY])

    def _change(self, model: str, lanes: Lanes, reason: str) -> None:
        before = self._lanes.get(model)
        self._lanes[model] = lanes
        self._record(model, reason)
        self._steps.append(Step(self._number, model, None if before is None else _shown(model, before)))
        self._before[self._number] = before
        for step in self._steps[:-_HISTORY]:
            self._forget(step)
        self._save()

    def _forget(self, step: Step) -> None:
        self._steps.remove(step)
        self._before.pop(step.number, None)

    def _record(self, model: str, reason: str, *, quiet: bool = False) -> None:
        self._number += 1
        active = _shown(model, self._lanes.get(model) or self._lanes[EVERY])
        change = StrategyChange(number=self._number, at=self._now(), model=model, active=active, reason=reason)
        self._history.appendleft(change)
        if quiet:
            return
        versions = ", ".join(f"{each.version} ({each.share:.0%})" for each in active)
        _log.info("strategy", model=model or "*", serves=versions, reason=reason, change=self._number)
        self.changed(f"{model or 'every model'}: {reason}; serves {versions}")

    # --- looking at it -----------------------------------------------------------------------------------------------

    async def show(self) -> Strategies:
        """What can be chosen, what serves, what was. Sources are read again."""
        catalog = await self.read()
        known = {name: (each, catalog.sources.get(name, "")) for name, each in catalog.strategies.items()}
        for lanes in self._lanes.values():
            for lane in lanes:
                # It serves as it was read: its file has gone since, or is broken.
                known.setdefault(
                    lane.program.strategy.name,
                    (lane.program.strategy, "as it was read; its source is gone or broken"),
                )
        return Strategies(
            strategies=[_described(each, source) for each, source in known.values()],
            active=self.serving(),
            problems=[str(problem) for problem in catalog.problems],
            history=list(self._history),
        )

    # --- across restarts ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self._store is None:
            return
        stored = _Stored(_STORE_FORMAT, self.serving(), self._steps, list(self._history))
        data = msgspec.json.format(msgspec.json.encode(stored), indent=2)
        temporary = self._store.with_name(f".{self._store.name}.{os.getpid()}")
        try:
            self._store.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(self._store)
        except OSError as error:
            _log.error("strategy versions cannot be kept", file=str(self._store), error=error.strerror)

    def _restore(self, stored: _Stored) -> None:
        """Whatever of it cannot be restored, the router starts, and it is told."""
        catalog = self._sources.load()
        self._history.extend(stored.history[:_HISTORY])
        self._number = max([self._number, *(change.number for change in stored.history)])
        self._steps = stored.steps[-_HISTORY:]
        for step in self._steps:
            try:
                self._before[step.number] = None if step.before is None else _revived(step.before, catalog)
            except _Gone as error:
                _log.warning("a change cannot be rolled back any more", change=step.number, why=error)
        served: dict[str, list[ActiveStrategy]] = {}
        for entry in stored.active:
            served.setdefault(entry.model, []).append(entry)
        for model, entries in served.items():
            reason = "restored"
            try:
                self._lanes[model] = _revived(entries, catalog, changed=True)
            except _Gone as error:
                _log.error("a strategy cannot be restored", model=model or "*", why=error)
                reason = "could not be restored"
            if not self._is_told(model):
                self._record(model, reason)
        _log.info("strategies restored", models=len(self._lanes), changes_that_can_be_rolled_back=len(self._before))

    def _is_told(self, model: str) -> bool:
        """Whether the history's last entry for a model says what serves: a restart that changes nothing adds none."""
        last = next((change.active for change in self._history if change.model == model), None)
        now = _shown(model, self._lanes.get(model) or self._lanes[EVERY])
        return last is not None and [(each.version, each.share) for each in last] == [
            (each.version, each.share) for each in now
        ]


class _Gone(Exception):
    """What served once can be had no more."""


def _revived(entries: list[ActiveStrategy], catalog: Catalog, *, changed: bool = False) -> Lanes:
    """The lanes that were kept as `entries`. `changed`: with programs that have changed since, if need be.

    Raises `_Gone`.
    """
    lanes = []
    for entry in entries:
        try:
            program = catalog.get(entry.name).configure(entry.settings)
        except (ConfigError, InvalidRequest) as error:
            raise _Gone(f"{entry.version}: {error.message}") from error
        if program.version != entry.version:
            if not changed:
                raise _Gone(f"{entry.version} has changed since, and is {program.version} now")
            _log.warning("a strategy has changed since", was=entry.version, serves=program.version)
        lanes.append(Lane(program, entry.share, entry.since))
    if abs(sum(lane.share for lane in lanes) - 1.0) > 1e-6:
        raise _Gone(f"shares that do not add up: {', '.join(f'{each.version} {each.share:g}' for each in entries)}")
    return tuple(lanes)


def _read_store(store: Path) -> _Stored | None:
    """What was kept; None, which is told, where it makes no sense."""
    try:
        stored = msgspec.json.decode(store.read_bytes(), type=_Stored)
    except (OSError, msgspec.DecodeError) as error:
        _log.error("strategy versions cannot be restored", file=str(store), error=error)
        return None
    if stored.format not in (1, _STORE_FORMAT):
        _log.error("strategy versions are of another format", file=str(store), format=stored.format)
        return None
    return stored


def _shown(model: str, lanes: Lanes) -> list[ActiveStrategy]:
    return [
        ActiveStrategy(
            model=model,
            version=lane.program.version,
            name=lane.program.strategy.name,
            settings=dict(lane.program.settings),
            share=lane.share,
            since=lane.since,
        )
        for lane in lanes
    ]


def _described(strategy: Strategy, source: str) -> StrategyInfo:
    settings = [
        SettingInfo(name=each.name, type=each.type.__name__, default=each.default, bounds=str(each.bounds or ""))
        for each in strategy.settings
    ]
    return StrategyInfo(name=strategy.name, summary=strategy.summary, source=source, settings=settings)


def _by(who: str) -> str:
    return f", by {who}" if who else ""


def _named(model: str) -> str:
    return f"model {model!r}" if model else "the default"
