"""The command `microserve`: finds the subcommand, and loads only that one."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import microserve

if TYPE_CHECKING:
    from collections.abc import Sequence

DAEMONS = {
    "engine": "run an engine: one model replica (this process becomes the daemon)",
    "router": "run a router: the OpenAI API and the bus in front of engines (likewise)",
}
COMMANDS = {
    "up": "run a router and engines on this machine, supervised",
    "chat": "chat with a served model in the terminal",
    "status": "show a router and its engines",
    "top": "watch and operate the fleet in the terminal",
    "engines": "show the engines, or one of them with its links and statistics",
    "requests": "show requests with what was asked of engines, and abort them",
    "strategy": "see and change, live, what composes requests",
    "cache": "see, pin, evict and move what engines have cached",
    "drain": "let engines finish what they have, and take nothing new",
    "resume": "let drained engines take work again",
    "events": "show what happened in the fleet",
    "doctor": "check this machine, the configuration and the fleet",
    "config": "check configuration files, and show what they say",
    "keys": "say who is let in, on the bus and over HTTP",
    "install-units": "install the systemd units",
}
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code. 2 stands for wrong usage or configuration, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in DAEMONS:
        become_daemon(arguments[0], arguments[1:])
    if arguments and arguments[0] in COMMANDS:
        command = import_module(f"microserve.tools.{arguments[0].replace('-', '_')}")
        try:
            return int(command.main(arguments[1:]))
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # The reader of our output has left (`microserve status | head`); nothing else may be written to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    if arguments and not arguments[0].startswith("-"):
        # Not what argparse would say: it names all, and not the one that is meant.
        near = difflib.get_close_matches(arguments[0], [*COMMANDS, *DAEMONS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join([*COMMANDS, *DAEMONS])}"
        parser().error(f"there is no command {arguments[0]!r}; {hint}")
    parser().parse_args(arguments)
    parser().print_help()
    return 2 if arguments else 0


def parser() -> argparse.ArgumentParser:
    """What `microserve --help` shows, and what refuses an unknown subcommand."""
    listing = "\n".join(f"  {name:14} {text}" for name, text in {**COMMANDS, **DAEMONS}.items())
    made = argparse.ArgumentParser(
        prog="microserve",
        description="Serve LLMs from engines that a programmable router composes.",
        epilog=f"commands:\n{listing}\n\n`microserve COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"microserve {microserve.__version__}")
    made.add_argument("command", nargs="?", choices=[*COMMANDS, *DAEMONS], metavar="COMMAND", help="see below")
    return made


def become_daemon(name: str, arguments: Sequence[str]) -> None:
    """Replace this process by the daemon: the command line loads nothing that a daemon needs, or the reverse."""
    if "--version" in arguments:
        print(f"microserve {name} {microserve.__version__}")
        sys.exit(0)
    # -P: what lies in the current directory is not imported.
    os.execv(sys.executable, [sys.executable, "-P", "-m", f"microserve.{name}", *arguments])


if __name__ == "__main__":
    sys.exit(main())
