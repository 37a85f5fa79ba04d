"""What is a strategy, its settings and versions."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pytest

from microserve.router.strategies.catalog import load_catalog
from microserve.router.strategy import Between, Chunk, Fleet, Request, Strategy, strategy
from microserve.runtime.errors import ConfigError, InvalidRequest
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@strategy
async def sample(
    request: Request, fleet: Fleet, *, ratio: float = 0.5, pages: int = 4, label: str = "x", eager: bool = False
) -> AsyncIterator[Chunk]:
    """What it does.

    And how.
    """
    yield Chunk([])


def test_settings_come_from_the_keyword_parameters() -> None:
    assert sample.name == "sample"
    assert sample.summary == "What it does."
    assert [(setting.name, setting.type, setting.default) for setting in sample.settings] == [
        ("ratio", float, 0.5),
        ("pages", int, 4),
        ("label", str, "x"),
        ("eager", bool, False),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ratio": 1}, {"ratio": 1.0}),
        ({"ratio": "0.25"}, {"ratio": 0.25}),
        ({"pages": "7"}, {"pages": 7}),
        ({"pages": 2**63 - 1}, {"pages": 2**63 - 1}),
        ({"pages": str(-(2**63))}, {"pages": -(2**63)}),
        ({"eager": "on"}, {"eager": True}),
        ({"eager": "No"}, {"eager": False}),
        ({"label": "3"}, {"label": "3"}),
    ],
)
def test_settings_are_converted(given: dict[str, object], expected: dict[str, object]) -> None:
    settings = sample.configure(given).settings
    assert settings == {"ratio": 0.5, "pages": 4, "label": "x", "eager": False} | expected
    for name, value in expected.items():
        assert type(settings[name]) is type(value)


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"ratio": "much"}, "ratio", "setting 'ratio' must be a float, not 'much'"),
        ({"ratio": math.nan}, "ratio", "must be a float"),
        ({"ratio": "inf"}, "ratio", "must be a float"),
        ({"ratio": True}, "ratio", "must be a float, not True"),
        ({"pages": 1.5}, "pages", "must be an int, not 1.5"),
        ({"pages": True}, "pages", "must be an int, not True"),
        ({"eager": 1}, "eager", "must be a bool, not 1"),
        ({"eager": "perhaps"}, "eager", "must be a bool, not 'perhaps'"),
        ({"label": 3}, "label", "must be a str, not 3"),
        ({"pages": 2**63}, "pages", "setting 'pages' must fit into 64 bits"),
        ({"pages": str(-(2**63) - 1)}, "pages", "setting 'pages' must fit into 64 bits"),
        ({"pages": 10**5000}, "pages", "setting 'pages' must fit into 64 bits"),
        ({"ratio": 10**5000}, "ratio", "setting 'ratio' must fit into 64 bits"),
        ({"ratoi": 0.1}, "ratoi", "strategy 'sample' has no setting 'ratoi'; did you mean 'ratio'"),
        ({"zzz": 0.1}, "zzz", "it has ratio, pages, label, eager"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, object], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message.replace("(", r"\(")) as caught:
        sample.configure(given)
    assert caught.value.param == param


def test_bounds_of_a_setting() -> None:
    @strategy
    async def bounded(
        request: Request,
        fleet: Fleet,
        *,
        ratio: Annotated[float, Between(0, 1)] = 0.2,
        least: Annotated[int, Between(1)] = 1,
        most: Annotated[int, Between(high=9)] = 9,
    ) -> AsyncIterator[Chunk]:
        yield Chunk([])

    assert bounded.configure({"ratio": 1, "least": "1", "most": 9}).settings == {"ratio": 1.0, "least": 1, "most": 9}
    for given, said in (
        ({"ratio": "1.01"}, "setting 'ratio' must be between 0 and 1, not 1.01"),
        ({"least": 0}, "setting 'least' must be at least 1, not 0"),
        ({"most": 10}, "setting 'most' must be at most 9, not 10"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            bounded.configure(given)
        assert (caught.value.message, caught.value.param) == (said, next(iter(given)))
    for text, problem in (
        ("Annotated[float, Between(0, 1)] = 2.0", "the default of setting 'x' must be between 0 and 1, not 2.0"),
        ("Annotated[str, Between(0, 1)] = ''", "setting 'x' is no number, and has no bounds"),
        ("Annotated[float, Bounds(0, 1)] = 0.5", "the annotation of setting 'x' cannot be read: name 'Bounds'"),
        ("list[int] = []", "setting 'x' must be annotated int, float, str or bool"),
    ):
        code = f"from __future__ import annotations\nasync def f(request, fleet, *, x: {text}):\n    yield"
        made: dict[str, Any] = {"Annotated": Annotated, "Between": Between}
        exec(code, made)
        with pytest.raises(ConfigError, match=re.escape(problem)):
            strategy(made["f"])


def test_what_is_built_in_refuses_settings_that_would_fail_requests() -> None:
    for name, given in (("balanced", {"ratio": 2}), ("prefill_decode", {"min_remote": -1})):
        with pytest.raises(InvalidRequest):
            load_catalog().get(name).configure(given)


def test_a_version_is_name_source_and_settings() -> None:
    plain = sample.configure()
    assert plain.version == sample.configure({"ratio": "0.5"}).version
    assert plain.version.startswith("sample@")
    others = {
        sample.configure({"ratio": 0.6}).version,
        Strategy("sample", sample.function, sample.settings, "", "other source").configure().version,
        Strategy("other", sample.function, sample.settings, "", sample.source).configure().version,
    }
    assert len({plain.version, *others}) == 4


def _bad_functions() -> list[tuple[Any, str]]:
    async def no_yield(request: Request, fleet: Fleet) -> None:
        """Returns."""

    def plain(request: Request, fleet: Fleet) -> None:
        """Not async."""

    async def one(request: Request) -> AsyncIterator[Chunk]:
        yield Chunk([])

    async def three(request: Request, fleet: Fleet, more: int) -> AsyncIterator[Chunk]:
        yield Chunk([])

    async def positional(request: Request, fleet: Fleet, ratio: float = 1.0) -> AsyncIterator[Chunk]:
        yield Chunk([])

    async def no_default(request: Request, fleet: Fleet, *, ratio: float) -> AsyncIterator[Chunk]:
        yield Chunk([])

    async def no_type(request: Request, fleet: Fleet, *, ratio=1.0) -> AsyncIterator[Chunk]:  # type: ignore[no-untyped-def]
        yield Chunk([])

    async def odd_type(request: Request, fleet: Fleet, *, ratio: list[int] = []) -> AsyncIterator[Chunk]:  # noqa: B006
        yield Chunk([])

    async def wrong_default(request: Request, fleet: Fleet, *, ratio: int = "1") -> AsyncIterator[Chunk]:  # type: ignore[assignment]
        yield Chunk([])

    async def swallow(request: Request, fleet: Fleet, **rest: int) -> AsyncIterator[Chunk]:
        yield Chunk([])

    return [
        (no_yield, "async generator function"),
        (plain, "async generator function"),
        (one, "takes 1 positional parameters instead of two"),
        (three, "takes 3 positional parameters instead of two"),
        (positional, "'ratio' has a default: settings stand after a"),
        (no_default, "setting 'ratio' needs a default"),
        (no_type, "setting 'ratio' must be annotated int, float, str or bool"),
        (odd_type, "setting 'ratio' must be annotated int, float, str or bool"),
        (wrong_default, "the default of setting 'ratio' must be an int"),
        (swallow, "every setting is a keyword-only parameter of its own"),
    ]


@pytest.mark.parametrize(("function", "message"), _bad_functions(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_function_that_is_no_strategy_is_refused_with_its_place(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        strategy(function)
    assert f"{__file__}:{function.__code__.co_firstlineno}: {function.__name__}" in caught.value.message


@pytest.mark.parametrize(
    ("length", "fraction", "position"),
    [(100, 0.0, 0), (100, 1.0, 96), (100, 0.5, 48), (100, 0.8, 80), (15, 1.0, 0), (16, 1.0, 16), (100, 0.07, 0)],
)
def test_page_aligned(length: int, fraction: float, position: int) -> None:
    request = Request(id="q", model="m", prompt=np.zeros(length, np.int32), sampling=SamplingParams(), page_size=16)
    assert request.page_aligned(fraction) == position


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_page_aligned_refuses_what_is_no_fraction(fraction: float) -> None:
    request = Request(id="q", model="m", prompt=np.zeros(4, np.int32), sampling=SamplingParams())
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        request.page_aligned(fraction)
