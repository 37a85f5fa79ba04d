"""Key files: whom they belong to, who else may read them, and whether they are let in."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.errors import ConfigError
from microserve.runtime.keys import (
    AUTHORIZED_FILE,
    FLEET_FILE,
    check_secret,
    check_writers,
    read_authorized,
    read_identity,
)
from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from microserve.tools.checks.configuration import Configured
    from microserve.tools.checks.finding import Finding


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file that must be kept safe. `user`: who the daemon that reads it runs as, where that is known."""

    path: Path
    setting: str
    """"key_file" holds an identity; "tls_key" is a secret; "api_keys_file" may be read, and not written, by others."""
    role: str = ""
    """Of the daemon, for an identity."""
    name: str | None = None
    """What the daemon is called, for an identity."""
    user: int | None = None


def key_files(configured: Configured, ours: str | None, folder: Path, service: int | None) -> list[KeyFile]:
    """Those that configurations name, our own, and those of the fleet's folder. `service`: the units' user."""
    found: list[KeyFile] = []
    for file, engine in configured.engines:
        if engine.key_file:
            user = service if _of_service(file) else None
            found.append(KeyFile(Path(engine.key_file), "key_file", "engine", engine.engine_id, user))
    for file, router in configured.routers:
        user = service if _of_service(file) else None
        if router.key_file:
            found.append(KeyFile(Path(router.key_file), "key_file", "router", router.router_id, user))
        if router.tls_key:
            found.append(KeyFile(Path(router.tls_key), "tls_key", user=user))
        if router.api_keys_file:
            found.append(KeyFile(Path(router.api_keys_file), "api_keys_file"))
    if ours:
        found.append(KeyFile(Path(ours), "key_file"))
    known = {each.path for each in found}
    if os.access(folder, os.R_OK | os.X_OK):
        found += [KeyFile(path, "key_file") for path in sorted(folder.glob("*.key")) if path not in known]
    return found


def _of_service(file: Path) -> bool:
    return file.is_relative_to("/etc/microserve")


def service_user(name: str = "microserve") -> int | None:
    """The id of the user that the system's units run as."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def check_keys(files: Iterable[KeyFile]) -> list[Finding]:
    """Modes, owners, whether they can be used, and whether `authorized.toml` knows them."""
    files = list(files)
    if not files:
        return [ok("keys", "no key files: the bus is for this machine alone, and asks nobody who they are")]
    findings: list[Finding] = []
    for each in files:
        findings += _check(each)
    for folder in dict.fromkeys(each.path.parent for each in files if each.setting == "key_file"):
        ring = folder / AUTHORIZED_FILE
        if ring.exists():
            findings += _ring(ring)
    return findings


def _check(file: KeyFile) -> list[Finding]:
    path = file.path
    try:
        if file.setting == "api_keys_file":
            check_writers(path)
        else:
            check_secret(path)
    except ConfigError as error:
        return [_refused(path, error)]
    owner = path.stat().st_uid
    if file.user is not None and file.setting != "api_keys_file" and owner != file.user:
        words = f"{path} belongs to {_user(owner)}, and the daemon runs as {_user(file.user)}: it cannot read it"
        return [problem("keys", words, f"chown {_user(file.user)} {path}")]
    if not os.access(path, os.R_OK):
        words = f"{path} may not be read by this user, which is as it should be"
        return [note("keys", words, "run this as root to have its contents checked")]
    if file.setting != "key_file" or path.name == FLEET_FILE:
        return [ok("keys", f"{path} can be used")]
    return _identity(file)


def _identity(file: KeyFile) -> list[Finding]:
    path = file.path
    try:
        identity = read_identity(path)
    except ConfigError as error:
        return [_refused(path, error)]
    shown = f"{path} is the key of {identity.name} ({identity.role})"
    findings: list[Finding] = []
    if file.role and identity.role != file.role:
        words = f"{shown}, and {_who(file)} is to use it"
        findings.append(problem("keys", words, f"microserve keys new NAME --role {file.role}, then set key_file"))
    elif file.name is not None and identity.name != file.name:
        words = f"{shown}, and {_who(file)} is to use it: a key speaks for its own name alone"
        findings.append(problem("keys", words, f"call it {identity.name}, or leave out {file.role}_id"))
    ring = path.parent / AUTHORIZED_FILE
    if ring.exists():
        try:
            known = any(each.public == identity.public for each in read_authorized(ring))
        except ConfigError:
            known = True  # the list has a finding of its own
        if not known:
            words = f"{shown}, which {ring} does not let in (any more)"
            advice = f"`microserve keys authorize` lets it in again; else remove {path}"
            status = problem if file.role else note
            findings.append(status("keys", words, advice))
    elif file.role:
        words = f"{ring} is missing: the {file.role} would not start"
        findings.append(problem("keys", words, "copy it from where the fleet's keys are made"))
    return findings or [ok("keys", shown)]


def _who(file: KeyFile) -> str:
    kind = {"engine": "an engine", "router": "a router"}[file.role]
    return kind if file.name is None else f"{kind} called {file.name}"


def _ring(ring: Path) -> list[Finding]:
    try:
        known = read_authorized(ring)
    except ConfigError as error:
        return [_refused(ring, error)]
    return [ok("keys", f"{ring} lets in {len(known)} {'key' if len(known) == 1 else 'keys'}")]


def _refused(path: Path, error: ConfigError) -> Finding:
    if path.exists() and not os.access(path, os.R_OK):
        return note("keys", f"{path} may not be read by this user", "run this as root to have it checked")
    words, _, advice = error.message.partition(": chmod")
    if advice:
        return problem("keys", words, f"chmod{advice}; who could read it may have: consider a new key")
    return problem("keys", words, "`microserve keys new` makes keys; `microserve keys list` shows who is let in")


def _user(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
