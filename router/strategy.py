"""What a strategy is: a program that serves one choice of one request, and the handles that it is given.

A strategy is an async generator function. Its keyword-only parameters, with types and defaults, are its settings::

    @strategy
    async def balanced(request: Request, fleet: Fleet, *, ratio: float = 0.2) -> AsyncIterator[Chunk]:
        decode = fleet.pick("decode")
        prefill = fleet.pick("prefill", exclude=[decode.id])
        kv = await decode.prep_recv(end=request.page_aligned(1 - ratio))
        sending = prefill.remote_send(kv)
        async for chunk in decode.start_generate(kv, watch=sending):
            yield chunk

Everything it starts belongs to the dispatcher: sub-requests are cancelled, leases released and load charges given back
on every way out, so a strategy needs no `try` and no timeout.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, get_args, get_origin

import numpy as np

from microserve.runtime.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Generator, Iterable, Sequence

    from microserve.runtime.codec import TokenArray
    from microserve.runtime.messages import Generated, KvAddress, Load, SamplingParams, SendReport, TokenLogprobs

SettingValue = int | float | str | bool
StrategyFunction = Callable[..., AsyncIterator["Chunk"]]

_TYPES: dict[str, type[SettingValue]] = {"int": int, "float": float, "str": str, "bool": bool}
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
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
    within the model's context. The last `prior_output` tokens of the prompt are output that was delivered already, by
    an engine that was lost then: the program runs again, from there on.
    """

    __slots__ = ("id", "model", "page_size", "prior_output", "prompt", "sampling")

    def __init__(
        self,
        *,
        id: str,
        model: str,
        prompt: TokenArray,
        sampling: SamplingParams,
        page_size: int = 16,
        prior_output: int = 0,
    ) -> None:
        self.id = id
        self.model = model
        self.prompt = prompt
        self.sampling = sampling
        self.page_size = page_size
        self.prior_output = prior_output

    def after(self, output: list[int]) -> Request:
        """What is left of it once `output` (token ids) has been delivered."""
        return Request(
            id=self.id,
            model=self.model,
            prompt=np.concatenate([self.prompt, np.array(output, dtype=np.int32)]),
            sampling=self.sampling,
            page_size=self.page_size,
            prior_output=self.prior_output + len(output),
        )

    def page_aligned(self, fraction: float) -> int:
        """The whole-page position nearest to `fraction` of the prompt, from 0 to the last whole page.

        Raises `ValueError` unless 0 <= fraction <= 1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"a fraction of the prompt lies between 0 and 1, not {fraction}")
        length = len(self.prompt)
        pages = round(length * fraction / self.page_size)
        return min(pages, length // self.page_size) * self.page_size


class Kv(Protocol):
    """Room on one engine for the KV of a prompt: a lease, which the dispatcher gives back when nothing uses it up."""

    @property
    def engine(self) -> str:
        """Id of the engine that it is on."""
        ...

    @property
    def address(self) -> KvAddress: ...

    @property
    def matched(self) -> int:
        """Tokens that the engine had cached: whole pages, and perhaps more than `end`."""
        ...

    @property
    def end(self) -> int:
        """Where the awaited range ends."""
        ...

    @property
    def missing(self) -> int:
        """Tokens of the awaited range `[matched, end)`; 0 when all of it is there."""
        ...


class Sending(Protocol):
    """A `remote_send`, which runs whether anybody waits for it or not.

    Awaiting it gives the report, or raises its error. When it fails, the receiver is told by itself and computes what
    does not come: only a program that has something better to do needs to look.
    """

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it has ended in an error."""
        ...

    def cancel(self) -> None:
        """It is not wanted any more: as if it had failed. No effect after the end."""
        ...

    def __await__(self) -> Generator[Any, None, SendReport]: ...


