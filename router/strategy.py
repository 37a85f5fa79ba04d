"""What a strategy is: a program that serves one choice of one request, and the handles that it is given.

A strategy is an async generator function. Its keyword-only parameters, with types and defaults, are its settings::

    @strategy
    async def data_parallel(request: Request, fleet: Fleet) -> AsyncIterator[Chunk]:
        async for chunk in fleet.pick().start_generate():
            yield chunk

Everything it starts belongs to the dispatcher: sub-calls are cancelled and load charges given back on every way out,
so a strategy needs no `try` and no timeout.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

from microserve.runtime.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.messages import Generated, Load, SamplingParams, TokenLogprobs

SettingValue = int | float | str | bool
StrategyFunction = Callable[..., AsyncIterator["Chunk"]]

_TYPES: dict[str, type[SettingValue]] = {"int": int, "float": float, "str": str, "bool": bool}
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


@dataclass(slots=True)
class Chunk:
    """New tokens of one choice, in order. `logprobs`, when asked for, has one entry per token.

    `finish` is set on the last chunk and only there; the last chunk may have no tokens.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: Generated | None = None


class Request:
    """What is to be served: one choice. Read-only.

    `prompt` is int32 [n], n >= 1. `page_size` is in tokens. `sampling` is as the client gave it, `max_tokens` already
    within the model's context.
    """

    __slots__ = ("id", "model", "page_size", "prompt", "sampling")

    def __init__(
        self, *, id: str, model: str, prompt: TokenArray, sampling: SamplingParams, page_size: int = 16
    ) -> None:
        self.id = id
        self.model = model
        self.prompt = prompt
        self.sampling = sampling
        self.page_size = page_size

    def page_aligned(self, fraction: float) -> int:
        """The whole-page position nearest to `fraction` of the prompt, from 0 to the last whole page.

        Raises `InvalidRequest` unless 0 <= fraction <= 1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise InvalidRequest(f"a fraction of the prompt lies between 0 and 1, not {fraction}")
        length = len(self.prompt)
        pages = round(length * fraction / self.page_size)
        return min(pages, length // self.page_size) * self.page_size


class Engine(Protocol):
    """One engine, for one choice. What is called on it runs at once and belongs to the dispatcher."""

    @property
    def id(self) -> str: ...

    @property
    def labels(self) -> Mapping[str, str]: ...

    @property
    def load(self) -> Load:
        """As the engine last reported it."""
        ...

    def start_generate(self, *, begin: int = 0) -> AsyncIterator[Chunk]:
        """Start to prefill the request's prompt from `begin` and to decode; returns the chunks as they come.

        The call is sent now, not at the first iteration. Tokens that arrived while nobody looked come as one chunk.
        The iterator ends after the chunk whose `finish` is set, or raises the engine's error.
        """
        ...


class Fleet(Protocol):
    """The engines that can serve this request's model, as one choice sees them."""

    @property
    def engines(self) -> list[str]:
        """Ids of the engines that may be picked now."""
        ...

    def pick(self, label: str | None = None) -> Engine:
        """The least loaded engine, charged with this request from now on until the choice ends.

        `label` ("prefill", or "zone=b") prefers engines that carry it; engines have no fixed role, so when none
        does, all are considered. Raises `NoEngine` when there is no engine to pick.
        """
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a strategy: a keyword-only parameter."""

    name: str
    type: type[SettingValue]
    default: SettingValue

    def parse(self, value: object) -> SettingValue:
        """The value as this setting's type; text is converted. Raises `InvalidRequest` that names the setting."""
        if isinstance(value, str) and self.type is not str:
            value = self._from_text(value)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        exact = isinstance(value, self.type) and (self.type is bool or not isinstance(value, bool))
        if not exact or (isinstance(value, float) and not math.isfinite(value)):
            raise self._wrong(value)
        return cast("SettingValue", value)

    def _from_text(self, text: str) -> SettingValue:
        try:
            if self.type is not bool:
                return self.type(text)
        except ValueError:
            raise self._wrong(text) from None
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise self._wrong(text)

    def _wrong(self, value: object) -> InvalidRequest:
        return InvalidRequest(f"setting '{self.name}' must be a {self.type.__name__}, not {value!r}", param=self.name)


