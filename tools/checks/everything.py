"""Which checks there are, and what each is given: from the options, and from what the configuration files say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.keys import is_loopback
from microserve.tools.checks.configuration import Configured, check_agreement, read_configuration
from microserve.tools.checks.fleet import judge_fleet, look_at_fleet
from microserve.tools.checks.gpu import check_gpu, check_kernels, check_torch
from microserve.tools.checks.host import check_clock, check_limits, check_network, check_shared_memory
from microserve.tools.checks.http import check_http
from microserve.tools.checks.keys import check_keys, key_files, service_user
from microserve.tools.checks.ports import Wanted, check_ports
from microserve.tools.checks.running import Check, guarded
from microserve.tools.checks.software import check_packages, check_python
from microserve.tools.checks.transports import check_transports
from microserve.tools.checks.units import check_units
from microserve.tools.common import DEFAULT_ROUTER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

_HTTP_SHARE = 0.2
"""Of the time, for HTTP, which is asked after the bus."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was said on the command line. `router` None: the routers that the configuration names, or the usual one."""

    router: str | None = None
    key_file: str | None = None
    files: Sequence[Path] | None = None
    folder: Path = Path("/etc/microserve/keys")
    """Of the fleet's keys."""


def every_check(machine: Machine, asked: Asked) -> list[Check]:
    """In the order in which they are shown."""
    configured = Configured()

    def read() -> list[Finding]:
        nonlocal configured
        configured = read_configuration(machine, asked.files)
        return [*configured.findings, *check_agreement(configured, gpu=bool(machine.gpus))]

    # Read first, and once: the others need what it says.
    configuration = guarded(Check("configuration", read))
    expected = asked.router is not None or bool(configured.endpoints)
    endpoints = [asked.router] if asked.router is not None else configured.endpoints or [DEFAULT_ROUTER]
    devices = [(str(file), engine.ucx_devices) for file, engine in configured.engines]
    keys = key_files(configured, asked.key_file, asked.folder, service_user())
    return [
        Check("python", check_python),
        Check("packages", lambda: check_packages(machine, curve=_curve)),
        Check("torch", lambda: check_torch(machine)),
        Check("gpu", lambda: check_gpu(machine)),
        Check("kernels", lambda: check_kernels(machine)),
        Check("transports", lambda: check_transports(machine)),
        Check("network", lambda: check_network(machine, wanted=devices)),
        Check("limits", lambda: check_limits(machine)),
        Check("shared memory", lambda: check_shared_memory(machine)),
        Check("clock", check_clock),
        Check("configuration", lambda: configuration),
        Check("keys", lambda: check_keys(keys)),
        Check("ports", lambda: check_ports(machine, wanted_ports(configured, endpoints))),
        Check("units", lambda: check_units(machine)),
        Check("fleet", lambda: check_fleet(endpoints, asked.key_file, machine.seconds, expected=expected)),
    ]


def _curve() -> bool:
    # Imported here: where pyzmq is broken, its own check says so.
    from microserve.runtime.zmq_bus import curve_available

    return curve_available()


def wanted_ports(configured: Configured, endpoints: Sequence[str]) -> list[Wanted]:
    """Those of the routers that are configured here; else of the one that is asked for, where that is here."""
    wanted = []
    for _, router in configured.routers:
        wanted.append(Wanted("HTTP", router.http_host, router.http_port, "http_port"))
        wanted += _bus_port(router.bind, needed=True)
    if not wanted:
        here = [endpoint for endpoint in endpoints if is_loopback(endpoint)]
        if not here or DEFAULT_ROUTER in here:
            wanted.append(Wanted("HTTP", "127.0.0.1", 8000, "--http-port", needed=bool(here)))
        for endpoint in here:
            wanted += _bus_port(endpoint, needed=True)
    return wanted


def _bus_port(endpoint: str, *, needed: bool) -> list[Wanted]:
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not port.isdigit():
        return []
    return [Wanted("bus", host.strip("[]").replace("*", "0.0.0.0"), int(port), "bind", needed)]


def check_fleet(endpoints: Sequence[str], key_file: str | None, seconds: float, *, expected: bool) -> list[Finding]:
    """Routers, engines and HTTP. `expected`: whether somebody said that there is a router; else none is no problem."""

    async def look() -> list[Finding]:
        found = await look_at_fleet(endpoints, key_file, seconds=seconds, expected=expected)
        doors = [(seen.status.router, seen.status.http, seen.endpoint) for seen in found if seen.status is not None]
        asked = (asyncio.to_thread(check_http, *door, _HTTP_SHARE * seconds) for door in doors if door[1])
        answers = await asyncio.gather(*asked)
        return [*judge_fleet(found), *(finding for answer in answers for finding in answer)]

    return asyncio.run(look())
