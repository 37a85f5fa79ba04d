"""What is wrong with an argument, named by its field as a caller writes it: `sampling.max_tokens`, `stop[0]`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from microserve.runtime.errors import InvalidRequest

_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)

UNENCODABLE = (OverflowError, ValueError)
"""What the encoder raises for a value that cannot travel: an integer beyond 64 bits, text with half a surrogate pair.
(`TypeError` is for a type that is none of ours.)"""


class Objection(NamedTuple):
    """msgspec's words about a value: `what` is wrong, and at which field ("": the value as a whole)."""

    what: str
    at: str

    @property
    def field(self) -> str:
        """The field that is wrong, or missing; "" for the value as a whole."""
        missing = _MISSING.fullmatch(self.what)
        return self.at if missing is None else joined(self.at, missing["name"])

    def refusal(self) -> InvalidRequest:
        """The error that says so."""
        field = self.field
        if not field:
            return InvalidRequest(self.what)
        said = f"'{field}': {self.what}" if field == self.at else f"'{field}' is required"
        return InvalidRequest(said, param=field)


def objection(error: msgspec.ValidationError) -> Objection:
    """What `error` says, and of which field."""
    message = str(error)
    match = _PLACE.fullmatch(message)
    return Objection(match["what"], (match["path"] or "").replace("[...]", "")) if match else Objection(message, "")


def joined(at: str, name: str) -> str:
    """The path of what is at `name` within what is at `at`; "" is the value as a whole."""
    return f"{at}.{name}" if at and name else at or name


def unencodable(body: Struct) -> Objection | None:
    """The first field of `body` whose value cannot travel, or None."""
    for name in body.__struct_fields__:
        found = _unencodable(getattr(body, name))
        if found is not None:
            return Objection(found.what, joined(name, found.at))
    return None


def _unencodable(value: Any) -> Objection | None:
    try:
        msgspec.msgpack.encode(value)
    except UNENCODABLE as error:
        within = unencodable(value) if isinstance(value, Struct) else None
        return within or Objection(str(error), "")
    return None