@dataclass(frozen=True, slots=True)
class Strategy:
    """A checked strategy function. `source` is the text that its version is computed from."""

    name: str
    function: StrategyFunction
    settings: tuple[Setting, ...]
    summary: str
    source: str = field(repr=False)

    def configure(self, values: Mapping[str, object] | None = None) -> Program:
        """The strategy with settings: defaults where `values` says nothing. Raises `InvalidRequest` for wrong ones."""
        given = dict(values or {})
        chosen: dict[str, SettingValue] = {}
        for setting in self.settings:
            chosen[setting.name] = setting.parse(given.pop(setting.name, setting.default))
        if given:
            raise self._unknown(next(iter(given)))
        identity = json.dumps([self.name, self.source, chosen], sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        return Program(self, chosen, f"{self.name}@{digest}")

    def _unknown(self, name: str) -> InvalidRequest:
        known = [setting.name for setting in self.settings]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(known) if known else 'none'}"
        return InvalidRequest(f"strategy '{self.name}' has no setting '{name}'{hint}", param=name)


@dataclass(frozen=True, slots=True)
class Program:
    """One version of a strategy: its code and its settings. `version` is equal on two routers when both are."""

    strategy: Strategy
    settings: Mapping[str, SettingValue]
    version: str

    def start(self, request: Request, fleet: Fleet) -> AsyncGenerator[Chunk, None]:
        """A new run for one choice; nothing of it runs yet."""
        # `strategy` made sure that the function is an async generator function; users may annotate less.
        return cast("AsyncGenerator[Chunk, None]", self.strategy.function(request, fleet, **self.settings))


def strategy(function: StrategyFunction) -> Strategy:
    """Makes a strategy of an async generator function `(request, fleet, *, settings…)`.

    Raises `ConfigError`, with file and line, when the signature is not that of a strategy.
    """
    if not inspect.isasyncgenfunction(function):
        raise _bad(function, "it must be an async generator function (async def, with yield)")
    settings: list[Setting] = []
    handles = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            settings.append(_setting(function, parameter))
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise _bad(function, f"'{parameter}' is not allowed: every setting is a keyword-only parameter of its own")
        else:
            handles += 1
            if parameter.default is not inspect.Parameter.empty:
                raise _bad(function, f"'{parameter.name}' has a default: settings stand after a '*'")
    if handles != 2:
        raise _bad(function, f"it takes {handles} positional parameters instead of two, (request, fleet)")
    summary = (inspect.getdoc(function) or "").strip().split("\n", 1)[0]
    return Strategy(function.__name__, function, tuple(settings), summary, _source(function))


def _setting(function: StrategyFunction, parameter: inspect.Parameter) -> Setting:
    # Only the settings' annotations are looked at: the others may be importable by a type checker alone.
    annotation = parameter.annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kind = _TYPES.get(name)
    if kind is None:
        raise _bad(function, f"setting '{parameter.name}' must be annotated int, float, str or bool")
    if parameter.default is inspect.Parameter.empty:
        raise _bad(function, f"setting '{parameter.name}' needs a default")
    setting = Setting(parameter.name, kind, parameter.default)
    try:
        default = setting.parse(parameter.default) if not isinstance(parameter.default, str) or kind is str else None
    except InvalidRequest as error:
        raise _bad(function, f"the default of {error.message}") from None
    if default is None:
        raise _bad(function, f"the default of setting '{parameter.name}' must be a {kind.__name__}")
    return Setting(parameter.name, kind, default)


def _bad(function: StrategyFunction, problem: str) -> ConfigError:
    code = getattr(function, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}: " if code is not None else ""
    return ConfigError(f"{where}{getattr(function, '__name__', function)!s} is not a strategy: {problem}")


def _source(function: StrategyFunction) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        # Typed into a console: the compiled code identifies it as well.
        code = function.__code__
        return f"{code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"
