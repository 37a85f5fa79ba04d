"""`microserve keys`: what it writes and says. What keys do on the bus is in test_runtime_keys."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from microserve.runtime.api_keys import ApiKeys
from microserve.runtime.keys import read_authorized, read_identity
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools import keys
from microserve.tools.keys import main


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
    assert main(["revoke", "me", "--yes", *place]) == 0
    assert listed(folder, capsys) == [("router-0", "router"), ("guest", "admin")]
    assert (folder / "me.key").exists()


@pytest.mark.parametrize("folder", ["keys", "k" * 31, "=" * 20])
def test_a_public_key_may_look_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """One in 85 does."""
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    found: list[tuple[str, str]] = []
    for public in ("-" + "a" * 39, "--" + "b=" * 19, "-" + "=" * 39):
        for place in ([f"--folder={folder}"], ["--folder", folder]):
            name = f"guest-{len(found)}"
            assert main(["authorize", name, public, "--role", "client", *place]) == 0
            found.append((name, public))
            public = public[:-1] + "2"  # a key has one name
    assert [(each.name, each.public) for each in read_authorized(Path(folder) / "authorized.toml")] == found


def test_people_see_names_and_public_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["new", "me", "--role", "client", "--folder", str(tmp_path)])
    public = read_identity(tmp_path / "me.key").public
    capsys.readouterr()
    assert main(["list", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"me  client  {public}\n"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON of a command that goes well, and has nothing else to say."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_json_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, ring, keys_of_http = ("--folder", str(tmp_path)), tmp_path / "authorized.toml", tmp_path / "api_keys.toml"
    made = said(capsys, "new", "me", "--role", "client", *place)
    assert made == {
        "name": "me",
        "role": "client",
        "public": read_identity(tmp_path / "me.key").public,
        "key_file": str(tmp_path / "me.key"),
        "authorized_file": str(ring),
    }
    public, _ = new_key_pair()
    assert said(capsys, "authorize", "guest", public, "--role", "admin", *place) == {
        "name": "guest",
        "role": "admin",
        "public": public,
        "authorized_file": str(ring),
    }
    assert said(capsys, "revoke", "me", "--yes", *place) == {"name": "me", "authorized_file": str(ring)}
    made = said(capsys, "api", "new", "ann", "--scope", "serve", *place)
    found = ApiKeys(keys_of_http).check(made["key"])
    assert made == {
        "name": "ann",
        "scope": "serve",
        "id": found.id,
        "key": made["key"],
        "api_keys_file": str(keys_of_http),
    }
    assert said(capsys, "api", "revoke", "ann", "--yes", *place) == {"name": "ann", "api_keys_file": str(keys_of_http)}


@pytest.mark.parametrize(
    ("kind", "question"),
    [
        ([], "Revoke the key of me? Its sessions end. [y/N] "),
        (["api"], "Revoke the API key of me? What it has running ends. [y/N] "),
    ],
)
def test_revoking_asks_first(
    kind: list[str], question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--folder", str(tmp_path)]
    assert main([*kind, "new", "me", *(["--scope", "serve"] if kind else ["--role", "client"]), *place]) == 0

    def left() -> list[str]:
        return [each["name"] for each in said(capsys, *kind, "list", *place)]

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(SystemExit, match="2"):
        main([*kind, "revoke", "me", *place])
    assert "there is nobody to ask: say --yes" in capsys.readouterr().err
    for answer, code, kept in (("n\n", 1, ["me"]), ("", 1, ["me"]), ("y\n", 0, [])):
        terminal = io.StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main([*kind, "revoke", "me", *place]) == code
        assert capsys.readouterr().err == question + ("nothing was done\n" if code else "")
        assert left() == kept
    # Of whom nobody knows nobody is asked.
    assert main([*kind, "revoke", "me", *place]) == 1
    assert question not in capsys.readouterr().err


def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--folder", str(tmp_path)]
    assert main(["list", *place]) == 2
    assert "authorized.toml" in capsys.readouterr().err
    for action in (["list"], ["revoke", "me"]):
        assert main([*action, "--folder", str(tmp_path / "none")]) == 2
        assert f"there is no folder {tmp_path / 'none'}: `microserve keys new` makes one" in capsys.readouterr().err
    assert main(["new", "a/b", "--role", "client", *place]) == 2
    assert main(["new", "me", "--role", "client", *place]) == 0
    assert main(["revoke", "nobody", *place]) == 1
    assert "'nobody' is not authorized" in capsys.readouterr().err
    assert main(["authorize", "x", "short", "--role", "client", *place]) == 2


# --- keys for HTTP -------------------------------------------------------------------------------------------------


def test_a_key_for_http_is_printed_once_on_standard_output_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--folder", str(tmp_path)]
    assert main(["api", "new", "ann", "--scope", "serve", *place]) == 0
    said = capsys.readouterr()
    key = said.out.removesuffix("\n")
    assert (key.count("\n"), key.startswith("ms_")) == (0, True)
    secret = key.split("_", 2)[2]
    assert secret not in said.err
    found = ApiKeys(tmp_path / "api_keys.toml").check(key)
    assert (found.name, found.scope) == ("ann", "serve")
    for listing in (["api", "list"], ["api", "list", "--json"]):
        assert main([*listing, *place]) == 0
        shown = capsys.readouterr().out
        assert "ann" in shown
        assert secret not in shown
        assert found.digest not in shown


def test_keys_for_http_come_and_go_in_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--file", str(tmp_path / "some" / "where.toml")]
    for name, scope in (("ann", "serve"), ("root", "admin")):
        assert main(["api", "new", name, "--scope", scope, *place]) == 0
    assert main(["api", "revoke", "ann", "--yes", *place]) == 0
    capsys.readouterr()
    assert main(["api", "list", "--json", *place]) == 0
    assert [(each["name"], each["scope"]) for each in json.loads(capsys.readouterr().out)] == [("root", "admin")]


def test_what_is_wrong_with_keys_for_http_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--folder", str(tmp_path)]
    for arguments, code, said in (
        (["list"], 2, "api_keys.toml"),
        (["revoke", "ann"], 2, "api_keys.toml"),
        (["new", "a b", "--scope", "serve"], 2, "is not a name"),
        (["new", "ann", "--scope", "serve"], 0, "ann"),
        (["new", "ann", "--scope", "admin"], 2, "revoke it first"),
        (["revoke", "bob"], 1, "'bob' has no API key"),
    ):
        assert main(["api", *arguments, *place]) == code, arguments
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    for arguments in (["new", "x"], ["new", "x", "--scope", "root"], [], ["sing"]):
        with pytest.raises(SystemExit) as caught:
            main(["api", *arguments])
        assert caught.value.code == 2


def test_the_folder_is_the_systems_for_root_and_ones_own_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert keys.default_folder() == Path("/etc/microserve/keys")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert keys.default_folder() == Path.home() / ".config/microserve/keys"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/settings")
    assert keys.default_folder() == Path("/settings/microserve/keys")
