"""Configuration files and key files: what a daemon would refuse when it starts, told before it does."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.config import EngineConfig, RouterConfig, load_config
from microserve.runtime.errors import ConfigError
from microserve.runtime.keys import check_exposed, is_loopback
from microserve.tools.checks.finding import note, ok, problem
from microserve.tools.config import kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

_KINDS: dict[str, type[EngineConfig | RouterConfig]] = {"router": RouterConfig, "engine": EngineConfig}
SYSTEM_FOLDER = Path("etc/microserve")
_BAD_NAMES = ("api_keys.toml", "authorized.toml")


@dataclass(slots=True)
class Configured:
    """What the configuration files of this machine say."""

    engines: list[tuple[Path, EngineConfig]] = field(default_factory=list)
    routers: list[tuple[Path, RouterConfig]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def endpoints(self) -> list[str]:
        """The routers that are spoken of, each once."""
        named = [endpoint for _, config in self.engines for endpoint in config.routers]
        named += [config.advertise or config.bind for _, config in self.routers]
        # A port that is anyone's cannot be called; an address that is everyone's is ours, too.
        known = (each for each in named if not each.endswith(":*"))
        return list(dict.fromkeys(each.replace("*", "127.0.0.1").replace("0.0.0.0", "127.0.0.1") for each in known))


def default_files(machine: Machine) -> tuple[list[Path], list[Finding]]:
    """The system's and our own configuration files, and folders that may not be looked into."""
    files: list[Path] = []
    findings: list[Finding] = []
    for folder in (machine.root / SYSTEM_FOLDER, machine.config_home / "microserve"):
        try:
            names = sorted(os.listdir(folder))
        except PermissionError:
            words = f"{folder} may not be looked into by this user"
            findings.append(note("configuration", words, "run this as root to have it checked"))
        except OSError:
            continue
        else:
            # Lists of keys are TOML, too.
            files += [folder / name for name in names if name.endswith(".toml") and name not in _BAD_NAMES]
    return files, findings


def read_configuration(
    machine: Machine, files: Sequence[Path] | None, environ: Mapping[str, str] | None = None
) -> Configured:
    """Reads and checks `files`, or those that daemons read unasked. `environ`: what a daemon started here would see."""
    found = Configured()
    given = files is not None
    if files is None:
        files, found.findings = default_files(machine)
    for file in files:
        try:
            kinds = kind_of(file).split("+")
            for kind in kinds:
                config = load_config(_KINDS[kind], file=file)
                if isinstance(config, EngineConfig):
                    found.engines.append((file, config))
                else:
                    found.routers.append((file, config))
            found.findings.append(ok("configuration", f"{file} is valid ({' and '.join(kinds)})"))
        except ConfigError as error:
            found.findings.append(_refused(file, error, given=given))
    if not files and not found.findings:
        words = f"no configuration files in {machine.root / SYSTEM_FOLDER}: daemons have their defaults and flags"
        found.findings.append(ok("configuration", words))
    for expected in _KINDS.values():
        try:
            load_config(expected, environ=environ if environ is not None else machine.environ)
        except ConfigError as error:
            advice = "unset the variable, or correct it: daemons that are started from here refuse it"
            found.findings.append(problem("configuration", f"the environment: {error.message}", advice))
    return found


def _refused(file: Path, error: ConfigError, *, given: bool) -> Finding:
    if not os.access(file, os.R_OK) and file.exists():
        return note("configuration", f"{file} may not be read by this user", "run this as root to have it checked")
    words = error.message if str(file) in error.message else f"{file}: {error.message}"
    if "say --kind" in words and not given:
        words = f"{file} is neither a router's configuration nor an engine's"
        return note("configuration", words, "move it elsewhere if it is not meant for a daemon")
    return problem("configuration", words, f"correct it, then `microserve config check {file}`")


def check_agreement(configured: Configured, *, gpu: bool) -> list[Finding]:
    """What is valid by itself, and will not work together, or on this machine."""
    findings: list[Finding] = []
    findings += _twice("engine_id", ((file, config.engine_id) for file, config in configured.engines))
    devices = ((file, config.device) for file, config in configured.engines if config.device.startswith("cuda"))
    findings += _twice("device", devices)
    fixed = ((file, config.bind) for file, config in configured.engines if not config.bind.endswith(":*"))
    findings += _twice("bind", [*fixed, *((file, config.bind) for file, config in configured.routers)])
    findings += _twice("http_port", ((file, config.http_port or None) for file, config in configured.routers))
    for file, engine in configured.engines:
        if not gpu and (engine.executor == "cuda" or engine.device.startswith("cuda")):
            advice = 'executor = "torch" and device = "cpu", or see the gpu check'
            findings.append(problem("configuration", f"{file}: asks for a GPU, and there is none here", advice))
        exposed = [("bind", engine.bind), ("events_bind", engine.events_bind)]
        findings += _exposed(file, exposed, secured=engine.key_file is not None, insecure=engine.insecure)
    for file, router in configured.routers:
        findings += _exposed(
            file, [("bind", router.bind)], secured=router.key_file is not None, insecure=router.insecure
        )
        findings += _exposed_http(file, router)
        folders = (("strategy_folder", router.strategy_folder), ("state_folder", router.state_folder))
        for setting, folder in folders:
            if folder is not None and not Path(folder).is_dir():
                words = f"{file}: {setting}: there is no folder {folder}"
                findings.append(note("configuration", words, f"mkdir -p {folder}, and let the daemon's user have it"))
    return findings


def _twice(setting: str, given: Iterable[tuple[Path, object]]) -> list[Finding]:
    users: defaultdict[object, list[Path]] = defaultdict(list)
    for file, value in given:
        if value is not None:
            users[value].append(file)
    return [
        problem(
            "configuration",
            f"{' and '.join(map(str, files))} have the same {setting}, {value}",
            f"give each its own {setting}, or remove one of the files",
        )
        for value, files in users.items()
        if len(files) > 1
    ]


def _exposed(file: Path, endpoints: list[tuple[str, str]], *, secured: bool, insecure: bool) -> list[Finding]:
    try:
        check_exposed(endpoints, secured=secured, insecure=insecure)
    except ConfigError as error:
        return [problem("configuration", f"{file}: {error.message}", "`microserve keys new`, then set key_file")]
    if insecure and not secured and any(not is_loopback(address) for _, address in endpoints):
        words = f"{file}: insecure: everybody who reaches its ports may use them"
        return [note("configuration", words, "`microserve keys new`, then set key_file")]
    return []


def _exposed_http(file: Path, config: RouterConfig) -> list[Finding]:
    if is_loopback(config.http_host) or (config.api_keys_file is not None and config.tls_cert is not None):
        return []
    lacking = "asks nobody for a key" if config.api_keys_file is None else "takes keys in clear text"
    words = f"{file}: HTTP can be reached from other machines, and {lacking}"
    advice = "`microserve keys api new`, then set api_keys_file, tls_cert and tls_key"
    return [note("configuration", words, advice) if config.insecure else problem("configuration", words, advice)]
