"""Proof that another process of this host is dead: its id is gone, or belongs to another process by now.

A host is named together with its boot and its process-id namespace: an id means something only within those.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

_STATE, _STARTED = 0, 19
"""Places in /proc/<pid>/stat behind the command's name."""
_OVER = ("Z", "X", "x")
"""States of a process that runs no more and has given back its memory."""


class Incarnation(NamedTuple):
    """One process. `host` "" is a host that cannot be told from another: nothing on it can be proven dead."""

    host: str
    pid: int
    started: int
    """Clock ticks since boot."""


def own_incarnation(proc: Path = Path("/proc")) -> Incarnation:
    """This process."""
    pid = os.getpid()
    try:
        started = _started(proc, pid)
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(proc / "self/ns/pid")
    except OSError:
        started = None
    if started is None:
        return Incarnation("", pid, 0)
    return Incarnation(f"{socket.gethostname()}/{boot}/{namespace}", pid, started)


def proven_dead(other: Incarnation, host: str, proc: Path = Path("/proc")) -> bool:
    """Whether `other` is certainly over, seen from `host`. False also means: it cannot be told."""
    if not host or other.host != host or other.pid <= 0:
        return False
    try:
        return _started(proc, other.pid) != other.started
    except OSError:
        return not _exists(other.pid)


def _started(proc: Path, pid: int) -> int | None:
    """When the process that has this id began; None: it is over, and waits to be collected. Raises `OSError`."""
    stat = (proc / str(pid) / "stat").read_text()
    # The command's name stands in parentheses and may hold anything, parentheses included.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[_STATE] in _OVER else int(fields[_STARTED])


def _exists(pid: int) -> bool:
    # /proc may hide the processes of other users: then only this tells a hidden one from none.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
