"""`microserve install-units`: the systemd units of router and engines, and commented examples of their configuration.

Installs again what changed and says what it did; a configuration file that exists is never touched.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.tools.common import command_parser, config_home

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNITS = ("microserve-router.service", "microserve-engine@.service", "microserve.target")
EXAMPLES = {"router.toml": "router.toml", "engine-0.toml": "engine.toml"}
USER = "microserve"

_HOME = "/var/lib/microserve"
_MAKE_USER = ["useradd", "--system", "--user-group", "--home-dir", _HOME, "--shell", "/usr/sbin/nologin", USER]

_SYSTEM = f"""User={USER}
Group={USER}"""

_BACK_OFF = """RestartSec={first}
RestartSteps=6
RestartMaxDelaySec=60"""
_BACK_OFF_SINCE = 254
"""The first systemd that knows those two."""
_EVEN_PACE = """# This systemd knows no longer and longer pauses.
RestartSec=5"""
_LIMIT = """StartLimitIntervalSec=10min
StartLimitBurst=20"""
_NO_LIMIT = """# At an even pace any limit comes soon, and a fault that passes would have ended the service for good.
StartLimitIntervalSec=0"""
_FIRST_PAUSE = {"microserve-router.service": "1", "microserve-engine@.service": "2"}

_SANDBOX = """NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateMounts=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectProc={proc}
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC={ipc}
UMask=0077
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM"""

_USER_SANDBOX = """NoNewPrivileges=yes
UMask=0077"""


@dataclass(frozen=True, slots=True)
class Places:
    """Where things go, for the system or for one user."""

    units: Path
    config: Path
    named_config: str
    """What the units call `config`."""
    system: bool

    @classmethod
    def of_system(cls, root: Path) -> Places:
        """`root` is "/" but in tests and images."""
        return cls(root / "etc/systemd/system", root / "etc/microserve", "/etc/microserve", True)

    @classmethod
    def of_user(cls, folder: Path) -> Places:
        """`folder` is where the user's configuration is: `common.config_home`."""
        config = folder / "microserve"
        return cls(folder / "systemd/user", config, str(config), False)


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = command_parser("install-units", "Install the systemd units, and commented examples of configuration.")
    parser.add_argument("--user", action="store_true", help="for your own service manager instead of the system's")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--remove", action="store_true", help="disable the units, take them away; configuration stays")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="install below DIR (for images)")
    arguments = parser.parse_args(argv)
    places = Places.of_user(config_home()) if arguments.user else Places.of_system(arguments.root)
    here = arguments.root == Path("/")
    if here and not arguments.dry_run and places.system and os.geteuid() != 0:
        print("microserve install-units: error: needs root; try --user, or --dry-run to see", file=sys.stderr)
        return 1
    work = Work(dry=arguments.dry_run)
    control = "systemctl" if places.system else "systemctl --user"
    try:
        if arguments.remove:
            if here and any((places.units / name).exists() for name in UNITS):
                # Before they go: of a unit that is not there nothing can be disabled.
                work.run([*control.split(), "disable", *UNITS])
            remove(places, work)
        else:
            install(places, work, make_user=here and places.system)
        if here and places.system and not arguments.remove:
            for command in _owning(str(places.config)):
                work.run(command)
        if here and work.units_changed:
            work.run([*control.split(), "daemon-reload"])
    except OSError as error:
        print(f"microserve install-units: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    if arguments.remove:
        print(f"\nwhat runs goes on until it is stopped: {control} stop 'microserve*'")
        return 1 if work.failed else 0
    if places.system and not here:
        commands = (_MAKE_USER, *_owning(places.named_config))
        print("\nnote: the units' user and their configuration's group are still to be made; in the image, as root:")
        print("\n".join(f"  {' '.join(command)}" for command in commands))
    if places.system and (closed := _closed_to_others()) is not None:
        print(
            f"\nnote: {closed} is closed to others, and the user {USER} runs what is below it: install microserve "
            "elsewhere (a virtual environment in /opt), or open it"
        )
    print(_next_steps(places))
    return 1 if work.failed else 0


class Work:
    """Does things and says so, or only says so."""

    def __init__(self, *, dry: bool, say: Callable[[str], None] = print) -> None:
        self.units_changed = False
        self.failed = False
        """Whether a command did."""
        self._dry = dry
        self._say = say

    def write(self, path: Path, text: str, *, mode: int, keep: bool = False) -> None:
        """`keep`: a file that exists stays as it is, whatever it says."""
        present = path.read_text(encoding="utf-8") if path.exists() else None
        if present == text or (keep and present is not None):
            self._tell(f"unchanged  {path}")
            return
        self._tell(f"{self._word('write')}  {path}")
        self.units_changed |= not keep
        if not self._dry:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                path.parent.chmod(0o755)  # whatever the umask is: the daemons go through it
            path.write_text(text, encoding="utf-8")
            path.chmod(mode)

    def delete(self, path: Path) -> None:
        if not path.exists():
            self._tell(f"not there  {path}")
            return
        self._tell(f"{self._word('remove')}  {path}")
        self.units_changed = True
        if not self._dry:
            path.unlink()

    def run(self, command: Sequence[str]) -> None:
        """A failure is told, and what comes after it is done all the same; nor need the program be there: a container
        may have no service manager."""
        self._tell(f"{self._word('run')}  {' '.join(command)}")
        if self._dry:
            return
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            self._tell(f"  {command[0]} is not there: run it yourself where it is")
            return
        if done.returncode:
            self.failed = True
            self._tell(f"  it failed: {(done.stderr or done.stdout).strip()}")

    def _tell(self, text: str) -> None:
        try:
            self._say(text)
        except BrokenPipeError:
            # Whoever read has left (`| head`): what was begun is done all the same.
            self._say = lambda text: None

    def _word(self, verb: str) -> str:
        return f"would {verb}" if self._dry else f"{verb}   "


def install(places: Places, work: Work, *, make_user: bool) -> None:
    """Writes units and example configuration. Idempotent. Raises `OSError`."""
    if make_user and not _user_exists():
        work.run(_MAKE_USER)
    for name in UNITS:
        work.write(places.units / name, unit_text(name, places), mode=0o644)
    for name, source in EXAMPLES.items():
        work.write(places.config / name, _data(source).replace("NAME", "0"), mode=0o640, keep=True)


def _owning(config: str) -> list[list[str]]:
    """What gives the configuration to the units' user."""
    keys = f"{config}/keys"
    return [
        # The daemons read it, and nobody else: keys may stand in it.
        ["chgrp", "-R", USER, config],
        # What root writes into it later belongs to who owns it: see `runtime.keys.replace_file`.
        ["install", "-d", "-m", "700", keys],
        ["chown", "-R", f"{USER}:{USER}", keys],
    ]


def remove(places: Places, work: Work) -> None:
    """Takes the units away. Idempotent. Raises `OSError`."""
    for name in UNITS:
        work.delete(places.units / name)


def unit_text(name: str, places: Places) -> str:
    """A unit with its places filled in."""
    engine = "engine" in name
    home = "read-only" if any(map(_under_home, _loaded_from())) else "yes"
    # UCX proves that a peer on this host is dead by its /proc entry, and shares memory with it by SysV and POSIX names.
    sandbox = _SANDBOX.format(proc="default" if engine else "invisible", ipc="no" if engine else "yes", home=home)
    backs_off = systemd_version() >= _BACK_OFF_SINCE
    values = {
        "python": _escaped(sys.executable),
        "config": _escaped(places.named_config),
        "state": "%S/microserve",
        "cache": "%C/microserve",
        "limit": _LIMIT if backs_off else _NO_LIMIT,
        "restart": _BACK_OFF.format(first=_FIRST_PAUSE.get(name, "1")) if backs_off else _EVEN_PACE,
        "system": _SYSTEM if places.system else "",
        "sandbox": sandbox if places.system else _USER_SANDBOX,
        "target": "multi-user.target" if places.system else "default.target",
    }
    text = _data(name)
    if not places.system:
        # A user's manager may not restrict devices or raise limits.
        dropped = (
            *("DevicePolicy", "DeviceAllow", "PrivateDevices", "PrivateUsers", "LimitMEMLOCK", "RestrictAddress"),
            *("SystemCallFilter", "# Not @resources", "# ZeroMQ", "# GPUs", "# RDMA"),
        )
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(dropped))
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def systemd_version() -> int:
    """The major version of this host's systemd; 0 without one."""
    try:
        shown = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return 0
    word = (shown.split() or ["", "0"])[1:2]
    return int(word[0]) if word and word[0].isdigit() else 0


