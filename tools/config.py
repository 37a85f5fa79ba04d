"""`microserve config check FILE…` and `microserve config show`: what a configuration says, before a daemon reads it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from microserve.runtime.config import EngineConfig, RouterConfig, explain_config, load_config
from microserve.runtime.errors import ConfigError
from microserve.runtime.keys import check_exposed, is_loopback
from microserve.runtime.look import Seen, look_at_key
from microserve.runtime.models import DEMO, resolve_model
from microserve.tools.common import command_parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KINDS: dict[str, type[EngineConfig | RouterConfig]] = {"router": RouterConfig, "engine": EngineConfig}


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 2 when something is wrong with a configuration."""
    parser = command_parser("config", "Look at configuration files, before a daemon reads them.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="check | show")
    check = actions.add_parser("check", help="say whether files are valid, and what is wrong")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    show = actions.add_parser("show", help="the effective values, and where each came from")
    show.add_argument("kind", choices=sorted(_KINDS), help="of which process")
    show.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="its TOML file (default: only the environment)"
    )
    show.add_argument("--changed", action="store_true", help="leave out what has its default")
    for each in (check, show):
        each.add_argument("--json", action="store_true", help="machine-readable")
    check.add_argument("--kind", choices=sorted(_KINDS), default=None, help="of which process (default: what fits)")
    arguments = parser.parse_args(argv)
    if arguments.action == "check":
        return _check(arguments.files, arguments.kind, as_json=arguments.json)
    return _show(arguments.kind, arguments.file, changed=arguments.changed, as_json=arguments.json)


def _check(files: Sequence[Path], kind: str | None, *, as_json: bool) -> int:
    results = []
    for file in files:
        seen = Seen()
        found = ""
        with seen.told():
            found = kind or kind_of(file)
            for each in found.split("+"):
                _look(each, file, seen)
        results.append(
            {"file": str(file), "kind": found, "error": "; ".join(seen.errors), "warnings": list(seen.warnings)}
        )
        if as_json:
            continue
        for said in seen.errors:
            print(said if str(file) in said else f"{file}: {said}", file=sys.stderr)
        for said in seen.warnings:
            print(f"{file}: warning: {said}", file=sys.stderr)
        if not seen.errors:
            print(f"{file}: valid ({found})")
    if as_json:
        print(msgspec.json.encode(results).decode())
    return 2 if any(result["error"] for result in results) else 0


def _look(kind: str, file: Path, seen: Seen) -> None:
    """Everything that the daemon looks at before it serves. Raises `ConfigError` when the file itself is wrong."""
    config = load_config(_KINDS[kind], file=file)
    with seen.told():
        _check_exposure(config)
    look_at_key(config, seen)
    if not isinstance(config, RouterConfig):
        if config.executor != "fake" and config.model != DEMO:
            with seen.told():
                resolve_model(config.model)
        return
    # Its own module knows certificates and strategies; the command line loads nothing of a router.
    command = [sys.executable, "-P", "-m", "microserve.router.look", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = msgspec.json.decode((done.stdout.splitlines() or [""])[-1], type=Seen)
    except msgspec.DecodeError:
        said = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        found = Seen([f"strategies or certificate could not be looked at: {said}"])
    seen.errors += found.errors
    seen.warnings += found.warnings


def _check_exposure(config: EngineConfig | RouterConfig) -> None:
    """Raises `ConfigError` for what a daemon would refuse when it starts: others that reach what nothing guards."""
    secured = config.key_file is not None
    if isinstance(config, EngineConfig):
        ports = [("bind", config.bind), ("events_bind", config.events_bind)]
        http = "" if config.metrics_port is None else config.metrics_host
        setting, needs = "metrics_host", "no keys guard /metrics: read it on this machine, or set insecure"
    else:
        ports = [("bind", config.bind)]
        guarded = config.api_keys_file is not None and config.tls_cert is not None
        http = "" if guarded else config.http_host
        setting, needs = "http_host", "needs api_keys_file, tls_cert and tls_key, or insecure"
    check_exposed(ports, secured=secured, insecure=config.insecure)
    if http and not config.insecure and not is_loopback(http):
        raise ConfigError(f"{setting} = {http!r} can be reached from other machines: {needs}")


def kind_of(file: Path) -> str:
    """ "router", "engine" or "router+engine": whose configuration a file is. Raises `ConfigError` if unclear."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    sections = [kind for kind in sorted(_KINDS, reverse=True) if isinstance(table.get(kind), dict)]
    if sections:
        return "+".join(sections)
    own = {kind: {field.name for field in msgspec.structs.fields(cls)} for kind, cls in _KINDS.items()}
    # Who knows more of its keys; a file that is empty or all shared keys goes by its name.
    score = {kind: len(names & table.keys()) for kind, names in own.items()}
    if score["router"] != score["engine"]:
        return max(score, key=lambda kind: score[kind])
    for kind in _KINDS:
        if kind in file.name:
            return kind
    unknown = ", ".join(sorted(table.keys() - own["router"] - own["engine"]))
    why = f" (neither knows {unknown})" if unknown else ""
    raise ConfigError(f"{file}: it is not clear whether this is a router's or an engine's{why}; say --kind")


def _show(
    kind: str, file: Path | None, *, changed: bool, as_json: bool, environ: Mapping[str, str] = os.environ
) -> int:
    try:
        found = explain_config(_KINDS[kind], file=file, environ=environ)
    except ConfigError as error:
        print(f"microserve config: error: {error.message}", file=sys.stderr)
        return 2
    if changed:
        found = [each for each in found if each.origin != "default"]
    if as_json:
        print(msgspec.json.encode([each._asdict() for each in found]).decode())
        return 0
    texts = [(each.key, _text(each.value), each.origin) for each in found]
    widths = [max((len(row[column]) for row in texts), default=0) for column in (0, 1)]
    for key, value, origin in texts:
        print(f"{key:{widths[0]}}  {value:{min(widths[1], 48)}}  {origin}")
    return 0


def _text(value: Any) -> str:
    return "-" if value is None else msgspec.json.encode(value).decode()
