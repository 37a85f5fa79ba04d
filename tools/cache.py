"""`microserve cache list|match|pin|unpin|evict|migrate`: what engines have cached, and what becomes of it."""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import InternalError, InvalidRequest
from microserve.tools.common import (
    CommandFailed,
    add_operator_options,
    command_parser,
    confirm,
    counted,
    print_json,
    visible,
    with_router,
)
from microserve.tools.moves import migrate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import PrefixEntry

_EXAMPLES = """examples:
  microserve cache list gpu-a
  microserve cache match gpu-a --text 'You are a helpful assistant.'
  microserve cache pin gpu-a --file system-prompt.txt --ttl 86400
  microserve cache evict gpu-a --all --yes
  microserve cache migrate gpu-a gpu-b --tokens 1,15043,3186
"""
_MOST = 1000
_YEAR = 31_536_000
_BEGIN, _END = 32, 8
"""Tokens of a prefix that are spelled out: more of many long ones is work for a router that serves."""


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _act(parser, options)
    except CommandFailed as failed:
        return failed.code


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("cache", "See, pin, evict and move what engines have cached of prompts.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    shared = argparse.ArgumentParser(add_help=False)
    add_operator_options(shared)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", parents=[shared], help="the longest prefixes of an engine")
    listing.add_argument("engine", metavar="ENGINE", help="as `microserve engines` names it")
    listing.add_argument("--count", type=_count, default=20, metavar="N", help="so many (default: 20)")
    match = actions.add_parser("match", parents=[shared], help="how much of a prompt an engine has")
    pin = actions.add_parser("pin", parents=[shared], help="keep what an engine has of a prompt")
    pin.add_argument("--ttl", type=_ttl, default=3600.0, metavar="SECONDS", help="for so long (default: 3600)")
    unpin = actions.add_parser("unpin", parents=[shared], help="end the pin on a prompt")
    evict = actions.add_parser("evict", parents=[shared], help="free what nobody uses and nobody pinned")
    evict.add_argument("--yes", action="store_true", help="without asking")
    move = actions.add_parser("migrate", parents=[shared], help="copy a prompt's KV from one engine to another")
    move.add_argument("source", metavar="FROM", help="the engine that has it")
    move.add_argument("target", metavar="TO", help="the engine that gets it")
    for action in (match, pin, unpin, evict):
        action.add_argument("engine", metavar="ENGINE", help="as `microserve engines` names it")
    for action in (match, pin, unpin, evict, move):
        prompt = action.add_mutually_exclusive_group(required=True)
        prompt.add_argument("--text", metavar="TEXT", help="the prompt, as its model's tokenizer reads it")
        prompt.add_argument("--file", metavar="FILE", help="a file that holds it (-: standard input)")
        prompt.add_argument("--tokens", type=_tokens, metavar="ID,ID,...", help="its token ids")
        if action is evict:
            prompt.add_argument("--all", action="store_true", help="every prompt")
        action.add_argument(
            "--no-special-tokens", action="store_true", help="the text brings its own (as a rendered chat does)"
        )
    return parser


def _act(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.action == "list":
        return _list(options)
    text = _text(parser, options)
    match options.action:
        case "evict":
            what = "everything that nobody uses" if options.all else "this prompt"
            confirm(parser, f"Evict {what} from {visible(options.engine)}? Who needs it computes it.", yes=options.yes)
        case "migrate" if options.source == options.target:
            parser.error("FROM and TO are one engine")
    work = functools.partial(_migrate if options.action == "migrate" else _change, options=options, text=text)
    return with_router("cache", options, work)


# --- what a prompt is ----------------------------------------------------------------------------------------------


def _text(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str | None:
    """What `--text` or `--file` gives; None where neither is there."""
    text: str | None = options.text
    if options.file is not None:
        try:
            text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--file {options.file}: {error}")
    if text == "":
        parser.error("the prompt is empty")
    return text


async def _prompt(client: AsyncClient, options: argparse.Namespace, text: str | None, engine_id: str) -> list[int]:
    """Token ids, as the tokenizer of that engine's model makes them of a text."""
    if text is None:
        tokens: list[int] = options.tokens
        return tokens
    model = (await client.engine(engine_id).info()).info.model.name
    return await client.tokenize(text, model=model, add_special_tokens=not options.no_special_tokens)


def _tokens(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError("token ids are whole numbers with commas between them") from None
    if not ids or not all(0 <= each < 2**31 for each in ids):
        raise argparse.ArgumentTypeError("token ids are at least 0 and below 2**31, and one at least is needed")
    return ids


def _ttl(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _YEAR:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and at most {_YEAR}")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and {_MOST}")
    return int(text)


# --- actions -------------------------------------------------------------------------------------------------------


async def _change(client: AsyncClient, options: argparse.Namespace, text: str | None) -> int:
    """`match`, `pin`, `unpin` and `evict`. 1 when there was nothing to pin or to unpin."""
    name = options.engine
    engine = client.engine(name)
    prompt = [] if getattr(options, "all", False) else await _prompt(client, options, text, name)
    told: dict[str, object] = {"engine": name, "prompt_tokens": len(prompt)}
    code = 0
    match options.action:
        case "match":
            count = await engine.cache_match(prompt)
            told["matched_tokens"] = count
            words = f"{count:,} of {len(prompt):,} tokens are cached"
        case "pin":
            count = await engine.cache_pin(prompt, options.ttl)
            told |= {"pinned_tokens": count, "ttl": options.ttl}
            words = f"{count:,} of {len(prompt):,} tokens are pinned for {options.ttl:g} s"
            code = 0 if count else 1
        case "unpin":
            count = await engine.cache_unpin(prompt)
            told["unpinned_tokens"] = count
            words = f"{count:,} tokens are pinned no longer"
            code = 0 if count else 1
        case _:
            count = await engine.cache_evict(prompt or None)
            told["evicted_pages"] = count
            words = f"{counted(count, 'page')} freed"
    if options.json:
        print_json(told)
    elif code:
        print(f"microserve cache: {visible(name)}: nothing of that was {_WAS[options.action]}", file=sys.stderr)
    else:
        print(f"{visible(name)}: {words}")
    return code


_WAS = {"pin": "cached", "unpin": "pinned"}


async def _migrate(client: AsyncClient, options: argparse.Namespace, text: str | None) -> int:
    source, target = options.source, options.target
    prompt = await _prompt(client, options, text, source)
    page_size = (await client.engine(source).info()).info.layout.page_size
    # What is cached is whole pages: the rest would be computed and sent for nothing.
    whole = prompt[: len(prompt) // page_size * page_size]
    if not whole:
        raise InvalidRequest(f"{counted(len(prompt), 'token')} do not fill a page of {page_size}: nothing to move")
    moved = await migrate(client, source, target, whole)
    rate = moved.bytes / moved.seconds / 1e9 if moved.seconds else 0.0
    if options.json:
        print_json(
            {
                "source": source,
                "target": target,
                "prompt_tokens": len(prompt),
                "tokens": moved.tokens,
                "computed": moved.computed,
                "bytes": moved.bytes,
                "seconds": moved.seconds,
                "gigabytes_per_second": rate,
            }
        )
        return 0
    words = f"{moved.tokens:,} of {len(prompt):,} tokens are cached on {target} now"
    if moved.bytes:
        words += f"; {moved.bytes:,} bytes came from {source} in {moved.seconds:.3f} s ({rate:.2f} GB/s)"
        words += f", which computed {counted(moved.computed, 'token')} for it" if moved.computed else ""
    print(visible(words))
    return 0


# --- list ----------------------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    rows = with_router("cache", options, functools.partial(_prefixes, engine_id=options.engine, count=options.count))
    if options.json:
        print_json(
            [
                {
                    "tokens": len(entry.prompt) // 4,
                    "pages": entry.pages,
                    "references": entry.references,
                    "pinned": entry.pinned,
                    "prompt": unpack_tokens(entry.prompt).tolist(),
                    "begins": text,
                }
                for entry, text in rows
            ]
        )
        return 0
    # Imported here: JSON needs no tables.
    from microserve.tools.fleet_view import plain_table, table_console

    console = table_console()
    if not rows:
        console.print("nothing is cached")
        return 0
    table = plain_table("tokens>", "pages>", "references>", "pinned", "begins with")
    for entry, text in rows:
        begin = text if text is not None else f"ids {' '.join(map(str, unpack_tokens(entry.prompt[: 4 * _END])))} …"
        pinned = "pinned" if entry.pinned else ""
        cells = (f"{len(entry.prompt) // 4:,}", f"{entry.pages:,}", f"{entry.references:,}", pinned, visible(begin))
        table.add_row(*cells)
    console.print(table)
    return 0


async def _prefixes(client: AsyncClient, engine_id: str, count: int) -> list[tuple[PrefixEntry, str | None]]:
    """The longest prefixes, each with how its text begins; None where the model has no tokenizer."""
    engine = client.engine(engine_id)
    prefixes = await engine.cache_prefixes(count)
    if not prefixes:
        return []
    model = (await engine.info()).info.model.name

    async def spelled(entry: PrefixEntry) -> str | None:
        ids: list[int] = unpack_tokens(entry.prompt[: 4 * _BEGIN]).tolist()
        try:
            return await client.detokenize(ids, model=model)
        except (InvalidRequest, InternalError):
            # No tokenizer, or one that cannot be loaded; or ids that it does not have.
            return None

    return list(zip(prefixes, await asyncio.gather(*map(spelled, prefixes)), strict=True))
