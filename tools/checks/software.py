"""Python and the packages. Needs nothing that is not Python's own: it is there to say when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

OLDEST = (3, 11)


@dataclass(frozen=True, slots=True)
class Package:
    """A package that is needed: where there is a GPU (`gpu`), on Linux, for one thing alone (`extra`), or always."""

    name: str
    oldest: str
    module: str = ""
    needed: Literal["always", "linux", "gpu", "extra"] = "always"
    install: str = "microserve"
    use: str = ""

    @property
    def imported(self) -> str:
        return self.module or self.name.replace("-", "_")


PACKAGES = (
    Package("httptools", "0.6"),
    Package("jinja2", "3.1"),
    Package("msgpack", "1.0"),
    Package("msgspec", "0.19"),
    Package("nixl-cu13", "1.5.1", needed="linux", use="KV that moves between engines"),
    Package("numpy", "1.26"),
    Package("prometheus-client", "0.20"),
    Package("pyzmq", "26", module="zmq"),
    Package("rich", "13"),
    Package("safetensors", "0.4.3"),
    Package("starlette", "0.40"),
    Package("tokenizers", "0.20"),
    Package("torch", "2.6"),
    Package("uvicorn", "0.30"),
    Package("uvloop", "0.21"),
    Package("flashinfer-python", "0.6.12", "flashinfer", "gpu", "microserve[cuda]", "the cuda executor"),
    Package("textual", "8.2", "", "extra", "microserve[tui]", "`microserve top`"),
)
_SLOW = frozenset({"torch", "flashinfer"})
"""Take seconds to import: flashinfer is looked up alone, torch has a check of its own."""

_IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        why = ""
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
    print(json.dumps([name, why]), flush=True)
"""


def check_python(
    version: tuple[int, ...] = sys.version_info[:3], system: str = sys.platform, machine: str = platform.machine()
) -> list[Finding]:
    """Its version, and the system that it runs on."""
    shown = f"Python {'.'.join(map(str, version))} on {system}, {machine}"
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return [problem("python", f"{shown}: {oldest} or later is needed", f"install microserve with Python {oldest}")]
    if system != "linux":
        return [note("python", f"{shown}: KV does not move between engines here", "run engines on Linux")]
    return [ok("python", shown)]


def installed_version(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    machine: Machine,
    *,
    packages: Sequence[Package] = PACKAGES,
    installed: Callable[[str], str | None] = installed_version,
    curve: Callable[[], bool] | None = None,
) -> list[Finding]:
    """Present, new enough, and can be imported. `curve`: whether ZeroMQ can use keys; not asked where it is None."""
    findings: list[Finding] = []
    versions: dict[str, str] = {}
    for package in packages:
        found = installed(package.name)
        if found is not None:
            versions[package.name] = found
        findings += _judge(package, found, gpu=bool(machine.gpus))
    modules = [each.imported for each in packages if each.name in versions and each.imported not in _SLOW]
    broken, asked_all = _imports(machine, modules)
    for package in packages:
        if why := broken.get(package.imported):
            install = f"pip install --force-reinstall '{package.name}>={package.oldest}'"
            findings.append(problem("packages", f"{package.name} cannot be imported: {why}", install))
    if not asked_all:
        words = f"importing the packages took longer than {machine.seconds:g} s"
        findings.append(note("packages", words, "try again with a longer --timeout when the machine is less busy"))
    if curve is not None and "zmq" not in broken and "pyzmq" in versions and not curve():
        words = "pyzmq's libzmq was built without CURVE: the bus cannot use keys"
        findings.append(problem("packages", words, "pip install --force-reinstall --only-binary :all: pyzmq"))
    if not any(finding.status == "problem" for finding in findings):
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        findings.insert(0, ok("packages", listed))
    return findings


def _judge(package: Package, found: str | None, *, gpu: bool) -> list[Finding]:
    install = f"pip install '{package.install}'"
    needed = {"always": True, "linux": sys.platform == "linux", "gpu": gpu, "extra": False}[package.needed]
    if found is None:
        missing = f"{package.name} is not installed"
        if needed:
            return [problem("packages", missing + (f": {package.use} needs it" if package.use else ""), install)]
        if package.needed == "extra":
            return [note("packages", f"{missing}: {package.use} needs it", install)]
        return []
    if _numbers(found) < _numbers(package.oldest):
        words = f"{package.name} {found} is older than {package.oldest}"
        advice = f"pip install --upgrade '{package.name}>={package.oldest}'"
        return [problem("packages", words, advice) if needed else note("packages", words, advice)]
    return []


def _imports(machine: Machine, modules: Sequence[str]) -> tuple[dict[str, str], bool]:
    """Why modules cannot be imported, and whether all were tried."""
    ran = machine.python("-c", _IMPORT, *modules)
    told: dict[str, str] = {}
    for line in ran.out.splitlines():
        # A module may print while it is imported.
        if line.startswith("["):
            name, why = json.loads(line)
            told[name] = why
    if not ran.late and len(told) < len(modules):
        # It took the process with it.
        crashed = next(name for name in modules if name not in told)
        told[crashed] = f"the process ended with code {ran.code}"
        return {name: why for name, why in told.items() if why}, True
    return {name: why for name, why in told.items() if why}, not ran.late


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    numbers: list[int] = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
