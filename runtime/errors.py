"""The one error tree. Where an error stands says whose fault it was; its `code` is what travels.

MicroserveError
├── CallerError                  the caller must change something          4xx, never retried
│   ├── InvalidRequest           400 invalid_request
│   │   ├── ContextLengthExceeded 400 context_length_exceeded
│   │   └── LeaseTooLarge        400 lease_too_large (it can be served there, but not by a lease)
│   ├── Unauthorized             401 unauthorized
│   ├── Forbidden                403 forbidden
│   ├── NotFound                 404 not_found
│   │   ├── ModelNotFound        404 model_not_found
│   │   └── LeaseNotFound        404 lease_not_found (ended, expired, or never was)
│   ├── Conflict                 409 conflict        (the range is claimed, the lease is in use, the call has ended)
│   ├── StaleEpoch               409 stale_epoch     (the address is of an earlier incarnation)
│   ├── LayoutMismatch           409 layout_mismatch (the pages of two engines differ; the message shows how)
│   └── TooLarge                 413 too_large
├── Unavailable                  nobody's fault; may be retried elsewhere or later
│   ├── Busy                     429 busy            (carries retry_after)
│   ├── Draining                 503 draining
│   └── NoEngine                 503 no_engine
├── PeerError                    the other process failed                  502/504
│   ├── PeerLost                 502 peer_lost       (died, silent, or the session broke)
│   ├── ProtocolError            502 protocol_error  (it said something malformed)
│   ├── VersionMismatch          502 version_mismatch
│   ├── TransferFailed           502 transfer_failed (pages could not be pushed)
│   └── DeadlineExceeded         504 deadline_exceeded
├── Cancelled                    499 cancelled       the caller asked for it
├── InternalError                500 internal        our fault: a bug
├── ConfigError                  start-up: the operator's configuration
│   └── AddressError             start-up: an address that cannot be had now
└── CheckpointError              start-up: the model's files
"""

from __future__ import annotations

from typing import ClassVar


class MicroserveError(Exception):
    """Base of every error that microserve raises on purpose.

    `code` is stable and travels on the wire and over HTTP; `param` names the offending argument;
    `retry_after` is seconds after which a retry makes sense.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class CallerError(MicroserveError):
    """The caller must change something before trying again."""

    code = "invalid_request"
    http_status = 400


class InvalidRequest(CallerError):
    """An argument is wrong. Nothing was changed."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the prompt and the asked-for output, does not fit the model's context."""

    code = "context_length_exceeded"


class LeaseTooLarge(InvalidRequest):
    """The prompt needs more pages than the engine's leases may hold together. Without a lease it may well be served."""

    code = "lease_too_large"


class Unauthorized(CallerError):
    """No valid credentials."""

    code = "unauthorized"
    http_status = 401


class Forbidden(CallerError):
    """Valid credentials that do not allow this."""

    code = "forbidden"
    http_status = 403


class NotFound(CallerError):
    """The thing that was named does not exist."""

    code = "not_found"
    http_status = 404


class ModelNotFound(NotFound):
    """No engine serves that model."""

    code = "model_not_found"


class LeaseNotFound(NotFound):
    """The lease has ended, has expired, or never was."""

    code = "lease_not_found"


class Conflict(CallerError):
    """Somebody else has it, or it has ended already: a claimed range, a lease in use, a finished call."""

    code = "conflict"
    http_status = 409


class StaleEpoch(CallerError):
    """The address or message is of an earlier incarnation of the process."""

    code = "stale_epoch"
    http_status = 409


class LayoutMismatch(CallerError):
    """Two engines' pages differ, so KV cannot move between them; the message shows the difference."""

    code = "layout_mismatch"
    http_status = 409


class TooLarge(CallerError):
    """The message or body is larger than is accepted."""

    code = "too_large"
    http_status = 413


class Unavailable(MicroserveError):
    """Not now, or not here: the same call may succeed later or elsewhere."""

    code = "busy"
    http_status = 503


class Busy(Unavailable):
    """No room: `retry_after` says when to come back."""

    code = "busy"
    http_status = 429


class Draining(Unavailable):
    """The process finishes what it has and takes nothing new."""

    code = "draining"


class NoEngine(Unavailable):
    """No engine is alive that could serve this."""

    code = "no_engine"


class PeerError(MicroserveError):
    """The process at the other end failed."""

    code = "peer_lost"
    http_status = 502


class PeerLost(PeerError):
    """The peer died, fell silent, or its session broke."""


class ProtocolError(PeerError):
    """The peer sent something that is not a message of ours."""

    code = "protocol_error"


class VersionMismatch(PeerError):
    """The peer speaks another version of the protocol."""

    code = "version_mismatch"


class TransferFailed(PeerError):
    """Pages could not be pushed to the peer."""

    code = "transfer_failed"


class DeadlineExceeded(PeerError):
    """The budget of the call ran out."""

    code = "deadline_exceeded"
    http_status = 504


class Cancelled(MicroserveError):
    """The call was cancelled by its caller. (Not `asyncio.CancelledError`, which cancels a task.)"""

    code = "cancelled"
    http_status = 499


class InternalError(MicroserveError):
    """A bug of ours: the log of the process that raised it says more."""


class ConfigError(MicroserveError):
    """The configuration is wrong; the message names file and key."""

    code = "config"


class AddressError(ConfigError):
    """An address cannot be listened at now. It may be free, or this machine's, a little later."""

    code = "address"


class CheckpointError(MicroserveError):
    """The model's files cannot be served; the message says what and where."""

    code = "checkpoint"


_BY_CODE: dict[str, type[MicroserveError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        ContextLengthExceeded,
        LeaseTooLarge,
        Unauthorized,
        Forbidden,
        NotFound,
        ModelNotFound,
        LeaseNotFound,
        Conflict,
        StaleEpoch,
        LayoutMismatch,
        TooLarge,
        Busy,
        Draining,
        NoEngine,
        PeerLost,
        ProtocolError,
        VersionMismatch,
        TransferFailed,
        DeadlineExceeded,
        Cancelled,
        InternalError,
        ConfigError,
        AddressError,
        CheckpointError,
    )
}


def error_from_code(
    code: str, message: str, *, param: str | None = None, retry_after: float | None = None
) -> MicroserveError:
    """The error that `code` names; a code we do not know (a newer peer's) becomes an `InternalError` that shows it."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return InternalError(f"{code}: {message}", param=param, retry_after=retry_after)
    return cls(message, param=param, retry_after=retry_after)
