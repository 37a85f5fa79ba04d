"""Which settings of an engine change while it runs, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.runtime.reload import Reload

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.daemon import Engine
    from microserve.runtime.settings import EngineConfig


def engine_reload(
    engine: Engine,
    config: EngineConfig,
    read: Callable[[], EngineConfig],
    relog: Callable[[EngineConfig], object],
) -> Reload[EngineConfig]:
    """What SIGHUP does. `read` reads the configuration again, `relog` sets up logging as it says."""
    core = engine.core

    def limit_leases(config: EngineConfig) -> None:
        share, term, life = config.lease_share, config.lease_term, config.lease_life
        # Leases belong to the step thread.
        core.steps.command(lambda: core.receiving.leases.limit(share=share, term=term, life=life))

    def wait_for_kv(config: EngineConfig) -> None:
        core.kv.kv_wait = config.kv_wait

    def nothing(config: EngineConfig) -> None:
        """It is looked up in the configuration when it is needed."""

    live: dict[str, Callable[[EngineConfig], object]] = {
        "labels": lambda config: engine.label(config.labels),
        "kv_wait": wait_for_kv,
        "lease_term": limit_leases,
        "lease_life": limit_leases,
        "lease_share": limit_leases,
        "step_timeout": nothing,
        "drain_timeout": nothing,
        "log_level": nothing,
        "log_json": nothing,
    }

    def changed(config: EngineConfig) -> None:
        engine.configure(config)
        relog(config)

    return Reload(config, read, live, changed=changed)
