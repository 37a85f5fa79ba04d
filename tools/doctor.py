"""`microserve doctor`: this machine, its configuration and the fleet, and for whatever is wrong, what to do.

Needs no package to begin with: that one is missing is among the things that it is there to tell.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.tools.checks.machine import Machine
from microserve.tools.checks.running import Check, run_checks
from microserve.tools.checks.software import check_packages, check_python

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from microserve.tools.checks.finding import Finding

SECONDS = 5.0
_MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "red")}
_NAME_WIDTH = 14
_SCHEMES = ("tcp://", "ipc://")


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0 without problems, 1 with any."""
    try:
        from microserve.tools.checks.everything import Asked, every_check
        from microserve.tools.keys import default_folder
    except ImportError as error:
        return _without_packages(argv, error)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.router is not None and not options.router.startswith(_SCHEMES):
        parser.error(f"--router: {options.router!r} is no endpoint such as tcp://127.0.0.1:7700")
    if not options.timeout > 0:
        parser.error(f"--timeout: {options.timeout:g} is not above 0")
    machine = Machine(seconds=options.timeout)
    asked = Asked(options.router, options.key_file, options.config, default_folder())
    return tell(run_checks(every_check(machine, asked), machine.seconds), as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    from microserve.tools.common import DEFAULT_ROUTER, add_key_option, command_parser

    parser = command_parser("doctor", "Check this machine, the configuration and the fleet; say what to do.")
    parser.add_argument(
        "--router",
        metavar="ENDPOINT",
        default=os.environ.get("MICROSERVE_ROUTER") or None,
        help=f"the router's bus (default: $MICROSERVE_ROUTER; else those in the configuration; else {DEFAULT_ROUTER})",
    )
    add_key_option(parser)
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="configuration files (default: /etc/microserve/*.toml and ~/.config/microserve/*.toml)",
    )
    parser.add_argument(
        "--timeout", type=float, default=SECONDS, metavar="SECONDS", help=f"for each check (default: {SECONDS:g})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _without_packages(argv: Sequence[str], error: ImportError) -> int:
    """Something that every command needs is missing or broken: says what, by what Python itself can do."""
    print(f"microserve doctor: only Python and the packages are checked: {error}", file=sys.stderr)
    machine = Machine(seconds=SECONDS)
    checks = [Check("python", check_python), Check("packages", lambda: check_packages(machine))]
    tell(run_checks(checks, SECONDS), as_json="--json" in argv, terminal=False)
    return 1


def tell(found: Iterable[list[Finding]], *, as_json: bool, terminal: bool | None = None) -> int:
    """Prints findings as they come; the exit code."""
    if as_json:
        findings = [finding for some in found for finding in some]
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return _exit_code(findings)
    show = _painter() if sys.stdout.isatty() and terminal is not False else _print_plain
    findings = []
    for some in found:
        show(some)
        findings += some
    counts = Counter(finding.status for finding in findings)
    problems, notes = counts["problem"], counts["note"]
    named = f"{problems or 'no'} {'problem' if problems == 1 else 'problems'}"
    print(f"\n{named}, {notes} {'note' if notes == 1 else 'notes'}, {counts['ok']} ok")
    return _exit_code(findings)


def _exit_code(findings: Sequence[Finding]) -> int:
    return 1 if any(finding.status == "problem" for finding in findings) else 0


def _print_plain(findings: Iterable[Finding]) -> None:
    for each in findings:
        print(f"{each.status:8} {each.check:{_NAME_WIDTH}} {_visible(each.message)}", flush=True)
        if each.advice:
            print(f"{'':8} {'':{_NAME_WIDTH}} -> {_visible(each.advice)}", flush=True)


def _painter() -> Callable[[Iterable[Finding]], None]:
    """Prints for people; plainly where the library for it is missing."""
    try:
        from rich.console import Console
    except ImportError:
        return _print_plain
    # What is printed has names in it that others chose: they are no markup.
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    return lambda findings: _paint(console, findings)


def _paint(console: Console, findings: Iterable[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=1)
    table.add_column(width=_NAME_WIDTH, style="bold")
    table.add_column(ratio=1, overflow="fold")
    before = ""
    for each in findings:
        mark, style = _MARKS[each.status]
        text = Text(_visible(each.message), style if each.status == "problem" else "")
        if each.advice:
            text.append(f"\n→ {_visible(each.advice)}", "dim" if each.status == "note" else "bold")
        table.add_row(Text(mark, style), "" if each.check == before else each.check, text)
        before = each.check
    if table.row_count:
        console.print(table)


def _visible(text: str) -> str:
    """As `common.visible`, which needs packages."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
