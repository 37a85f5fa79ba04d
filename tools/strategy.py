"""`microserve strategy list|show|set|check|history|rollback`: what composes requests, seen and changed live."""

from __future__ import annotations

import argparse
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from microserve.runtime.client import Client
from microserve.tools.common import (
    CONNECT_TIMEOUT,
    CommandFailed,
    add_operator_options,
    command_parser,
    errors_told,
    print_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.messages import ActiveStrategy, SettingValue, Strategies, StrategySet

_EXAMPLES = """examples:
  microserve strategy list
  microserve strategy set balanced --set ratio=0.3
  microserve strategy set prefill_decode --share 0.1      a tenth; the rest stays with what serves most now
  microserve strategy check balanced --set ratio=2        validate only
  microserve strategy rollback
"""


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with (
            errors_told("strategy", arguments.router),
            Client(arguments.router, connect_timeout=CONNECT_TIMEOUT, key_file=arguments.key_file) as client,
        ):
            _act(client, arguments)
    except CommandFailed as failed:
        return failed.code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("strategy", "See and change, live, what composes requests.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    shared = argparse.ArgumentParser(add_help=False)
    add_operator_options(shared)
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--model", default="", help="served model (default: every model without a strategy of its own)")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=[shared], help="what can be chosen, with settings, and what is broken")
    actions.add_parser("show", parents=[shared], help="what serves now")
    actions.add_parser("history", parents=[shared], help="what served before")
    for name, text in (("set", "serve new requests by a strategy"), ("check", "validate without a change")):
        action = actions.add_parser(name, parents=[shared, which], help=text)
        action.add_argument("name", help="of the strategy")
        action.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            type=_setting,
            help="one of its settings, as `list` names them; may be repeated",
        )
        action.add_argument("--share", type=_share, default=1.0, help="part of the traffic, above 0 and at most 1")
    rollback = actions.add_parser("rollback", parents=[shared, which], help="back to what served before")
    rollback.add_argument("--to-before", dest="number", type=int, default=None, metavar="N", help="before change N")
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1 (0.1: a tenth of the traffic)")
    return share


def _setting(text: str) -> tuple[str, SettingValue]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    # As text: the router knows the setting's type, and converts.
    return name, value


def _act(client: Client, arguments: argparse.Namespace) -> None:
    match arguments.action:
        case "set" | "check":
            reply = client.set_strategy(
                arguments.name,
                dict(arguments.settings),
                model=arguments.model,
                share=arguments.share,
                dry_run=arguments.action == "check",
            )
            _show_set(reply, as_json=arguments.json)
        case "rollback":
            _show_set(client.rollback_strategy(model=arguments.model, number=arguments.number), as_json=arguments.json)
        case action:
            _show(action, client.strategies(), as_json=arguments.json)


def _show_set(reply: StrategySet, *, as_json: bool) -> None:
    if as_json:
        print_json({"active": reply.active, "dry_run": reply.dry_run})
        return
    if reply.dry_run:
        print("valid; nothing was changed. It would be:")
    _print_active(reply.active)


def _show(action: str, found: Strategies, *, as_json: bool) -> None:
    match action:
        case "show":
            if as_json:
                print_json(found.active)
            else:
                _print_active(found.active)
        case "history":
            if as_json:
                print_json(found.history)
                return
            for change in found.history:
                at = datetime.fromtimestamp(change.at, UTC)
                serves = ", ".join(f"{each.version} {each.share:.0%}" for each in change.active)
                print(
                    f"{change.number:4}  {at:%Y-%m-%d %H:%M:%S}Z  {change.model or '*':16}  {serves}  ({change.reason})"
                )
        case _:
            if as_json:
                print_json({"strategies": found.strategies, "active": found.active, "problems": found.problems})
            else:
                _print_list(found)


def _print_list(found: Strategies) -> None:
    serving = {each.name for each in found.active}
    for strategy in found.strategies:
        mark = "*" if strategy.name in serving else " "
        print(f"{mark} {strategy.name:24} {strategy.summary}  [{strategy.source}]")
        for setting in strategy.settings:
            bounds = f" ({setting.bounds})" if setting.bounds else ""
            print(f"      {setting.name}: {setting.type} = {setting.default}{bounds}")
    for problem in found.problems:
        print(f"! {problem}")


def _print_active(active: Sequence[ActiveStrategy]) -> None:
    for each in active:
        settings = " ".join(f"{name}={value}" for name, value in each.settings.items())
        print(f"{each.model or '*':16}  {each.share:4.0%}  {each.version}  {settings}".rstrip())
