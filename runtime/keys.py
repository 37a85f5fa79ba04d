"""Keys: who a process is on the bus, and whom it lets in.

A *folder of keys* belongs to one fleet::

    fleet.key           the fleet's own key pair: proves to whoever dials that they reached this fleet   0600
    NAME.key            the identity of one process or person: name, role, key pair                     0600
    authorized.toml     who is let in: public keys with name and role

Every daemon's identity (role engine or router) carries the fleet's secret too, because it binds sockets in the fleet's
name; a client's or admin's carries the fleet's public key alone. Keys are CurveZMQ's, in Z85 text. This module knows
files and rules, and no sockets.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import stat
import string
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import msgspec
from msgspec import Struct

from microserve.runtime.errors import ConfigError, Forbidden, Unauthorized
from microserve.runtime.ids import valid_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from microserve.runtime.ids import Peer
    from microserve.runtime.messages import Hello

Role = Literal["engine", "router", "client", "admin"]
ROLES: tuple[str, ...] = get_args(Role)
DAEMONS = frozenset({"engine", "router"})

FLEET_FILE = "fleet.key"
AUTHORIZED_FILE = "authorized.toml"

KEY_LENGTH = 40
"""Characters of a key, public or secret, in Z85."""

_Z85 = frozenset(string.ascii_letters + string.digits + ".-:+=^!/*?&<>()[]{}@%$#")

S = TypeVar("S", bound=Struct)

KeyPair = tuple[str, str]
"""Public and secret key, Z85, 40 characters each."""


class FleetKey(Struct, frozen=True, forbid_unknown_fields=True):
    """The fleet's key pair."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"FleetKey(public={self.public!r})"


