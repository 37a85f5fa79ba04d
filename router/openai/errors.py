"""Errors in OpenAI's shape: the status, the headers that say when to come back, and the JSON body."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from microserve.runtime.errors import MicroserveError, Unavailable

_encode = msgspec.json.Encoder().encode

DEFAULT_RETRY_AFTER: Final = 1.0
"""Seconds, for an unavailability that does not say."""

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

Headers = list[tuple[bytes, bytes]]


class NoSuchRoute(MicroserveError):
    """The path is not one of ours."""

    code = "not_found"
    http_status = 404


class MethodNotAllowed(MicroserveError):
    """The path is ours, and the method is not served there."""

    code = "method_not_allowed"
    http_status = 405


def error_body(error: MicroserveError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`; also what a broken stream says as its last event."""
    status = error.http_status
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return _encode({"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}})


def error_headers(error: MicroserveError) -> Headers:
    """`Retry-After` (whole seconds, rounded up) and `retry-after-ms` where a retry makes sense."""
    after = error.retry_after
    if after is None:
        if not isinstance(error, Unavailable):
            return []
        after = DEFAULT_RETRY_AFTER
    return [
        (b"retry-after", b"%d" % max(1, math.ceil(after))),
        (b"retry-after-ms", b"%d" % max(1, math.ceil(after * 1000))),
    ]
