"""The error tree: codes are stable, unique where they must be, and survive the wire."""

from __future__ import annotations

import pytest

from microserve.runtime import errors
from microserve.runtime.codec import from_info, to_info
from microserve.runtime.errors import InternalError, MicroserveError, error_from_code

GENERAL = {errors.MicroserveError, errors.CallerError, errors.Unavailable, errors.PeerError}
"""Classes to catch, never to raise."""

RAISED = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, MicroserveError) and cls not in GENERAL
]


@pytest.mark.parametrize("cls", RAISED, ids=lambda cls: cls.__name__)
def test_every_error_crosses_the_wire_as_itself(cls: type[MicroserveError]) -> None:
    error = cls("what happened", param="prompt", retry_after=1.5)
    back = from_info(to_info(error))
    assert type(back) is cls
    assert (back.message, back.param, back.retry_after) == ("what happened", "prompt", 1.5)
    assert str(back) == "what happened"


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in RAISED]
    assert len(set(codes)) == len(codes) == 25


def test_a_code_of_a_newer_peer_is_an_internal_error_that_shows_it() -> None:
    error = error_from_code("quantum_flux", "too much", retry_after=3.0)
    assert type(error) is InternalError
    assert error.message == "quantum_flux: too much"
    assert error.retry_after == 3.0


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("context_length_exceeded", 400),
        ("lease_too_large", 400),
        ("unauthorized", 401),
        ("forbidden", 403),
        ("not_found", 404),
        ("model_not_found", 404),
        ("too_large", 413),
        ("busy", 429),
        ("draining", 503),
        ("no_engine", 503),
        ("peer_lost", 502),
        ("protocol_error", 502),
        ("version_mismatch", 502),
        ("deadline_exceeded", 504),
        ("cancelled", 499),
        ("internal", 500),
        ("config", 500),
        ("checkpoint", 500),
    ],
)
def test_http_status(code: str, status: int) -> None:
    assert error_from_code(code, "x").http_status == status
