"""An engine whose executor takes long to open: until something is written to a pipe. Run as a module, by tests.

python -m tests.slow_engine_child PIPE [flags of `microserve engine`]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.engine import daemon

if TYPE_CHECKING:
    from microserve.engine.executor import Executor
    from microserve.engine.progress import Progress
    from microserve.runtime.settings import EngineConfig


def main(pipe: Path, argv: list[str]) -> int:
    open_executor = daemon.open_executor

    def open_slowly(config: EngineConfig, progress: Progress) -> Executor:
        with progress.stage("loading weights") as report:
            report(40, 200)
            pipe.read_bytes()
        built = iter(range(1000))
        with progress.stage("compiling kernels", probe=lambda: next(built)):
            pipe.read_bytes()
        return open_executor(config, progress)

    daemon.open_executor = open_slowly  # type: ignore[assignment]
    return daemon.main(argv)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
