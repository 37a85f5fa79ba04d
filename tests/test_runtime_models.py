"""Which folder a model's name means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from microserve.runtime.errors import ConfigError
from microserve.runtime.models import bundled_models, resolve_model


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_bundled_model_by_name(tmp_path: Path) -> None:
    demo = checkpoint(tmp_path / "demo")
    (tmp_path / "half-made").mkdir()
    assert bundled_models(tmp_path) == ["demo"]
    assert resolve_model("demo", root=tmp_path) == demo


def test_a_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine")
    assert resolve_model(str(folder), root=tmp_path / "none") == folder.resolve()


def test_an_unknown_model_lists_what_is_bundled(tmp_path: Path) -> None:
    checkpoint(tmp_path / "demo")
    with pytest.raises(ConfigError, match=r"no model 'llama': no such folder, .* \(bundled: demo\)"):
        resolve_model("llama", root=tmp_path)


def test_a_folder_without_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a checkpoint: it has no config\.json"):
        resolve_model(str(tmp_path), root=tmp_path / "none")


def test_a_missing_demo_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        made.append(command)
        checkpoint(Path(command[3]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    cache = tmp_path / "cache"
    first = resolve_model("demo", root=tmp_path / "none", cache=cache)
    assert first == cache / "random" / "demo"
    assert resolve_model("demo", root=tmp_path / "none", cache=cache) == first
    assert list((cache / "random").iterdir()) == [first]
    assert made[0][:3] == [sys.executable, "-m", "microserve.engine.model.random_checkpoint"]
    assert len(made) == 1


def test_engines_that_start_together_make_one_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "random" / "demo"

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        checkpoint(Path(command[3]))
        # Another process finishes first.
        checkpoint(folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert resolve_model("demo", root=tmp_path / "none", cache=tmp_path) == folder
    assert list((tmp_path / "random").iterdir()) == [folder]


def test_a_demo_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: disk full\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match="could not be made: OSError: disk full"):
        resolve_model("demo", root=tmp_path / "none", cache=tmp_path / "cache")
