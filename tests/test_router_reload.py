"""SIGHUP in a router: its strategies are read beside what it serves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.router_support import World
from tests.virtual_time import run_virtual

from microserve.router.reload import router_reload
from microserve.router.strategies.catalog import Catalog, Sources
from microserve.router.strategies.files import Problem
from microserve.runtime.errors import ConfigError
from microserve.runtime.settings import RouterConfig

if TYPE_CHECKING:
    from pathlib import Path


class Slow(Sources):
    """Read when the test says so."""

    def __init__(self) -> None:
        super().__init__(None)
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.broken: ConfigError | None = None

    async def read(self) -> Catalog:
        self.asked.set()
        await self.go.wait()
        if self.broken is not None:
            raise self.broken
        return Catalog({}, (Problem("mine.py", 3, "it is broken"),))


@pytest.mark.parametrize("broken", [False, True])
def test_nobody_waits_for_the_files_of_strategies(broken: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        async with World() as world:
            sources = Slow()
            sources.broken = ConfigError("the folder has gone") if broken else None
            world.core.versions.read_from(sources)
            router_reload(world.core, lambda: world.core.config, lambda config: None, lambda seconds: None)()
            await sources.asked.wait()
            assert [record.getMessage() for record in caplog.records] == ["configuration reloaded"]
            sources.go.set()
            await world.settle()

    run_virtual(main())
    told = [record.getMessage() for record in caplog.records][1:]
    good = ["strategy cannot be used", "strategies read again"]
    assert told == (["strategies cannot be read"] if broken else good)


def test_a_folder_that_is_none_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with World() as world:
            config = RouterConfig(strategy_folder=str(tmp_path / "nowhere"), max_active=9)
            reload = router_reload(world.core, lambda: config, lambda config: None, lambda seconds: None)
            with pytest.raises(ConfigError, match="nowhere is not a folder"):
                reload()
            assert world.core.config.max_active != 9

    run_virtual(main())
