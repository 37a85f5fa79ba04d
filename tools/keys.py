"""`microserve keys new|list|authorize|revoke|api`: who is let in on the bus of a fleet, and on a router's HTTP.

The folder (default: /etc/microserve/keys for root, ~/.config/microserve/keys for others) belongs to the fleet: copy a
daemon its own key file and authorized.toml, a person their key file alone. Daemons read authorized.toml again when it
changes; revoking a key ends its sessions.

`microserve keys api new|list|revoke` does the same for HTTP: its keys are in api_keys.toml (a router's api_keys_file),
as digests. A new key is printed once, on standard output alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from microserve.runtime.api_keys import API_KEYS_FILE, SCOPES, new_api_key, read_api_keys, revoke_api_key
from microserve.runtime.errors import ConfigError
from microserve.runtime.keys import (
    AUTHORIZED_FILE,
    DAEMONS,
    KEY_LENGTH,
    ROLES,
    authorize,
    new_identity,
    read_authorized,
    read_identity,
    revoke,
)
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools.common import CommandFailed, command_parser, config_home, confirm

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = _parser()
    arguments = parser.parse_args(_shielded(argv))
    folder: Path = arguments.folder or default_folder()
    try:
        if arguments.action in ("list", "revoke") and not os.path.exists(folder):
            raise ConfigError(f"there is no folder {folder}: `microserve keys new` makes one, --folder names another")
        match arguments.action:
            case "new":
                _new(folder, arguments)
            case "list":
                _list(folder, as_json=arguments.json)
            case "api":
                return _api(parser, arguments.file or folder / API_KEYS_FILE, arguments)
            case "authorize":
                _authorize(folder, arguments)
            case _:
                return _revoke(parser, folder, arguments)
    except ConfigError as error:
        print(f"microserve keys: error: {error.message}", file=sys.stderr)
        return 2
    except CommandFailed as failed:
        return failed.code
    return 0


def _shielded(argv: Sequence[str]) -> list[str]:
    """A public key may begin with a dash, and is no option then: it goes behind `--`."""
    if argv[:1] != ["authorize"] or "--" in argv:
        return list(argv)
    keys = [
        each
        for each in argv
        if each.startswith("-") and len(each) == KEY_LENGTH and not each.startswith(("--folder=", "--role="))
    ]
    return [each for each in argv if each not in keys] + (["--", *keys] if keys else [])


def default_folder() -> Path:
    """Where a fleet's keys are, unless told otherwise."""
    return Path("/etc/microserve/keys") if os.geteuid() == 0 else config_home() / "microserve/keys"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("keys", __doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=Path, default=None, metavar="DIR", help="the fleet's folder of keys")
    shared.add_argument("--json", action="store_true", help="machine-readable")
    actions = parser.add_subparsers(dest="action", required=True, metavar="new | list | authorize | revoke | api")
    new = actions.add_parser("new", parents=[shared], help="make a key and let it in")
    actions.add_parser("list", parents=[shared], help="show who is let in")
    letting = actions.add_parser("authorize", parents=[shared], help="let a public key in that was made elsewhere")
    ending = actions.add_parser("revoke", parents=[shared], help="let a name in no longer, and end its sessions")
    for each in (new, letting, ending):
        each.add_argument("name", help="of the process or person; a daemon's is its engine_id or router_id")
    for each in (new, letting):
        each.add_argument(
            "--role",
            choices=ROLES,
            required=True,
            help="engine and router: daemons; client: requests; admin: everything",
        )
    letting.add_argument("public", help="the public key: 40 characters")
    ending.add_argument("--yes", action="store_true", help="without asking")
    _add_api(actions.add_parser("api", help="keys for HTTP"))
    return parser


