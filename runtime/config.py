"""Configuration: frozen structs, filled from a TOML file, then the environment, then flags; the last that speaks wins.

A file holds the keys of one process at its top level, or tables `[engine]` and `[router]` to serve both.
`MICROSERVE_ENGINE_PAGE_SIZE` and `--page-size` are the other names of the engine's `page_size`; a table's keys are
joined with their table (`MICROSERVE_ENGINE_FAKE_VOCAB_SIZE`, `--fake-vocab-size`). The structs are in `settings`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import FieldInfo, fields

from microserve.runtime.errors import ConfigError
from microserve.runtime.settings import (
    EngineConfig,
    FakeConfig,
    RouterConfig,
    default_process_id,
    describe_default,
    parse_size,
    section_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = [
    "EngineConfig",
    "Explained",
    "FakeConfig",
    "RouterConfig",
    "add_flags",
    "check_tables",
    "config_from_args",
    "default_process_id",
    "explain_config",
    "load_config",
    "parse_size",
]

C = TypeVar("C", bound=Struct)

_SECTIONS = ("engine", "router")
_OF_A_CLUSTER = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?")
"""What Kubernetes tells every container of a service: of one that is called microserve-router, it looks like ours."""
_NEARLY = 0.7
"""How alike two names of a daemon are, of which one is a typing error."""


def load_config(
    cls: type[C],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> C:
    """The configuration that `file`, `environ` and `flags` describe; each overrides what stands before it.

    `flags` maps a field's name ("page_size", "fake_vocab_size") to its value; None means "not given".
    Raises `ConfigError` that names the key, the value, what is expected and where the value came from.
    """
    return _build(cls, _read(cls, file, environ, flags).tree)


def explain_config(
    cls: type[Struct],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> list[Explained]:
    """Every setting with its effective value and where that came from. Raises as `load_config` does."""
    found = _read(cls, file, environ, flags)
    built = _build(cls, found.tree)
    explained = []
    for path, _ in _leaves(cls):
        value: Any = built
        for name in path:
            value = getattr(value, name)
        explained.append(Explained(".".join(path), value, found.origins.get(path, "default")))
    return explained


class Explained(NamedTuple):
    """One setting: `origin` is a file, a variable, a flag, or "default"."""

    key: str
    value: Any
    origin: str


class _Values:
    """What the sources said so far, as a tree of tables, and who said each leaf last."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[tuple[str, ...], str] = {}

    def put(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        table = self.tree
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = value
        self.origins[path] = origin


def _read(
    cls: type[Struct], file: Path | None, environ: Mapping[str, str] | None, flags: Mapping[str, object] | None
) -> _Values:
    values = _Values()
    if file is not None:
        _read_file(cls, file, values)
    _read_environ(cls, environ if environ is not None else {}, values)
    leaves = {path: field for path, field in _leaves(cls)}
    for name, value in (flags or {}).items():
        path = next((path for path in leaves if "_".join(path) == name), None)
        if path is None:
            raise _unknown("--" + name.replace("_", "-"), ("--" + "-".join(p).replace("_", "-") for p in leaves))
        if value is not None:
            origin = "--" + name.replace("_", "-")
            values.put(path, _convert(path, leaves[path], _from_text(leaves[path].type, value, origin), origin), origin)
    return values


def add_flags(parser: argparse.ArgumentParser, cls: type[Struct]) -> None:
    """Add a flag for every field of `cls`, with its documentation and default. What is not given parses to None."""
    for path, field in _leaves(cls):
        name, kind = "_".join(path), _plain(field.type)
        default = describe_default(field.default if field.default is not msgspec.NODEFAULT else {})
        text = _meta(field.type, "description") or ""
        text = (f"{text} (default: {default})" if default else text).replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        target: Any = parser if len(path) == 1 else _group(parser, path[0])
        if kind is bool:
            target.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif _is_collection(kind):
            metavar = "KEY=VALUE" if get_origin(kind) is dict else _metavar(kind)
            target.add_argument(flag, dest=name, action="append", default=None, metavar=metavar, help=text)
        else:
            target.add_argument(flag, dest=name, default=None, metavar=_metavar(kind), help=text)


def config_from_args(
    cls: type[C], argv: Sequence[str], *, prog: str, description: str, environ: Mapping[str, str] | None = None
) -> C:
    """A daemon's whole command line: `--config FILE` and every flag of `cls`. Exits on `--help` and on unknown flags.

    `MICROSERVE_<SECTION>_CONFIG` names the file where `--config` does not. Raises `ConfigError`.
    """
    environ = os.environ if environ is None else environ
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="TOML file; flags override it")
    add_flags(parser, cls)
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config")
    if file is None and (named := environ.get(f"{_prefix(cls)}CONFIG")):
        file = Path(named)
    return load_config(cls, file=file, environ=environ, flags=flags)


