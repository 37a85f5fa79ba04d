"""Draws `docs/pictures`: `microserve top` as it looks while a fleet works, exported by Textual itself.

    python -m perf.pictures [FOLDER]

A real router and three engines with the `fake` executor, as processes, under ten streams; strategies change meanwhile,
so that there are versions to compare. It takes a minute. The figures in the pictures are of that run, and no benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import Cluster

from microserve.runtime.async_client import AsyncClient
from microserve.tools.tui.app import TopApp
from microserve.tools.tui.live_table import LiveTable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from textual.pilot import Pilot

_SIZE = (120, 30)
_ENGINES = 3
_STREAMS = 10
_DOCUMENTS = (80, 96, 128, 192)
"""Tokens of what requests have in common."""
_FAKE = (
    *("--executor", "fake", "--model", "demo"),
    *("--fake-decode-base-us", "8000", "--fake-prefill-us-per-token", "100"),
)
_CHANGES: tuple[tuple[float, str, float], ...] = ((5.0, "prefill_decode", 1.0), (5.0, "balanced", 0.1), (20.0, "", 0.0))
"""Seconds to wait, and what is set then, for which share of requests."""


def main() -> int:
    """Draws the pictures into the folder of the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.pictures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/pictures"), help="(default: %(default)s)")
    folder: Path = parser.parse_args().folder
    with Cluster(engines=_ENGINES, engine_args=_FAKE) as cluster:
        pictures = asyncio.run(_draw(cluster.router))
    for name, picture in pictures.items():
        path = folder / f"{name}.svg"
        path.write_text(picture, encoding="utf-8")
        print(f"wrote {path}")
    return 0


async def _draw(bus: str) -> dict[str, str]:
    watching, asking = (AsyncClient(bus, connect_timeout=2.0) for _ in range(2))
    app = TopApp(watching, bus)
    try:
        async with _traffic(asking), app.run_test(size=_SIZE) as pilot:
            for seconds, strategy, share in _CHANGES:
                await pilot.pause(seconds)
                if strategy:
                    await asking.set_strategy(strategy, {}, share=share)
            return {
                "top-fleet": await _picture(pilot, "1", "engines", ()),
                # One that has ended, and that two engines worked for: its timeline has something to show.
                "top-requests": await _picture(pilot, "2", "requests", ("ok", "prefill_decode@")),
                "top-strategies": await _picture(pilot, "3", "choices", ()),
            }
    finally:
        await watching.close()
        await asking.close()


@contextlib.asynccontextmanager
async def _traffic(client: AsyncClient) -> AsyncIterator[None]:
    """Requests about a few documents, as many at a time as there are streams."""
    rng = random.Random(1)
    documents = [[rng.randrange(1000) for _ in range(size)] for size in _DOCUMENTS]

    async def stream() -> None:
        while True:
            prompt = [*rng.choice(documents), *(rng.randrange(1000) for _ in range(65))]
            await client.generate(prompt, max_tokens=rng.randrange(100, 300), ignore_eos=True)

    streams = [asyncio.create_task(stream()) for _ in range(_STREAMS)]
    try:
        yield
    finally:
        for each in streams:
            each.cancel()
        ended = await asyncio.gather(*streams, return_exceptions=True)
    if failed := [each for each in ended if not isinstance(each, asyncio.CancelledError)]:
        raise RuntimeError(f"requests failed: {failed[0]!r}")


async def _picture(pilot: Pilot[None], pane: str, table: str, wanted: tuple[str, ...]) -> str:
    """A pane a few looks after it was chosen, the cursor on the first row that has cells which begin as is wanted."""
    await pilot.press(pane)
    await pilot.pause(3.0)
    rows = pilot.app.query_one(f"#{table}", LiveTable)
    for index in range(rows.row_count):
        cells = [str(cell) for cell in rows.get_row_at(index)]
        if all(any(cell.startswith(word) for cell in cells) for word in wanted):
            rows.move_cursor(row=index)
            await pilot.pause(1.5)
            return pilot.app.export_screenshot(title="microserve top")
    raise LookupError(f"no row of {table} has {' and '.join(wanted)}")


if __name__ == "__main__":
    sys.exit(main())
