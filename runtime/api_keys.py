"""Keys for HTTP: who may use a router's HTTP interface, and for what.

A key is `ms_ID_SECRET`: a public id of 8 hexadecimal digits and 256 random bits. Its holder sends all of it
(`Authorization: Bearer …`); the router keeps a SHA-256 digest alone. A fast digest is enough, because nothing can be
guessed: the secret is random and long. The file is read again when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from microserve.runtime.errors import ConfigError, Unauthorized
from microserve.runtime.ids import valid_name
from microserve.runtime.keys import changing, check_writers, file_stamp, parse_keys, replace_file
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Scope = Literal["serve", "admin"]
"""What a key is for: requests and looks; or everything."""
SCOPES: tuple[str, ...] = get_args(Scope)

API_KEYS_FILE = "api_keys.toml"

_PREFIX = "ms"
_NOBODY = hashlib.sha256(b"").hexdigest()

_log = get_logger(__name__)


class ApiKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of api_keys.toml."""

    name: str
    scope: Scope
    id: Annotated[str, Meta(pattern="^[0-9a-f]{8}$")]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the whole key, hexadecimal."""


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[ApiKey] = []


class ApiKeys:
    """The keys of one file."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` when the file cannot be used."""
        self.path = path
        self._by_id: dict[str, ApiKey] = {}
        self._stamp: object = None
        self._read()

    def __len__(self) -> int:
        return len(self._by_id)

    def check(self, key: str) -> ApiKey:
        """The entry of a key. Raises `Unauthorized`; takes the same time whether the id is known or not."""
        _, _, rest = key.partition("_")
        found = self._by_id.get(rest.partition("_")[0])
        digest = hashlib.sha256(key.encode()).hexdigest()
        if not hmac.compare_digest(digest, _NOBODY if found is None else found.digest) or found is None:
            raise Unauthorized("the API key is not valid")
        return found

    def look(self) -> frozenset[str]:
        """Reads the file again if it has changed. Ids that are let in no longer, or not as before.

        A file that cannot be used is told, and changes nothing: a slip of an editor must not lock everybody out.
        """
        if file_stamp(self.path) == self._stamp:
            return frozenset()
        before = self._by_id
        try:
            self._read()
        except ConfigError as error:
            _log.error("API keys were not read again; the old ones stay", every=60.0, error=error.message)
            return frozenset()
        ended = frozenset(name for name, entry in before.items() if self._by_id.get(name) != entry)
        _log.info("API keys read again", keys=len(self), ended=len(ended))
        return ended

    def _read(self) -> None:
        stamp = file_stamp(self.path)
        self._by_id = {entry.id: entry for entry in read_api_keys(self.path)}
        self._stamp = stamp


def read_api_keys(path: Path) -> list[ApiKey]:
    """The entries of a file. Raises `ConfigError` that names the file and what is wrong with it."""
    # Digests are no secrets, so others may read it; but who can write it can let anybody in.
    check_writers(path)
    found = parse_keys(path, _File).keys
    for what in ("name", "id"):
        seen: set[str] = set()
        for each in found:
            value: str = getattr(each, what)
            if value in seen:
                raise ConfigError(f"{path}: the {what} {value!r} stands there twice")
            seen.add(value)
    return found


def new_api_key(path: Path, name: str, scope: str) -> str:
    """Makes a key and lets it in. Returns the key: it is nowhere else. Raises `ConfigError`."""
    if not valid_name(name):
        raise ConfigError(f"{name!r} is not a name of letters, digits, '.', '_' and '-'")
    if scope not in SCOPES:
        raise ConfigError(f"scope {scope!r} is none of {', '.join(SCOPES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with changing(path.parent):
            known = read_api_keys(path) if path.exists() else []
            if any(each.name == name for each in known):
                raise ConfigError(f"{name!r} has an API key in {path} already; revoke it first")
            ids = {each.id for each in known}
            while (public := secrets.token_hex(4)) in ids:
                pass
            key = f"{_PREFIX}_{public}_{secrets.token_urlsafe(32)}"
            digest = hashlib.sha256(key.encode()).hexdigest()
            entry = msgspec.convert({"name": name, "scope": scope, "id": public, "digest": digest}, ApiKey)
            _write(path, [*known, entry])
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    return key


def revoke_api_key(path: Path, name: str) -> bool:
    """Lets a name in no longer. Whether it was. Raises `ConfigError`."""
    try:
        with changing(path.parent):
            known = read_api_keys(path)
            kept: Sequence[ApiKey] = [each for each in known if each.name != name]
            if len(kept) == len(known):
                return False
            _write(path, kept)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    return True


def _write(path: Path, entries: Iterable[ApiKey]) -> None:
    """Raises `OSError`."""
    lines = ["# Who may use the HTTP interface of routers. They read it again when it changes.", ""]
    for each in entries:
        # Names and hexadecimal digits need no escaping.
        lines += ["[[keys]]", *(f"{field} = '{value}'" for field, value in msgspec.structs.asdict(each).items()), ""]
    replace_file(path, "\n".join(lines), 0o644)
