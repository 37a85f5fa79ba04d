"""What a check has found: one line, and for what is not well, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`note`: works, and could be better, or deserves a look. `problem`: something will not work."""

    check: str
    status: Status
    message: str
    advice: str = ""


def ok(check: str, message: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", message)


def note(check: str, message: str, advice: str = "") -> Finding:
    """Worth knowing."""
    return Finding(check, "note", message, advice)


def problem(check: str, message: str, advice: str) -> Finding:
    """Something to be done: `advice` says what."""
    return Finding(check, "problem", message, advice)
