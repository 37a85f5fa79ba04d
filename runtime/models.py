"""Which folder a model's name means: a bundled checkpoint, or a path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from microserve.runtime.errors import ConfigError

DEMO = "demo"


def bundled_models(root: Path | None = None) -> list[str]:
    """Names of the checkpoints that ship with the package."""
    root = _bundled_root() if root is None else root
    if not root.is_dir():
        return []
    return sorted(folder.name for folder in root.iterdir() if (folder / "config.json").is_file())


def resolve_model(name_or_path: str, *, root: Path | None = None, cache: Path | None = None) -> Path:
    """The checkpoint's folder: a bundled model's for its name, else the path itself.

    Where the package was installed without its demo checkpoint, "demo" becomes a small random one, made once below
    `cache` (default: the user's cache folder). Raises `ConfigError` that lists what there is.
    """
    root = _bundled_root() if root is None else root
    if (root / name_or_path / "config.json").is_file() and "/" not in name_or_path:
        return root / name_or_path
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is not a checkpoint: it has no config.json")
        return path.resolve()
    if name_or_path == DEMO:
        return _random_demo(_cache_root() if cache is None else cache)
    bundled = ", ".join(bundled_models(root)) or "none"
    raise ConfigError(f"no model {name_or_path!r}: no such folder, and not a bundled model (bundled: {bundled})")


def _bundled_root() -> Path:
    return Path(__file__).resolve().parent / "bundled"


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microserve"


def _random_demo(cache: Path) -> Path:
    # By the bundled model's name: the folder's name is what requests call it.
    folder = cache / "random" / DEMO
    if (folder / "config.json").is_file():
        return folder
    # Made beside its place and renamed: engines that start together never see half of it.
    partial = cache / "random" / f"{DEMO}.{os.getpid()}"
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "microserve.engine.model.random_checkpoint", str(partial), "--arch", "llama"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        last = (made.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"the bundled demo model is missing, and a random one could not be made: {last}")
    try:
        partial.rename(folder)
    except OSError:
        # Another engine was faster; its checkpoint is the same.
        shutil.rmtree(partial)
        if not (folder / "config.json").is_file():
            raise
    return folder
