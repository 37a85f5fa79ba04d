"""Keys for HTTP: made, kept as digests, checked, read again, refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from microserve.runtime.api_keys import ApiKeys, new_api_key, read_api_keys, revoke_api_key
from microserve.runtime.errors import ConfigError, Unauthorized

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "api_keys.toml"


def touch(path: Path, second: int) -> None:
    """A change that the clock of the file system may be too coarse to show."""
    os.utime(path, (second, second))


def test_a_key_is_let_in_and_its_secret_is_nowhere(path: Path) -> None:
    ann = new_api_key(path, "ann", "serve")
    bob = new_api_key(path, "bob", "admin")
    keys = ApiKeys(path)
    assert [(keys.check(key).name, keys.check(key).scope) for key in (ann, bob)] == [("ann", "serve"), ("bob", "admin")]
    text = path.read_text()
    for key in (ann, bob):
        prefix, public, secret = key.split("_", 2)
        assert (prefix, len(public)) == ("ms", 8)
        assert len(secret) >= 43
        assert secret not in text
        assert public in text
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_is_almost_a_key_is_none(path: Path) -> None:
    ann, bob = new_api_key(path, "ann", "serve"), new_api_key(path, "bob", "serve")
    keys = ApiKeys(path)
    ann_id, bob_secret = ann.split("_")[1], bob.split("_", 2)[2]
    for wrong in ("", "ms", "ms__", ann[:-1], ann + "x", f"ms_{ann_id}_{bob_secret}", "ms_00000000_" + bob_secret, "é"):
        with pytest.raises(Unauthorized) as caught:
            keys.check(wrong)
        assert not wrong or wrong not in caught.value.message


def test_keys_come_and_go_while_they_are_in_use(path: Path) -> None:
    ann = new_api_key(path, "ann", "serve")
    keys = ApiKeys(path)
    assert keys.look() == frozenset()
    bob = new_api_key(path, "bob", "serve")
    assert keys.look() == frozenset()
    assert keys.check(bob).name == "bob"
    assert revoke_api_key(path, "ann")
    assert keys.look() == {ann.split("_")[1]}
    with pytest.raises(Unauthorized):
        keys.check(ann)
    assert not revoke_api_key(path, "ann")
    # Another scope ends what was let in with the old one.
    path.write_text(path.read_text().replace("'serve'", "'admin'"))
    touch(path, 1)
    assert keys.look() == {bob.split("_")[1]}
    assert keys.check(bob).scope == "admin"


def test_a_slip_of_an_editor_locks_nobody_out(path: Path) -> None:
    ann = new_api_key(path, "ann", "serve")
    keys = ApiKeys(path)
    good = path.read_text()
    for number, bad in enumerate(("[[keys", good + "[[keys]]\nname = 'x'\n", good + good), start=1):
        path.write_text(bad)
        touch(path, number)
        assert keys.look() == frozenset()
        assert keys.check(ann).name == "ann"
    path.unlink()
    assert keys.look() == frozenset()
    assert keys.check(ann).name == "ann"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[keys", "is not valid TOML"),
        ("[[keys]]\nname = 'a'\nscope = 'serve'\nid = '0a0a0a0a'\n", "missing required field `digest`"),
        (
            "[[keys]]\nname = 'a'\nscope = 'root'\nid = '0a0a0a0a'\ndigest = '" + "0" * 64 + "'",
            "Invalid enum value 'root'",
        ),
        ("[[keys]]\nname = 'a'\nscope = 'serve'\nid = 'x'\ndigest = '" + "0" * 64 + "'", "$.keys[0].id"),
        ("[[keys]]\nname = 'a'\nscope = 'serve'\nid = '0a0a0a0a'\ndigest = 'secret'", "$.keys[0].digest"),
        ("[[key]]\nname = 'a'\n", "unknown field `key`"),
    ],
)
def test_a_file_that_is_wrong_says_where(path: Path, text: str, said: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_api_keys(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_names_and_scopes_are_checked(path: Path) -> None:
    new_api_key(path, "ann", "serve")
    for name, scope, said in (
        ("ann", "serve", "already"),
        ("a b", "serve", "not a name"),
        ("x", "root", "none of serve"),
    ):
        with pytest.raises(ConfigError, match=said):
            new_api_key(path, name, scope)
    assert len(read_api_keys(path)) == 1


def test_a_file_that_others_may_write_is_refused(path: Path) -> None:
    new_api_key(path, "ann", "serve")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="may be written by others"):
        ApiKeys(path)
