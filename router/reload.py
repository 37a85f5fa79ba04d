"""Which settings of a router change while it runs, and how."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.router.strategies.catalog import Sources
from microserve.runtime.errors import ConfigError
from microserve.runtime.log import get_logger
from microserve.runtime.reload import Reload

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.router.core import RouterCore
    from microserve.runtime.settings import RouterConfig

_HINT = "it takes a restart, or now: microserve strategy set"

_log = get_logger(__name__)


def router_reload(
    core: RouterCore,
    read: Callable[[], RouterConfig],
    relog: Callable[[RouterConfig], object],
    keep_alive: Callable[[float], object],
) -> Reload[RouterConfig]:
    """What SIGHUP does. `read` reads the configuration again, `relog` sets up logging as it says, and `keep_alive` is
    given the seconds that an idle connection stays open."""

    def nothing(config: RouterConfig) -> None:
        """It is looked up in the configuration when it is needed."""

    reading: set[asyncio.Task[None]] = set()

    def check(config: RouterConfig) -> None:
        """Raises `ConfigError` for a folder that is none. What is in it is told of later."""
        if config.strategy_folder and not Path(config.strategy_folder).is_dir():
            raise ConfigError(f"strategy folder {config.strategy_folder} is not a folder")

    def look_there(config: RouterConfig) -> None:
        core.versions.read_from(Sources(Path(config.strategy_folder) if config.strategy_folder else None))

    async def read_strategies() -> None:
        """Whether the folder is another or not; files that have not changed are not run again."""
        try:
            catalog = await core.versions.read()
        except ConfigError as error:
            _log.error("strategies cannot be read", error=error.message)
            return
        for problem in catalog.problems:
            _log.error("strategy cannot be used", problem=str(problem))
        _log.info("strategies read again", usable=len(catalog.strategies), problems=len(catalog.problems))

    live: dict[str, Callable[[RouterConfig], object]] = {
        "max_active": nothing,
        "max_queued": nothing,
        "queue_timeout": nothing,
        "request_timeout": nothing,
        "drain_timeout": nothing,
        "engine_silence": lambda config: core.roster.limit(silence=config.engine_silence),
        "strategy_folder": look_there,
        "keep_alive": lambda config: keep_alive(config.keep_alive),
        "log_level": nothing,
        "log_json": nothing,
    }

    def changed(config: RouterConfig) -> None:
        core.configure(config)
        relog(config)
        # Not waited for: the router serves meanwhile.
        task = asyncio.get_running_loop().create_task(read_strategies(), name="read strategies")
        reading.add(task)
        task.add_done_callback(reading.discard)

    hints = {"strategy": _HINT, "strategy_settings": _HINT}
    return Reload(core.config, read, live, check=check, hints=hints, changed=changed)
