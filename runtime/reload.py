"""Reads a daemon's configuration again, changes what can change while it runs, and says what cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import Struct
from msgspec.structs import fields, replace

from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

C = TypeVar("C", bound=Struct)

_log = get_logger(__name__)


class Reload(Generic[C]):
    """Call it to reload; `config` is what is in effect.

    `read` gives the configuration as its sources have it now, and raises `ConfigError`. `live` are the settings that
    can change, with what each change does: it is given the configuration that will be in effect, and must not fail.
    `check` is asked before anything changes, and may raise `ConfigError`. `hints` say of other settings what changes
    them instead of a restart. `changed` is given the new configuration once all is done.
    """

    def __init__(
        self,
        config: C,
        read: Callable[[], C],
        live: Mapping[str, Callable[[C], object]],
        *,
        check: Callable[[C], object] = lambda config: None,
        hints: Mapping[str, str] | None = None,
        changed: Callable[[C], object] = lambda config: None,
    ) -> None:
        self.config = config
        self._read = read
        self._live = live
        self._check = check
        self._hints = hints if hints is not None else {}
        self._changed = changed

    def __call__(self) -> None:
        """Raises `ConfigError`, and has changed nothing then."""
        wanted = self._read()
        changes = [
            (field.name, before, after)
            for field in fields(type(wanted))
            if (before := getattr(self.config, field.name)) != (after := getattr(wanted, field.name))
        ]
        applied = {name: after for name, _, after in changes if name in self._live}
        config = replace(self.config, **applied)
        self._check(config)
        for name in applied:
            self._live[name](config)
        self.config = config
        for name, before, after in changes:
            for key, was, now in _differences(name, before, after):
                if name in applied:
                    _log.info("setting changed: applied", setting=key, was=was, now=now)
                else:
                    hint = self._hints.get(name, "it needs a restart")
                    _log.warning("setting changed: not applied", setting=key, was=was, now=now, hint=hint)
        _log.info("configuration reloaded", applied=len(applied), not_applied=len(changes) - len(applied))
        # The last: it may be that less is logged from here on.
        self._changed(config)


def _differences(key: str, before: Any, after: Any) -> Iterator[tuple[str, str, str]]:
    """What changed of a setting, key by key of a table, as text."""
    if not isinstance(before, Struct):
        yield key, _text(before), _text(after)
        return
    for name in before.__struct_fields__:
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            yield from _differences(f"{key}.{name}", was, now)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ",".join(f"{key}={each}" for key, each in value.items()) or "{}"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
