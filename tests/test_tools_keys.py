"""`microserve keys`: what it writes and says. What keys do on the bus is in test_runtime_keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.keys import read_identity
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools import keys
from microserve.tools.keys import main

if TYPE_CHECKING:
    import pytest


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    capsys.readouterr()
    assert main(["list", "--folder", str(folder), "--json"]) == 0
    return [(each["name"], each["role"]) for each in json.loads(capsys.readouterr().out)]


def test_new_list_authorize_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    place = ["--folder", str(folder)]
    assert main(["new", "router-0", "--role", "router", *place]) == 0
    assert main(["new", "me", "--role", "client", *place]) == 0
    secret = read_identity(folder / "me.key").secret
    assert secret not in capsys.readouterr().out
    public, _ = new_key_pair()
    assert main(["authorize", "guest", public, "--role", "admin", *place]) == 0
    assert listed(folder, capsys) == [("router-0", "router"), ("me", "client"), ("guest", "admin")]
    assert main(["revoke", "me", *place]) == 0
    assert listed(folder, capsys) == [("router-0", "router"), ("guest", "admin")]
    assert (folder / "me.key").exists()


def test_people_see_names_and_public_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["new", "me", "--role", "client", "--folder", str(tmp_path)])
    public = read_identity(tmp_path / "me.key").public
    capsys.readouterr()
    assert main(["list", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"me  client  {public}\n"


def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--folder", str(tmp_path)]
    assert main(["list", *place]) == 2
    assert "authorized.toml" in capsys.readouterr().err
    assert main(["new", "a/b", "--role", "client", *place]) == 2
    assert main(["new", "me", "--role", "client", *place]) == 0
    assert main(["revoke", "nobody", *place]) == 1
    assert "'nobody' is not authorized" in capsys.readouterr().err
    assert main(["authorize", "x", "short", "--role", "client", *place]) == 2


def test_the_folder_is_the_systems_for_root_and_ones_own_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert keys.default_folder() == Path("/etc/microserve/keys")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert keys.default_folder() == Path.home() / ".config/microserve/keys"
