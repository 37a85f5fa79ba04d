"""An engine process, as `python -m microserve.engine` is one, that a test can also ask what its pages hold.

    python -m tests.engine_child --control SOCKET [--page-kib N] ENGINE-ARGUMENTS…

On the Unix socket it answers lines of JSON: {"prompt": [ids]} with a digest of each page that the prefix tree holds of
that prompt, {"pages": [numbers]} with the digests of those pages of the pool.

`--page-kib` gives the pages of the fake executor that size, so that pushing them takes time. What they hold beyond
their tokens' KV is never looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import hashlib
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from microserve.engine import daemon
from microserve.engine.fake_executor import FakeExecutor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.engine.executor import Executor
    from microserve.engine.transfers import Push
    from microserve.kv.transfer.base import KvMemory


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--control", required=True)
    parser.add_argument("--page-kib", type=int, default=0)
    ours, rest = parser.parse_known_args(argv)
    opened: list[KvMemory] = []
    open_executor = daemon.open_executor

    def open_ours(config: Any, progress: Any) -> Executor:
        executor = open_executor(config, progress)
        if ours.page_kib and isinstance(executor, FakeExecutor):
            executor.pool = np.zeros((executor.total_pages, ours.page_kib * 128), dtype=np.uint64)
        opened.append(executor.memory)
        return executor

    class Engine(daemon.Engine):
        """Answers on the control socket while it serves."""

        async def start(self) -> None:
            await super().start()
            self._pushed: list[int] = []
            if (transfers := self.core.transfers) is not None:
                push = transfers.push

                def push_and_note(order: Push) -> None:
                    self._pushed += order.source.tolist()
                    push(order)

                transfers.push = push_and_note  # type: ignore[method-assign]
            self._control = await asyncio.start_unix_server(self._serve, ours.control, limit=1 << 24)

        async def stop(self) -> None:
            self._control.close()
            await super().stop()

        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                question = json.loads(line)
                answered: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
                self.core.steps.ask(lambda: self._digests(question), answered.set_result)  # noqa: B023
                writer.write(json.dumps(await answered).encode() + b"\n")
            writer.close()

        def _digests(self, question: dict[str, list[int]]) -> list[str]:
            """In the step thread."""
            if "pushed" in question:
                pages, self._pushed = self._pushed, []
            elif "pages" in question:
                pages = question["pages"]
            else:
                pages = self.core.cache.match(np.array(question["prompt"], dtype=np.int32)).pages.tolist()
            memory = opened[0]
            size = memory.page_bytes
            return [hashlib.blake2b(ctypes.string_at(memory.address + page * size, size)).hexdigest() for page in pages]

    daemon.open_executor = open_ours  # type: ignore[assignment]
    daemon.Engine = Engine  # type: ignore[misc]
    return daemon.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
