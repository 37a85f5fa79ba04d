"""Ports: whether those of a router are free, and who has them if not. All from /proc/net and /proc/PID."""

from __future__ import annotations

import ipaddress
import os
import pwd
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

ROUTER = "microserve.router"
_LISTENING = "0A"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A port that a router of this machine has, or would take. `setting` chooses another."""

    what: str
    host: str
    port: int
    setting: str
    needed: bool = True
    """Whether a router is to be here; else another program may have it."""


@dataclass(frozen=True, slots=True)
class _Listener:
    address: str
    user: int
    inode: str


def check_ports(machine: Machine, wanted: Iterable[Wanted]) -> list[Finding]:
    """Each is free, a router's of ours, or somebody else's."""
    net = [machine.root / "proc/net" / name for name in ("tcp", "tcp6")]
    if not net[0].exists():
        return [note("ports", "whose ports are whose cannot be seen here: there is no /proc/net", "see `lsof -i`")]
    return [_judge(machine, each, net) for each in wanted if each.port]


def who_listens(host: str, port: int, root: Path) -> str:
    """Who has the port, in words; `root` is where /proc is found."""
    net = [root / "proc/net" / name for name in ("tcp", "tcp6")]
    found = next((each for each in _listeners(net, port) if _meets(each.address, host)), None)
    holder = _holder(root / "proc", found.inode) if found is not None else None
    if holder is None:
        return "another program"
    pid, command = holder
    return f"a microserve router (process {pid})" if ROUTER in command else f"{_program(command)} (process {pid})"


def _judge(machine: Machine, wanted: Wanted, net: Sequence[Path]) -> Finding:
    words = f"{wanted.what} port {wanted.port} of {wanted.host}"
    found = next((each for each in _listeners(net, wanted.port) if _meets(each.address, wanted.host)), None)
    if found is None:
        return ok("ports", f"{words} is free")
    holder = _holder(machine.root / "proc", found.inode)
    if holder is None:
        user = _user_name(found.user)
        words = f"{words} is in use by a process of user {user}, which we may not look at"
        return note("ports", words, f"run this as root, or as {user}, to see whether it is the router")
    pid, command = holder
    if ROUTER in command:
        return ok("ports", f"{words} is a microserve router's (process {pid})")
    words = f"{words} is in use by another program: {_program(command)} (process {pid})"
    advice = f"stop it, or choose another port for the router ({wanted.setting})"
    return problem("ports", words, advice) if wanted.needed else note("ports", words, advice)


def _listeners(net: Iterable[Path], port: int) -> list[_Listener]:
    found = []
    for path in net:
        if not path.exists():
            continue
        for line in path.read_text().splitlines()[1:]:
            cells = line.split()
            if len(cells) < 10 or cells[3] != _LISTENING:
                continue
            address, _, number = cells[1].partition(":")
            if int(number, 16) == port:
                found.append(_Listener(_address(address), int(cells[7]), cells[9]))
    return found


def _address(text: str) -> str:
    """An address as the kernel writes it: words of 32 bits, each in the machine's order."""
    raw = bytes.fromhex(text)
    ordered = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return str(ipaddress.ip_address(ordered))


def _meets(listening: str, wanted: str) -> bool:
    """Whether one who listens at `listening` is in the way of one who would at `wanted`."""
    theirs = ipaddress.ip_address(listening)
    if theirs.is_unspecified:
        return True
    try:
        ours = {ipaddress.ip_address(each[4][0]) for each in socket.getaddrinfo(wanted, None)} if wanted else set()
    except OSError:
        return False
    return not ours or any(each.is_unspecified or each == theirs for each in ours)


def _holder(proc: Path, inode: str) -> tuple[int, list[str]] | None:
    """The process that has a socket, and its command line."""
    sought = f"socket:[{inode}]"
    for folder in proc.glob("[0-9]*"):
        try:
            if any(os.readlink(link) == sought for link in (folder / "fd").iterdir()):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                return int(folder.name), [part for part in command.split("\0") if part]
        except OSError:
            # Gone meanwhile, or not ours to look at.
            continue
    return None


def _program(command: Sequence[str]) -> str:
    """Not its arguments: some have secrets there."""
    return command[0].rpartition("/")[2] if command else "unknown"


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
