"""Looks at what a configuration names before a daemon does: what is wrong, and what this user may not see."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from microserve.runtime.errors import ConfigError
from microserve.runtime.keys import load_security
from microserve.runtime.settings import section_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.settings import EngineConfig, RouterConfig


class Seen(Struct):
    """What was found. The daemon would not start for an error; a warning does not say so."""

    errors: list[str] = []
    warnings: list[str] = []

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around one look: what it raises is noted, and the next look follows. That we may not read a file says nothing
        of the daemon, which is often another user."""
        try:
            yield
        except ConfigError as error:
            if isinstance(error.__cause__, PermissionError):
                self.warnings.append(f"{error.message}; what it says was not looked at")
            else:
                self.errors.append(error.message)


def look_at_key(config: EngineConfig | RouterConfig, seen: Seen) -> None:
    """The key file: whether it can be used, and whether the daemon may be called what it is to be called."""
    kind = section_of(type(config))
    with seen.told():
        security = load_security(config.key_file)
        if security is not None:
            name: str | None = getattr(config, f"{kind}_id")
            security.check_name(kind, name or security.identity.name)
