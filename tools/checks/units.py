"""The systemd units: installed, of this version, enabled, running."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.tools.checks.finding import note, ok, problem
from microserve.tools.install_units import UNITS, Places, unit_text

if TYPE_CHECKING:
    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

_PROPERTIES = ("Id", "ActiveState", "SubState", "UnitFileState", "Result", "NRestarts")
_UNSTEADY = 3
"""Restarts of a unit that are worth a look."""


def check_units(machine: Machine) -> list[Finding]:
    """Of the system's manager, and of our own."""
    # As sd_booted(3) does: the programs may be there without the manager.
    if machine.find("systemctl") is None or not (machine.root / "run/systemd/system").is_dir():
        return [note("units", "no systemd here to restart a daemon that ends", "`microserve up` restarts its own")]
    findings = []
    for places in (Places.of_system(machine.root), Places.of_user(machine.config_home)):
        if any((places.units / name).exists() for name in UNITS):
            findings += _installed(machine, places)
    if not findings:
        words = "the systemd units are not installed"
        findings = [note("units", words, "`microserve install-units`, or with --user for your own service manager")]
    return findings


def _installed(machine: Machine, places: Places) -> list[Finding]:
    again = "microserve install-units" + ("" if places.system else " --user")
    findings = []
    for name in UNITS:
        path = places.units / name
        if not path.exists():
            findings.append(problem("units", f"{path} is missing, and others are installed", f"`{again}`"))
        elif path.read_text(encoding="utf-8") != unit_text(name, places):
            words = f"{path} is not what this version, with this Python, installs"
            findings.append(note("units", words, f"`{again}`, when this is the one that serves"))
    return findings + _states(machine, places)


def _states(machine: Machine, places: Places) -> list[Finding]:
    control = ["systemctl", *([] if places.system else ["--user"])]
    shown = " ".join(control)
    listed = machine.program(*control, "list-units", "--all", "--plain", "--no-legend", "--no-pager", "microserve*")
    if listed is None or listed.late or listed.code:
        why = "does not answer" if listed is None or listed.late else listed.last_words
        words = f"the units are installed, and their state is not to be had: {shown}: {why}"
        advice = f"`{shown} list-units 'microserve*'`, as root, or logged in as the user whose they are"
        return [note("units", words, advice)]
    first = (line.split()[0] for line in listed.out.splitlines() if line.strip())
    names = [name for name in first if name.endswith(".service")]
    if not names:
        start = f"`{shown} enable --now microserve.target microserve-router microserve-engine@0`"
        return [note("units", "the units are installed, and none is started", start)]
    found = machine.program(*control, "show", "--no-pager", f"--property={','.join(_PROPERTIES)}", *names)
    blocks = [] if found is None else found.out.strip().split("\n\n")
    told = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in blocks]
    journal = "journalctl" + ("" if places.system else " --user") + " -u"
    return [_judge(each, shown, journal) for each in told if "Id" in each]


def _judge(unit: dict[str, str], control: str, journal: str) -> Finding:
    name, active = unit["Id"].removesuffix(".service"), unit.get("ActiveState", "")
    restarts = int(unit.get("NRestarts") or 0)
    words = f"{name} is {active} ({unit.get('SubState', '')}), {unit.get('UnitFileState') or 'not enabled'}"
    if active == "failed":
        result = unit.get("Result", "")
        return problem(
            "units", f"{name} has failed: {result}", f"`{journal} {name} -n 50`, then `{control} restart {name}`"
        )
    if active != "active":
        return note("units", words, f"`{control} start {name}`, when it is to run")
    if restarts >= _UNSTEADY:
        return note("units", f"{words}, restarted {restarts} times", f"`{journal} {name}` says why")
    return ok("units", words)