# --- sources -------------------------------------------------------------------------------------------------------


def check_tables(file: Path) -> None:
    """Raises `ConfigError` for a file that is one daemon's alone: several can share one that has a table for each."""
    table = _toml(file)
    if table and not _has_tables(table):
        near = [difflib.get_close_matches(name, ("engine", "router"), n=1) for name in table]
        meant = next((f"; did you mean [{found[0]}]?" for found in near if found), "")
        raise ConfigError(
            f"{file} has no tables [engine] and [router], and is read by both: put {', '.join(table)} under one of "
            f"them{meant}"
        )


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error


def _has_tables(table: Mapping[str, Any]) -> bool:
    return any(isinstance(table.get(section), dict) for section in _SECTIONS)


def _read_file(cls: type[Struct], file: Path, values: _Values) -> None:
    table = _toml(file)
    if _has_tables(table):
        for key in table:
            if key not in _SECTIONS:
                raise _unknown(f"{key!r} beside tables [engine] and [router]", _SECTIONS, f"{file}: ")
        table = table.get(section_of(cls), {})
    _read_table(cls, table, f"{file}", (), values)


def _read_table(cls: type[Struct], table: dict[str, Any], file: str, at: tuple[str, ...], values: _Values) -> None:
    known = {field.name: field for field in fields(cls)}
    for key, value in table.items():
        path = (*at, key)
        if key not in known:
            raise _unknown(".".join(path), (".".join((*at, name)) for name in known), f"{file}: ")
        kind = _plain(known[key].type)
        if isinstance(kind, type) and issubclass(kind, Struct):
            if not isinstance(value, dict):
                raise ConfigError(f"{'.'.join(path)}: {value!r} is not a table (from {file})")
            _read_table(kind, value, file, path, values)
        else:
            values.put(path, _convert(path, known[key], value, file), file)


def _read_environ(cls: type[Struct], environ: Mapping[str, str], values: _Values) -> None:
    prefix = _prefix(cls)
    known = {prefix + "_".join(path).upper(): (path, field) for path, field in _leaves(cls)}
    for name, text in environ.items():
        if (meant := _mistyped(name, prefix)) in known:
            raise ConfigError(f"unknown setting {name}; did you mean {meant}?")
        if not name.startswith(prefix) or name == f"{prefix}CONFIG" or _OF_A_CLUSTER.fullmatch(name, len(prefix)):
            continue
        if name not in known:
            raise _unknown(name, known)
        path, field = known[name]
        values.put(path, _convert(path, field, _from_text(field.type, text, name), name), name)


def _mistyped(name: str, prefix: str) -> str:
    """The variable that is meant by one whose daemon is nearly ours; empty where it is ours, or anybody's."""
    ours = prefix.split("_")[1]
    project, _, rest = name.partition("_")
    whose, _, setting = rest.partition("_")
    near = project == "MICROSERVE" and difflib.SequenceMatcher(a=whose, b=ours).ratio() > _NEARLY
    return prefix + setting if near and whose != ours else ""


def _prefix(cls: type[Struct]) -> str:
    return f"MICROSERVE_{section_of(cls).upper()}_"


