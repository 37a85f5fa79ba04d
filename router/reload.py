"""Which settings of a router change while it runs, and how."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.router.strategies.catalog import StrategyFolder, load_catalog
from microserve.runtime.log import get_logger
from microserve.runtime.reload import Reload

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.router.core import RouterCore
    from microserve.router.strategies.catalog import Catalog
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

    elsewhere: Callable[[], Catalog] = core.versions.read

    def check(config: RouterConfig) -> None:
        """Reads the strategies again, whether the folder is another or not: files that have not changed are not run
        again. Raises `ConfigError` when it cannot be read."""
        nonlocal elsewhere
        elsewhere = core.versions.read
        if config.strategy_folder != core.config.strategy_folder:
            folder = Path(config.strategy_folder) if config.strategy_folder else None
            elsewhere = partial(load_catalog, folder and StrategyFolder(folder))
        catalog = elsewhere()
        for problem in catalog.problems:
            _log.error("strategy cannot be used", problem=str(problem))
        _log.info("strategies read again", usable=len(catalog.strategies), problems=len(catalog.problems))

    def look_there(config: RouterConfig) -> None:
        core.versions.read_from(elsewhere)

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

    hints = {"strategy": _HINT, "strategy_settings": _HINT}
    return Reload(core.config, read, live, check=check, hints=hints, changed=changed)
