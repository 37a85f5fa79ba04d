"""What this machine allows: locked memory, open files, shared memory, network devices, its clock."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import TYPE_CHECKING

from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

_FEW_FILES, _ENOUGH_FILES = 1024, 8192
_SMALL_SHARED, _ENOUGH_SHARED = 64 << 20, 1 << 30
"""Bytes of /dev/shm: what containers are given unasked, and what the segments of several engines fit in."""
_UNSYNCHRONISED = 5
"""What `adjtimex` answers of a clock that nothing keeps right (TIME_ERROR)."""


def check_limits(machine: Machine) -> list[Finding]:
    """Locked memory, which RDMA needs for the pool, and open files."""
    return [_locked(machine), _files(machine)]


def _locked(machine: Machine) -> Finding:
    soft, hard = machine.limit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("limits", "locked memory is not limited")
    words = f"locked memory is limited to {_size(soft)}"
    if not machine.rdma_devices:
        return ok("limits", f"{words}, which matters to RDMA alone")
    if hard == resource.RLIM_INFINITY:
        return problem(
            "limits", f"{words}: RDMA cannot register a pool", "ulimit -l unlimited, before an engine starts"
        )
    advice = (
        "under systemd the units set LimitMEMLOCK=infinity; for a shell, "
        "'* - memlock unlimited' in /etc/security/limits.conf; in a container, --ulimit memlock=-1"
    )
    return problem("limits", f"{words}: RDMA cannot register a pool", advice)


def _files(machine: Machine) -> Finding:
    soft, hard = machine.limit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        return ok("limits", f"{_count(soft)} open files a process")
    words = f"a process may open {soft:,} files; a router needs one for each connection of a client"
    higher = hard == resource.RLIM_INFINITY or hard >= _ENOUGH_FILES
    advice = f"ulimit -n {_ENOUGH_FILES}" if higher else "'* - nofile 65536' in /etc/security/limits.conf"
    return problem("limits", words, advice) if soft < _FEW_FILES else note("limits", words, advice)


def _count(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def check_shared_memory(machine: Machine) -> list[Finding]:
    """/dev/shm, through which engines of one host pass KV that they cannot copy directly."""
    path = machine.root / "dev/shm"
    try:
        found = os.statvfs(path)
    except OSError as error:
        words = f"{path} cannot be used: {error.strerror}"
        return [problem("shared memory", words, "mount -t tmpfs tmpfs /dev/shm")]
    return [judge_shared_memory(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)]


def judge_shared_memory(total: int, free: int) -> Finding:
    """By the bytes of /dev/shm."""
    advice = "mount -o remount,size=8G /dev/shm; in a container, --shm-size 8g (Kubernetes: an emptyDir of Memory)"
    words = f"/dev/shm has {_size(free)} free of {_size(total)}"
    if total <= _SMALL_SHARED or free < _SMALL_SHARED // 4:
        return problem("shared memory", f"{words}: engines of one host cannot pass KV to each other", advice)
    if free < _ENOUGH_SHARED:
        return note("shared memory", f"{words}, which is little for several engines", advice)
    return ok("shared memory", words)


def check_network(machine: Machine, *, wanted: Iterable[tuple[str, str]] = ()) -> list[Finding]:
    """RDMA devices, and whether those that engines are configured for exist: `wanted` are (file, ucx_devices)."""
    findings: list[Finding] = []
    active: list[str] = []
    for device in machine.rdma_devices:
        for port in sorted(device.glob("ports/*")):
            name = f"{device.name}:{port.name}"
            state, rate, link = (_word(port / part) for part in ("state", "rate", "link_layer"))
            if "ACTIVE" in state:
                active.append(name)
                findings.append(ok("network", f"RDMA device {name}: {link}, {rate}"))
            else:
                words = f"RDMA device {name} is not active: {state.partition(': ')[2] or state}"
                advice = "see `ibstat` and the cable; InfiniBand needs a subnet manager"
                findings.append(note("network", words, advice))
    wanted = list(wanted)
    findings += _wanted_devices(machine, wanted)
    if active:
        verbs = sorted(machine.root.glob("dev/infiniband/uverbs*"))
        if not verbs:
            advice = "modprobe ib_uverbs; in a container, --device /dev/infiniband"
            findings.append(problem("network", "RDMA devices, and no /dev/infiniband/uverbs* to use them", advice))
        elif not any(os.access(each, os.R_OK | os.W_OK) for each in verbs):
            advice = "let the engine's user read and write them (group rdma, or a udev rule)"
            findings.append(problem("network", "/dev/infiniband/uverbs* may not be used by this user", advice))
        if machine.gpus and not any((machine.root / f"sys/module/{name}").exists() for name in _PEER_MODULES):
            words = "RDMA devices and GPUs, and no module that lets one read the other's memory"
            findings.append(note("network", words, "modprobe nvidia_peermem"))
        if all(devices == "lo" for _, devices in wanted):
            advice = f'ucx_devices = "{active[0]}" in the configuration of engines that send KV to other machines'
            findings.append(note("network", "KV stays on this machine: ucx_devices is lo", advice))
    return findings or [ok("network", "no RDMA device: KV between machines would go over TCP")]


_PEER_MODULES = ("nvidia_peermem", "nv_peer_mem")


def _wanted_devices(machine: Machine, wanted: Iterable[tuple[str, str]]) -> list[Finding]:
    findings = []
    known = {device.name for device in machine.rdma_devices}
    known |= {device.name for device in machine.root.glob("sys/class/net/*")}
    for file, devices in wanted:
        for name in (each.strip() for each in devices.split(",")):
            if name and name not in ("all", "lo") and name.partition(":")[0] not in known:
                words = f"{file}: ucx_devices names {name}, and there is no such device"
                findings.append(problem("network", words, f"choose among: {', '.join(sorted(known)) or 'none'}"))
    return findings


def _word(path: object) -> str:
    try:
        with open(str(path), encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def clock_state() -> int | None:
    """What the kernel answers of its clock (adjtimex, which only asks here); None where it cannot be asked."""
    try:
        asked = ctypes.CDLL(None).adjtimex
    except (AttributeError, OSError):
        return None
    # A `struct timex` of nothing but zeros changes nothing; it is shorter than this everywhere.
    return int(asked(ctypes.create_string_buffer(1024)))


def check_clock(state: Callable[[], int | None] = clock_state) -> list[Finding]:
    """Whether something keeps the clock right. Nothing of ours depends on it; whoever compares logs does."""
    found = state()
    if found is None or found < 0:
        return [note("clock", "whether the clock is kept right cannot be asked here", "see `timedatectl`")]
    if found == _UNSYNCHRONISED:
        words = "nothing keeps the clock right: times in logs of several machines cannot be compared"
        return [note("clock", words, "timedatectl set-ntp true, or install chrony (in a virtual machine: its host's)")]
    return [ok("clock", "the clock is kept right (NTP)")]


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
