"""Identifiers: distinct kinds of id are distinct types, and an incarnation of a process is a `Peer`."""

from __future__ import annotations

import itertools
import os
import re
import time
from typing import NewType

import msgspec

EngineId = NewType("EngineId", str)
RouterId = NewType("RouterId", str)
RequestId = NewType("RequestId", str)
"""Names one request of a user across every process that works on it."""
SubId = NewType("SubId", str)
"""Names one call of a verb; unique per call, so that a retry is recognised and late messages are too."""
CallId = NewType("CallId", int)
"""Correlates a call with its replies within one session."""
Epoch = NewType("Epoch", int)
"""One incarnation of a process: larger after every restart."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Peer(msgspec.Struct, frozen=True):
    """One incarnation of a process on the bus: its kind, its name and its epoch."""

    kind: str
    name: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}:{self.epoch:x}"

    @property
    def routing_id(self) -> bytes:
        """The ZMQ routing id, unique to this incarnation (at most 255 bytes, never starting with a zero byte)."""
        return str(self).encode()


def valid_name(name: str) -> bool:
    """Whether `name` may name a process: letters, digits, '.', '_', '-', at most 63, the first a letter or digit."""
    return _NAME.fullmatch(name) is not None


def new_epoch() -> Epoch:
    """An epoch for this process: wall-clock microseconds, so that a restart on the same host is always larger."""
    return Epoch(time.time_ns() // 1_000)


class IdSource:
    """Makes ids that are unique across processes: a random prefix and a counter.

    Cheaper than a UUID per call, and short enough to read in a log.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix}-{os.urandom(5).hex()}-"
        self._counter = itertools.count(1)

    def next(self) -> str:
        return f"{self._prefix}{next(self._counter)}"
