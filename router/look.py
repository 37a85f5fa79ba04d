"""`python -m microserve.router.look FILE`: what a router would refuse when it starts with that file, as JSON.

For `microserve config check`, which loads nothing of a router: its findings are the last line.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import msgspec

from microserve.router.strategies.catalog import load_catalog
from microserve.router.tls import load_certificate
from microserve.runtime.api_keys import ApiKeys
from microserve.runtime.config import RouterConfig, load_config
from microserve.runtime.errors import ConfigError, InvalidRequest
from microserve.runtime.look import Seen


def look(config: RouterConfig, seen: Seen) -> None:
    """API keys, the certificate, the strategy with its settings."""
    with seen.told():
        if config.api_keys_file is not None:
            ApiKeys(Path(config.api_keys_file))
    with seen.told():
        load_certificate(config)
    folder = None if config.strategy_folder is None else Path(config.strategy_folder)
    if folder is not None and (why := _left_alone(folder)):
        seen.warnings.append(f"strategy_folder: {why}; strategies were not looked at")
        return
    with seen.told():
        catalog = load_catalog(folder)
        # The router tells of these in its log, and starts.
        seen.warnings += map(str, catalog.problems)
        try:
            catalog.get(config.strategy).configure(config.strategy_settings)
        except InvalidRequest as error:
            raise ConfigError(f"strategy_settings: {error.message}") from error


def _left_alone(folder: Path) -> str:
    """Why the files of a folder are not run here, or nothing."""
    try:
        files = [folder, *folder.glob("*.py")] if folder.is_dir() else []
        closed = next((each for each in files if not os.access(each, os.R_OK)), None)
        owners = [each for each in files if each.stat().st_uid or each.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    except PermissionError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    if closed is not None:
        return f"{closed} may not be read by this user"
    # The router runs them as its own user, who could otherwise have root do what he may not.
    return f"root does not run {owners[0]}, which others may change" if os.geteuid() == 0 and owners else ""


def main() -> int:
    """Looks at the file of the command line."""
    seen = Seen()
    with seen.told():
        look(load_config(RouterConfig, file=Path(sys.argv[1])), seen)
    print(f"\n{msgspec.json.encode(seen).decode()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