def _from_text(annotation: Any, value: object, origin: str) -> Any:
    """A flag's or variable's text as the value that a file would hold; what is not text stays as it is."""
    kind = _plain(annotation)
    if _is_collection(kind):
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return value
        parts = [part.strip() for item in value for part in item.split(",") if part.strip()]
        return _pairs(kind, parts, origin) if get_origin(kind) is dict else parts
    if not isinstance(value, str):
        return value
    if value == "" and NoneType in _options(annotation):
        return None
    if kind in (int, float, bool):
        try:
            return msgspec.convert(value.strip(), kind, strict=False)
        except msgspec.ValidationError:
            return value
    return value


def _pairs(kind: Any, parts: list[str], origin: str) -> dict[str, Any]:
    typed = get_args(kind)[1] is not str
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key:
            raise ConfigError(f"{part!r} is not KEY=VALUE (from {origin})")
        found[key.strip()] = _scalar(text.strip()) if typed else text.strip()
    return found


def _scalar(text: str) -> int | float | bool | str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | str) else text


# --- values --------------------------------------------------------------------------------------------------------


def _convert(path: tuple[str, ...], field: FieldInfo, value: Any, origin: str) -> Any:
    try:
        return msgspec.convert(value, field.type)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{'.'.join(path)}: {value!r} is not {_expected(field.type)} (from {origin})") from error


def _build(cls: type[C], values: dict[str, Any]) -> C:
    built = dict(values)
    for field in fields(cls):
        kind = _plain(field.type)
        if field.name in built and isinstance(kind, type) and issubclass(kind, Struct):
            built[field.name] = _build(kind, built[field.name])
    return cls(**built)


def _unknown(name: str, known: Iterable[str], where: str = "") -> ConfigError:
    options = list(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(options)}"
    return ConfigError(f"{where}unknown setting {name}{hint}")


def _leaves(cls: type[Struct], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for field in fields(cls):
        kind = _plain(field.type)
        if isinstance(kind, type) and issubclass(kind, Struct):
            yield from _leaves(kind, (*at, field.name))
        else:
            yield (*at, field.name), field


# --- annotations ---------------------------------------------------------------------------------------------------


def _unwrap(annotation: Any) -> tuple[Any, list[Meta]]:
    """The type under `Annotated`, and its metas, outermost first."""
    metas: list[Meta] = []
    while get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        metas = [*reversed([extra for extra in extras if isinstance(extra, Meta)]), *metas]
    return annotation, metas


def _options(annotation: Any) -> tuple[Any, ...]:
    inner, _ = _unwrap(annotation)
    return get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)


def _plain(annotation: Any) -> Any:
    """The type itself, without metadata and without "or None"."""
    kinds = [option for option in _options(annotation) if option is not NoneType]
    return _unwrap(kinds[0])[0] if len(kinds) == 1 else kinds


def _meta(annotation: Any, name: str) -> Any:
    for option in (annotation, *_options(annotation)):
        for meta in _unwrap(option)[1]:
            if (value := getattr(meta, name)) is not None:
                return value
    return None


def _is_collection(kind: Any) -> bool:
    return get_origin(kind) in (tuple, dict)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _expected(annotation: Any) -> str:
    """What a value must be, in words."""
    kind, extra = _plain(annotation), _meta(annotation, "extra")
    if extra is not None:
        words = str(extra["expected"])
    elif get_origin(kind) is Literal:
        words = "one of " + ", ".join(map(str, get_args(kind)))
    elif get_origin(kind) is tuple:
        inner = _expected(get_args(kind)[0])
        words = f"a list in which each is {inner}"
    elif get_origin(kind) is dict:
        words = "a table of names and values"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
        if _meta(annotation, "min_length"):
            words = "text that is not empty"
    limits = [
        (_meta(annotation, name), word) for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"))
    ]
    told = " and ".join(f"{word} {limit}" for limit, word in limits if limit is not None)
    return f"{words}, {told}" if told else words


def _group(parser: argparse.ArgumentParser, title: str) -> Any:
    named = f"{title} executor"
    # argparse offers no public look-up of a group by its title.
    for group in parser._action_groups:
        if group.title == named:
            return group
    return parser.add_argument_group(named)
