"""What every message is made of."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1

MAX_MESSAGE_BYTES = 64 << 20
"""A larger message is refused before it is decoded."""

TokenBytes = bytes
"""Token ids, little-endian int32."""

Name = Annotated[str, Meta(max_length=256)]
# JSON has integers of any size, and msgpack has not: what arrives as JSON is bounded where it arrives.
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NonNegative = Annotated[int, Meta(ge=0, le=2**63 - 1)]
CallId = Annotated[int, Meta(ge=0)]
"""Chosen by the caller: anything that msgpack can say."""
Seconds = Annotated[float, Meta(ge=0)]
LeaseId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
PageBytes = bytes
"""Page numbers, little-endian int32."""


class Message(Struct, tag_field="t", omit_defaults=True, kw_only=True, frozen=True):
    """Base of everything that travels."""


class ErrorInfo(Struct, omit_defaults=True, frozen=True):
    """A `MicroserveError` as data."""

    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None
