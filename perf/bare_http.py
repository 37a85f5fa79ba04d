"""A bare Starlette endpoint that streams recorded events: what the router is held against.

    python -m perf.bare_http EVENTS.json

EVENTS.json: {"path to be served": {"events": [text, …], "pause": seconds between two events}}. The endpoint reads the
request's JSON, as any endpoint would, and streams through `StreamingResponse` over an async generator. The port is the
first line of standard output.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request


def make_app(recorded: dict[str, Any]) -> Starlette:
    """The application; its only work is to send what was recorded."""

    async def stream(request: Request) -> Response:
        asked = await request.json()
        entry = recorded[asked["user"]]

        async def events() -> AsyncIterator[bytes]:
            pause = entry["pause"]
            for event in entry["events"]:
                if pause:
                    await asyncio.sleep(pause)
                yield event

        return StreamingResponse(events(), media_type="text/event-stream")

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok")

    return Starlette(routes=[Route("/v1/completions", stream, methods=["POST"]), Route("/health", health)])


def main() -> None:
    recorded = json.loads(Path(sys.argv[1]).read_text())
    for entry in recorded.values():
        entry["events"] = [event.encode() for event in entry["events"]]
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(
        make_app(recorded),
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
    )
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
