"""What the commands that talk to a router share: options, and how errors are told."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import microserve
from microserve.runtime.errors import ConfigError, MicroserveError, PeerLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from microserve.runtime.async_client import AsyncClient

T = TypeVar("T")

DEFAULT_ROUTER = "tcp://127.0.0.1:7700"
CONNECT_TIMEOUT = 2.0
"""Seconds that a command waits for a router to answer."""


class CommandFailed(Exception):
    """The command ends now, with this exit code; what there was to say has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A subcommand's parser, with `--version`."""
    parser = argparse.ArgumentParser(prog=f"microserve {name}", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"microserve {microserve.__version__}")
    return parser


def add_router_option(parser: argparse.ArgumentParser) -> None:
    """`--router`, whose default the environment may set."""
    parser.add_argument(
        "--router",
        type=_endpoint,
        metavar="ENDPOINT",
        default=os.environ.get("MICROSERVE_ROUTER") or DEFAULT_ROUTER,
        help=f"the router's bus (default: $MICROSERVE_ROUTER, or {DEFAULT_ROUTER})",
    )


def _endpoint(text: str) -> str:
    scheme, separator, address = text.partition("://")
    if scheme == "ipc" and address:
        return text
    host, _, port = address.rpartition(":")
    if not separator or scheme != "tcp" or not host or not port.isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the address of a router's bus, which is like {DEFAULT_ROUTER} (HTTP has another port)"
        )
    return text


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """`--key-file`, for a bus that wants keys."""
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        default=os.environ.get("MICROSERVE_KEY_FILE") or None,
        help="who we are, where the bus wants keys (default: $MICROSERVE_KEY_FILE)",
    )


def add_operator_options(parser: argparse.ArgumentParser) -> None:
    """`--router`, `--key-file` and `--json`: what every command has that looks at a fleet or operates it."""
    add_router_option(parser)
    add_key_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def with_router(command: str, options: argparse.Namespace, work: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
    """What `work` gives, done with a client of the router. Raises `CommandFailed`: the error has been told then."""
    # Imported here: help needs no client.
    from microserve.runtime.async_client import AsyncClient

    async def main() -> T:
        client = AsyncClient(options.router, connect_timeout=CONNECT_TIMEOUT, key_file=options.key_file)
        try:
            return await work(client)
        finally:
            await client.close()

    with errors_told(command, options.router):
        return asyncio.run(main())


def config_home(home: Path | None = None, named: str | None = None) -> Path:
    """Where a user's configuration is: $XDG_CONFIG_HOME (`named`), as systemd has it, or ~/.config."""
    named = os.environ.get("XDG_CONFIG_HOME", "") if named is None else named
    # A relative one is nobody's: the specification has it ignored.
    return Path(named) if os.path.isabs(named) else (home or Path.home()) / ".config"


def confirm(parser: argparse.ArgumentParser, question: str, *, yes: bool) -> None:
    """Ask before something is destroyed, unless `yes`. Raises `CommandFailed` when it is not wanted.

    To be called outside of an event loop: Ctrl-C must end the question, too.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        parser.error("there is nobody to ask: say --yes")
    # Not on standard output, which may be a file, or JSON.
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        print("nothing was done", file=sys.stderr)
        raise CommandFailed(1)


def print_json(value: object) -> None:
    """With every field: who reads JSON must not have to know the defaults."""
    print(json.dumps(plain(value), indent=2))


def plain(value: Any) -> Any:
    """Messages as what JSON knows. Epochs are text, as logs and metrics have them: who searches for one finds it."""
    if isinstance(value, msgspec.Struct):
        return {
            name: f"{each:x}" if name.endswith("epoch") and isinstance(each, int) else plain(each)
            for name, each in msgspec.structs.asdict(value).items()
        }
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


def visible(text: str) -> str:
    """Text of others for a terminal, in one line: what a terminal would obey is written out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 request", "1,200 requests"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def errors_told(command: str, endpoint: str) -> Iterator[None]:
    """Turn an expected error into one line on standard error and `CommandFailed`: 2 for our configuration, else 1."""
    try:
        yield
    except MicroserveError as error:
        print(f"microserve {command}: {explain(error, endpoint)}", file=sys.stderr)
        raise CommandFailed(2 if isinstance(error, ConfigError) else 1) from error


def explain(error: MicroserveError, endpoint: str) -> str:
    """An error in words for whoever typed the command."""
    if isinstance(error, PeerLost) and error.message.startswith("no router answers"):
        return f"no router answers at {endpoint}; start one with `microserve up`"
    return error.message