class Identity(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who a process is. `fleet_secret` is there for daemons, which bind sockets in the fleet's name."""

    name: str
    role: Role
    public: str
    secret: str
    fleet_public: str
    fleet_secret: str | None = None

    def __repr__(self) -> str:
        # Never the secrets: this may end in a log or a traceback.
        return f"Identity(name={self.name!r}, role={self.role!r}, public={self.public!r})"


class AuthorizedKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of authorized.toml."""

    name: str
    role: Role
    public: str


class _Authorized(Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[AuthorizedKey] = []


def read_identity(path: Path) -> Identity:
    """The identity in `path`. Raises `ConfigError`: not there, readable by others, or not a key file."""
    return _read_secret(path, Identity, (lambda found: (found.public, found.secret, found.fleet_public)))


class KeyRing:
    """Who is let in: authorized.toml, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` when the file cannot be used."""
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        self._by_public: dict[str, AuthorizedKey] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._by_public)

    @property
    def keys(self) -> list[AuthorizedKey]:
        return list(self._by_public.values())

    def find(self, public: str) -> AuthorizedKey | None:
        """The entry of a public key."""
        return self._by_public.get(public)

    def reload(self) -> None:
        """Reads the file. Raises `ConfigError`, and keeps what it had, when that is impossible."""
        stamp = file_stamp(self.path)
        self._by_public = {each.public: each for each in read_authorized(self.path)}
        self._stamp = stamp

    def changed(self) -> bool:
        """Whether the file is another than the one that was read."""
        return file_stamp(self.path) != self._stamp


def read_authorized(path: Path) -> list[AuthorizedKey]:
    """The entries of an authorized.toml. Raises `ConfigError`."""
    check_writers(path)
    found = parse_keys(path, _Authorized).keys
    names: set[str] = set()
    publics: dict[str, str] = {}
    for each in found:
        if each.name in names:
            raise ConfigError(f"{path}: the name {each.name!r} stands there twice")
        names.add(each.name)
        _check_keys(path, (each.public,))
        # Revoking one of the two names would leave the key let in.
        if each.public in publics:
            raise ConfigError(f"{path}: {publics[each.public]!r} and {each.name!r} have the same key")
        publics[each.public] = each.name
    return found


@dataclass(slots=True)
class BusSecurity:
    """What a bus needs to know: who we are, and whom our sockets let in."""

    identity: Identity
    ring: KeyRing
    key_file: Path | None = None

    @classmethod
    def load(cls, key_file: Path) -> BusSecurity:
        """The identity in `key_file`, and the authorized.toml beside it. Raises `ConfigError`."""
        identity = read_identity(key_file)
        ring = key_file.parent / AUTHORIZED_FILE
        if identity.role in DAEMONS and identity.fleet_secret is None:
            raise ConfigError(
                f"{key_file}: the role {identity.role} needs the fleet's secret; make it with 'microserve keys new'"
            )
        if identity.role not in DAEMONS and not ring.exists():
            return cls(identity, _NO_RING, key_file)
        return cls(identity, KeyRing(ring), key_file)

    def renewed(self) -> BusSecurity:
        """The same with the key that stands in our file now. Raises `ConfigError` for one that is not ours."""
        if self.key_file is None:
            return self
        found, ours = read_identity(self.key_file), self.identity
        if (found.name, found.role, found.fleet_public) != (ours.name, ours.role, ours.fleet_public):
            raise ConfigError(
                f"{self.key_file} is of another name, role or fleet than {ours.name!r}: that needs a restart"
            )
        return replace(self, identity=found)

    def check_name(self, kind: str, name: str) -> None:
        """Raises `ConfigError` when a daemon is another than its key says: nobody else would let it in, or say why."""
        ours = self.identity
        if kind in DAEMONS and (kind, name) != (ours.role, ours.name):
            also = f", or leave {kind}_id out" if kind == ours.role else ""
            raise ConfigError(
                f"key_file is the key of {ours.role} {ours.name!r}, and cannot speak as {kind} {name!r}: "
                f"make one for it ('microserve keys new'){also}"
            )

    def admit(self, hello: Hello, public: str) -> str:
        """The role of whoever says `hello` with that key. Raises `Unauthorized` or `Forbidden`."""
        key = self.ring.find(public)
        if key is None:
            raise Unauthorized("your key is not authorized here")
        expected = {"engine": "engine", "router": "router"}.get(hello.kind)
        if expected is not None and key.role != expected:
            raise Forbidden(
                f"the key of {key.name!r} is for the role {key.role}; it cannot speak as {hello.kind} {hello.name!r}"
            )
        if expected is not None and key.name != hello.name:
            raise Forbidden(f"the key of {key.name!r} cannot speak as {hello.kind} {hello.name!r}")
        if expected is None and key.role in DAEMONS:
            raise Forbidden(f"the key of {key.name!r} is for the role {key.role}; it cannot speak as a {hello.kind}")
        return key.role

    def knows(self, peer: Peer) -> bool:
        """Whether a daemon that we dialled may be talked to: a listener proves to be of this fleet, and no more, so the
        list says whether the one of that name is let in still. Who has no say in the list asks no more."""
        if self.identity.role not in DAEMONS or peer.kind not in DAEMONS:
            return True
        return any((key.role, key.name) == (peer.kind, peer.name) for key in self.ring.keys)


class _NoRing(KeyRing):
    """A client binds nothing, so it lets nobody in."""

    def __init__(self) -> None:
        self.path = Path()
        self._by_public = {}
        self._stamp = None

    def reload(self) -> None:
        pass

    def changed(self) -> bool:
        return False


_NO_RING = _NoRing()


def load_security(key_file: str | None) -> BusSecurity | None:
    """What `key_file` of a configuration says; None without one. Raises `ConfigError`."""
    return None if key_file is None else BusSecurity.load(Path(key_file))


def identity_name(key_file: str | None) -> str | None:
    """The name in a daemon's key file: what it is called unless told otherwise. Nothing that is wrong with the file is
    told here: whoever loads it does."""
    if key_file is None:
        return None
    try:
        return read_identity(Path(key_file)).name
    except ConfigError:
        return None


def check_exposed(endpoints: Iterable[tuple[str, str]], *, secured: bool, insecure: bool) -> None:
    """Raises `ConfigError` when one of `(setting, address)` is off loopback and nothing guards it."""
    if secured or insecure:
        return
    for setting, address in endpoints:
        if not is_loopback(address):
            raise ConfigError(
                f"{setting} = {address!r} can be reached from other machines, and nothing would ask them who they are: "
                "make keys ('microserve keys new') and set key_file, or say --insecure"
            )


def is_loopback(address: str) -> bool:
    """Whether an endpoint or host is this machine's alone."""
    scheme, separator, rest = address.partition("://")
    if separator and scheme != "tcp":
        return True  # ipc, inproc, memory: the file system guards those
    host = rest.rpartition(":")[0] if separator else address
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # Not by how it begins: 127.example.org may be anywhere.
        return host == "localhost"


# --- making and changing keys --------------------------------------------------------------------------------------


def new_identity(folder: Path, name: str, role: str, pair: Callable[[], KeyPair]) -> Path:
    """Makes `folder/NAME.key`, and the fleet's key if it is the first; authorizes it. Returns the file.

    Raises `ConfigError`: the name is taken or not a name, or the folder cannot be written.
    """
    if not valid_name(name) or name == "fleet":
        raise ConfigError(f"{name!r} is not a name of letters, digits, '.', '_' and '-'")
    path = folder / f"{name}.key"
    authorized = folder / AUTHORIZED_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with changing(folder):
            known = read_authorized(authorized) if authorized.exists() else []
            if any(each.name == name for each in known):
                raise ConfigError(f"{name!r} has a key in {folder} already; revoke it first")
            if path.exists():
                raise ConfigError(f"{name!r} is not authorized, but {path} is there still; remove it first")
            fleet_file = folder / FLEET_FILE
            if not fleet_file.exists():
                public, secret = pair()
                _write_secret(fleet_file, {"public": public, "secret": secret})
            fleet = _read_secret(fleet_file, FleetKey, (lambda found: (found.public, found.secret)))
            public, secret = pair()
            values = {"name": name, "role": role, "public": public, "secret": secret, "fleet_public": fleet.public}
            if role in DAEMONS:
                values["fleet_secret"] = fleet.secret
            _write_secret(path, values)
            entry = msgspec.convert({"name": name, "role": role, "public": public}, AuthorizedKey)
            write_authorized(authorized, [*known, entry])
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"role {role!r} is none of {', '.join(ROLES)}") from error
    return path


def authorize(folder: Path, name: str, role: str, public: str) -> None:
    """Lets a public key in that was made elsewhere. Raises `ConfigError`."""
    path = folder / AUTHORIZED_FILE
    if not valid_name(name):
        raise ConfigError(f"{name!r} is not a name of letters, digits, '.', '_' and '-'")
    if role not in ROLES:
        raise ConfigError(f"role {role!r} is none of {', '.join(ROLES)}")
    _check_keys(path, (public,))
    entry = msgspec.convert({"name": name, "role": role, "public": public}, AuthorizedKey)
    try:
        with changing(folder):
            known = read_authorized(path) if path.exists() else []
            for each in known:
                if each.name == name:
                    raise ConfigError(f"{name!r} is authorized already; revoke it first")
                if each.public == public:
                    raise ConfigError(f"that key is authorized already, as {each.name!r}; revoke it first")
            write_authorized(path, [*known, entry])
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error


def revoke(folder: Path, name: str) -> bool:
    """Lets a name in no longer; its key file stays where it is. Whether it was authorized. Raises `ConfigError`."""
    path = folder / AUTHORIZED_FILE
    try:
        with changing(folder):
            known = read_authorized(path)
            kept = [each for each in known if each.name != name]
            if len(kept) == len(known):
                return False
            write_authorized(path, kept)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    return True


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Around reading a list in `folder` and writing it anew: of two commands at once the second waits, and sees what
    the first has written; else a key that one revokes could come back with the other's list. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_authorized(path: Path, entries: Iterable[AuthorizedKey]) -> None:
    """Replaces the file in one step: daemons that watch it never see half of it. Raises `OSError`."""
    lines = ["# Who is let in on the bus of this fleet. Daemons read it again when it changes.", ""]
    for each in entries:
        lines += ["[[keys]]", *(f"{key} = {_quoted(value)}" for key, value in msgspec.structs.asdict(each).items()), ""]
    replace_file(path, "\n".join(lines), 0o644)


# --- files ---------------------------------------------------------------------------------------------------------


def _read_secret(path: Path, cls: type[S], keys: Callable[[S], tuple[str, ...]]) -> S:
    check_secret(path)
    found = parse_keys(path, cls)
    _check_keys(path, keys(found))
    return found


def parse_keys(path: Path, cls: type[S]) -> S:
    """What a TOML file of keys says. Raises `ConfigError`, which repeats nothing of the file."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), cls)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        # Of the file's text nothing is repeated: it may be a secret.
        raise ConfigError(f"{path} is not valid TOML") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is not a key file: {error}") from error


def _check_keys(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        if len(key) != KEY_LENGTH:
            raise ConfigError(f"{path}: a key has {KEY_LENGTH} characters, one there has {len(key)}")
        if not _Z85.issuperset(key):
            raise ConfigError(f"{path}: a key is Z85 text, and one there has other characters")


def check_writers(path: Path) -> None:
    """Raises `ConfigError` when others may write the file: who can write a list of keys can let anybody in."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path} may be written by others (mode {mode & 0o777:04o}): chmod 644 {path}")


def _write_secret(path: Path, values: dict[str, str]) -> None:
    text = "# A secret: keep it to yourself.\n" + "".join(
        f"{key} = {_quoted(value)}\n" for key, value in values.items()
    )
    replace_file(path, text, 0o600)


def check_secret(path: Path) -> None:
    """Raises `ConfigError` when the file is not there, or others may read it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read key file {path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} holds a secret, and others may read it (mode {mode & 0o777:04o}): chmod 600 {path}")


def replace_file(path: Path, text: str, mode: int) -> None:
    """Writes it in one step: who watches it never sees half of it. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # Never world-readable, not even for a moment.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            # Whatever the umask, and whoever writes: a daemon that cannot read a new list goes on with the old one.
            os.fchmod(descriptor, mode)
            if os.geteuid() == 0:
                folder = path.parent.stat()
                with contextlib.suppress(OSError):  # not every root may, and not on every file system
                    os.fchown(descriptor, folder.st_uid, folder.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _quoted(value: str) -> str:
    # Z85 knows neither quotes nor backslashes, and names neither.
    return f"'{value}'"


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """Changes with the file. None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
