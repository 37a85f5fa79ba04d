"""What the commands that talk to a router share: options, and how errors are told."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import microserve
from microserve.runtime.errors import MicroserveError, PeerLost

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        metavar="ENDPOINT",
        default=os.environ.get("MICROSERVE_ROUTER") or DEFAULT_ROUTER,
        help=f"the router's bus (default: $MICROSERVE_ROUTER, or {DEFAULT_ROUTER})",
    )


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """`--key-file`, for a bus that wants keys."""
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        default=os.environ.get("MICROSERVE_KEY_FILE") or None,
        help="who we are, where the bus wants keys (default: $MICROSERVE_KEY_FILE)",
    )


@contextmanager
def errors_told(command: str, endpoint: str) -> Iterator[None]:
    """Turn an expected error into one line on standard error and `CommandFailed`."""
    try:
        yield
    except MicroserveError as error:
        print(f"microserve {command}: {explain(error, endpoint)}", file=sys.stderr)
        raise CommandFailed(1) from error


def explain(error: MicroserveError, endpoint: str) -> str:
    """An error in words for whoever typed the command."""
    if isinstance(error, PeerLost) and error.message.startswith("no router answers"):
        return f"no router answers at {endpoint}; start one with `microserve up`"
    return error.message