def _add_api(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(folder=None)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=Path, default=None, metavar="DIR", help="the fleet's folder of keys")
    shared.add_argument("--json", action="store_true", help="machine-readable")
    shared.add_argument(
        "--file", type=Path, default=None, metavar="FILE", help=f"default: {API_KEYS_FILE} in the folder"
    )
    actions = parser.add_subparsers(dest="api_action", required=True, metavar="new | list | revoke")
    new = actions.add_parser("new", parents=[shared], help="make a key, let it in, and print it")
    new.add_argument("--scope", choices=SCOPES, required=True, help="serve: requests and looks; admin: everything")
    actions.add_parser("list", parents=[shared], help="show who is let in")
    ending = actions.add_parser("revoke", parents=[shared], help="let a name in no longer, and end what it has running")
    for each in (new, ending):
        each.add_argument("name", help="of the person or program")
    ending.add_argument("--yes", action="store_true", help="without asking")


def _api(parser: argparse.ArgumentParser, path: Path, arguments: argparse.Namespace) -> int:
    name: str = arguments.name if arguments.api_action != "list" else ""
    match arguments.api_action:
        case "new":
            key = new_api_key(path, name, arguments.scope)
            if not arguments.json:
                print(f"{name}, scope {arguments.scope}, in {path}; its key is shown this once:", file=sys.stderr)
            _say(arguments, key, name=name, scope=arguments.scope, id=key.split("_")[1], key=key, api_keys_file=path)
        case "list":
            found = read_api_keys(path)
            if arguments.json:
                # Digests are nobody's business.
                print(json.dumps([{"name": each.name, "scope": each.scope, "id": each.id} for each in found]))
                return 0
            width = max((len(each.name) for each in found), default=0)
            for each in found:
                print(f"{each.name:{width}}  {each.scope:5}  ms_{each.id}_…")
        case _:
            if any(each.name == name for each in read_api_keys(path)):
                confirm(parser, f"Revoke the API key of {name}? What it has running ends.", yes=arguments.yes)
            if not revoke_api_key(path, name):
                print(f"microserve keys: error: {name!r} has no API key in {path}", file=sys.stderr)
                return 1
            said = f"{name} is let in no longer; routers that read {path} end what it has running"
            _say(arguments, said, name=name, api_keys_file=path)
    return 0


def _revoke(parser: argparse.ArgumentParser, folder: Path, arguments: argparse.Namespace) -> int:
    name: str = arguments.name
    if any(each.name == name for each in read_authorized(folder / AUTHORIZED_FILE)):
        confirm(parser, f"Revoke the key of {name}? Its sessions end.", yes=arguments.yes)
    if not revoke(folder, name):
        print(f"microserve keys: error: {name!r} is not authorized in {folder}", file=sys.stderr)
        return 1
    said = f"{name} is let in no longer; daemons that read {folder} end its sessions"
    _say(arguments, said, name=name, authorized_file=folder / AUTHORIZED_FILE)
    return 0


def _authorize(folder: Path, arguments: argparse.Namespace) -> None:
    name, role, public = arguments.name, arguments.role, arguments.public
    authorize(folder, name, role, public)
    path = folder / AUTHORIZED_FILE
    _say(arguments, f"{name} is let in as {role} ({path})", name=name, role=role, public=public, authorized_file=path)


def _say(arguments: argparse.Namespace, words: str, **facts: object) -> None:
    """What was done: in words, or its facts as JSON."""
    print(json.dumps({key: str(value) for key, value in facts.items()}) if arguments.json else words)


def _new(folder: Path, arguments: argparse.Namespace) -> None:
    name, role = arguments.name, arguments.role
    path, authorized = new_identity(folder, name, role, new_key_pair), folder / AUTHORIZED_FILE
    if role in DAEMONS:
        following = f'key_file = "{path}" in its configuration; authorized.toml stands beside it'
    else:
        following = f"give {path} to {name}: MICROSERVE_KEY_FILE={path}, or --key-file"
    words = f"wrote   {path}  (a secret: mode 0600)\nlet in  {name} as {role}  ({authorized})\nnext    {following}"
    public = read_identity(path).public
    _say(arguments, words, name=name, role=role, public=public, key_file=path, authorized_file=authorized)


def _list(folder: Path, *, as_json: bool) -> None:
    found = read_authorized(folder / AUTHORIZED_FILE)
    if as_json:
        print(msgspec.json.encode(found).decode())
        return
    width = max((len(each.name) for each in found), default=0)
    for each in found:
        print(f"{each.name:{width}}  {each.role:6}  {each.public}")
