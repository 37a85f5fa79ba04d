"""`microserve resume ENGINE...`: drained engines take work again."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from microserve.tools.common import (
    CommandFailed,
    add_operator_options,
    command_parser,
    print_json,
    visible,
    with_router,
)
from microserve.tools.engines import named_engines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.async_client import AsyncClient


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = command_parser("resume", "Let drained engines take work again.")
    parser.add_argument("engines", nargs="+", metavar="ENGINE", help="their ids")
    add_operator_options(parser)
    options = parser.parse_args(argv)
    names = list(dict.fromkeys(options.engines))
    try:
        states = with_router("resume", options, functools.partial(resume, names=names))
    except CommandFailed as failed:
        return failed.code
    if options.json:
        print_json([{"engine": name, "state": state} for name, state in states.items()])
    else:
        for name, state in states.items():
            print(f"{visible(name)}: {state}")
    return 0


async def resume(client: AsyncClient, names: Sequence[str]) -> dict[str, str]:
    """Resumes engines; their states then. Raises `NotFound` before anything is changed."""
    named_engines(await client.status(), names)

    async def one(name: str) -> str:
        engine = client.engine(name)
        await engine.resume()
        return (await engine.info()).load.state

    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))