class Engine(Protocol):
    """One engine, for one choice.

    What is called on it runs from then on, is bounded by the request's deadline and belongs to the dispatcher, which
    ends it with the choice. What may be awaited gives its answer or raises the engine's error, and may be left alone.
    """

    @property
    def id(self) -> str: ...

    @property
    def labels(self) -> Mapping[str, str]: ...

    @property
    def load(self) -> Load:
        """As the engine last reported it."""
        ...

    @property
    def work(self) -> float:
        """What stands before this request there, in prompt tokens; what it was picked for is not counted."""
        ...

    def carries(self, label: str) -> bool:
        """Whether it has a label: "name" with any value but a negative one, or "name=value"."""
        ...

    @property
    def matched(self) -> int:
        """Tokens of the request's prompt that the engine probably has cached, as this router remembers."""
        ...

    def prep_recv(
        self,
        *,
        end: int | None = None,
        prompt: Sequence[int] | TokenArray | None = None,
        expect_tokens: int | None = None,
        wait: float | None = None,
    ) -> Awaitable[Kv]:
        """Lock what is cached of the prompt, and make room for the KV of the rest of `[0, end)`.

        `end` None is the prompt's end, a negative one counts from there. `prompt`: another one than the request's.
        `expect_tokens`: output that room is kept for; by default `max_tokens`, at most 256. `wait`: seconds until it is
        refused with `Busy`; by default half of the request's time, or none at all while the choice has another lease
        (two choices could wait for each other).
        """
        ...

    def remote_send(self, kv: Kv, *, begin: int | None = None, end: int | None = None) -> Sending:
        """Produce KV of `[begin, end)` here, and push it to where `kv` is. By default all that is awaited there.

        `begin` stands at a page, `end` at a page or at the end of `kv`. An empty range is done at once.
        """
        ...

    def start_generate(
        self,
        kv: Kv | None = None,
        *,
        begin: int | None = None,
        watch: Sending | Iterable[Sending] = (),
        kv_wait: float | None = None,
        max_tokens: int | None = None,
        after: Sequence[int] = (),
        wait: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """Start to prefill the request's prompt from `begin` and to decode; returns the chunks as they come.

        With `max_tokens` (at least 1) it stops after so many. When that, and not the request, ends it, no chunk has
        `finish`: another engine goes on, `after` what was output here (token ids, in order). `wait`: seconds that it
        stands in line at most, until it is refused with `Busy`; by default as long as the request has.

        With `kv`, which has to be on this engine: as soon as the KV before `begin` (by default its `end`) has arrived;
        what does not come within `kv_wait` seconds (by default as the engine is configured) is computed. The
        dispatcher watches over every sending into `kv`; `watch` only says so to whoever reads the program.

        The call is sent now, not at the first iteration. Tokens that arrived while nobody looked come as one chunk.
        The iterator ends after the chunk whose `finish` is set, or raises the engine's error.
        """
        ...

    def commit(self, kv: Kv, *, wait: float | None = None) -> Awaitable[int]:
        """What arrived of `kv` enters this engine's prefix tree, and the lease ends; up to which position that is.

        `wait`: seconds for what is on its way; by default half of the request's time.
        """
        ...

    def release(self, kv: Kv) -> None:
        """`kv` is not needed any more. Else it is given back when the choice ends."""
        ...

    def cache_match(self, prompt: Sequence[int] | TokenArray | None = None) -> Awaitable[int]:
        """Tokens of the prompt (None: the request's) that the engine has cached, from itself."""
        ...


class Fleet(Protocol):
    """The engines that can serve this request's model, as one choice sees them."""

    @property
    def engines(self) -> list[str]:
        """Ids of the engines that may be picked now."""
        ...

    def engine(self, engine_id: str) -> Engine:
        """The engine of that id, without a charge. Raises `NoEngine` when it cannot be picked now."""
        ...

    def pick(self, label: str | None = None, *, exclude: Collection[str] = (), prefix: bool = False) -> Engine:
        """The engine with the least work before it, charged with this request from now on.

        Engines have no fixed role, so what follows are preferences, the first one strongest; each is dropped when no
        engine meets it. `exclude`: ids of engines that others are to be preferred to. `label` ("prefill", or "zone=b"):
        engines that carry it.

        `prefix` weighs what is cached against load: least `work + len(prompt) - matched` (see `Engine`), in tokens.
        The charge moves to the first sub-request, is what that one makes the engine compute, and ends with it.
        Raises `NoEngine` when there is no engine to pick.
        """
        ...


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a setting, both included: `ratio: Annotated[float, Between(0, 1)] = 0.2`."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if math.isinf(self.low) else f"between {self.low:g} and {self.high:g}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a strategy: a keyword-only parameter."""

    name: str
    type: type[SettingValue]
    default: SettingValue
    bounds: Between | None = None

    def parse(self, value: object) -> SettingValue:
        """The value as this setting's type; text is converted. Raises `InvalidRequest` that names the setting."""
        if isinstance(value, str) and self.type is not str:
            value = self._from_text(value)
        if isinstance(value, int) and not _LOWEST <= value <= _HIGHEST:
            # Neither messages nor stores can hold it. It is not repeated: it may have thousands of digits.
            raise InvalidRequest(f"setting '{self.name}' must fit into 64 bits", param=self.name)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        exact = isinstance(value, self.type) and (self.type is bool or not isinstance(value, bool))
        if not exact or (isinstance(value, float) and not math.isfinite(value)):
            raise self._wrong(value)
        bounds = self.bounds
        if bounds is not None and not (isinstance(value, int | float) and bounds.low <= value <= bounds.high):
            raise InvalidRequest(f"setting '{self.name}' must be {bounds}, not {value!r}", param=self.name)
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
        return InvalidRequest(f"setting '{self.name}' must be {_a(self.type)}, not {value!r}", param=self.name)


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

    def where(self, error: BaseException) -> str:
        """At which line of its file the program raised it, as " at mine.py:9"; empty where that is not known."""
        code = getattr(self.strategy.function, "__code__", None)
        frames = [each for each in extract_tb(error.__traceback__) if code and each.filename == code.co_filename]
        return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""

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
    if isinstance(annotation, str) and "[" in annotation:
        try:
            annotation = eval(annotation, function.__globals__)  # the file's own text, which has been run already
        except Exception as error:  # whatever it may raise
            raise _bad(function, f"the annotation of setting '{parameter.name}' cannot be read: {error}") from error
    annotation, *extra = (*get_args(annotation),) if get_origin(annotation) is Annotated else (annotation,)
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kind = _TYPES.get(name)
    if kind is None:
        raise _bad(function, f"setting '{parameter.name}' must be annotated int, float, str or bool")
    bounds = next((each for each in extra if isinstance(each, Between)), None)
    if bounds is not None and kind not in (int, float):
        raise _bad(function, f"setting '{parameter.name}' is no number, and has no bounds")
    if parameter.default is inspect.Parameter.empty:
        raise _bad(function, f"setting '{parameter.name}' needs a default")
    setting = Setting(parameter.name, kind, parameter.default, bounds)
    try:
        default = setting.parse(parameter.default) if not isinstance(parameter.default, str) or kind is str else None
    except InvalidRequest as error:
        raise _bad(function, f"the default of {error.message}") from None
    if default is None:
        raise _bad(function, f"the default of setting '{parameter.name}' must be {_a(kind)}")
    return Setting(parameter.name, kind, default, bounds)


def _a(kind: type[SettingValue]) -> str:
    return f"an {kind.__name__}" if kind is int else f"a {kind.__name__}"


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