def _loaded_from() -> tuple[Path, ...]:
    """What a daemon of this installation is made of: the interpreter may be elsewhere than its environment, and the
    package elsewhere than both."""
    here = Path(__file__).resolve().parent
    return Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve(), here


def _closed_to_others() -> Path | None:
    """A folder on the way to what the daemons are made of that another user may not go through."""
    for path in _loaded_from():
        for each in reversed((path, *path.parents)):
            if each.is_dir() and not each.stat().st_mode & stat.S_IXOTH:
                return each
    return None


def _escaped(text: str) -> str:
    """One word of a command in a unit."""
    text = text.replace("\\", "\\\\").replace("%", "%%")
    return "".join(f"\\x{ord(each):02x}" if each in " \t\"'" else each for each in text)


def _under_home(path: Path) -> bool:
    return any(path.is_relative_to(home) for home in ("/home", "/root", "/run/user"))


def _user_exists() -> bool:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return False
    return True


def _data(name: str) -> str:
    return resources.files("microserve.tools").joinpath("systemd", name).read_text(encoding="utf-8")


def _next_steps(places: Places) -> str:
    control = "systemctl" if places.system else "systemctl --user"
    return (
        f"\nnext: edit {places.config}/router.toml and {places.config}/engine-0.toml, then\n"
        f"  {control} enable --now microserve.target microserve-router microserve-engine@0\n"
        f"  {control} status 'microserve*'\n"
        "one more engine: copy engine-0.toml to engine-1.toml, change engine_id and device, enable microserve-engine@1"
    )
