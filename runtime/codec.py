"""One encoder and one decoder for everything that travels: msgpack through msgspec."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from microserve.runtime.errors import InvalidRequest, MicroserveError, ProtocolError, error_from_code
from microserve.runtime.messages import MAX_MESSAGE_BYTES, AnyMessage, ErrorInfo, Message

TokenArray = npt.NDArray[np.int32]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)

# Token ids on the wire are little-endian whatever the host is.
_WIRE_INT32 = np.dtype("<i4")


def encode(message: Message) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> AnyMessage:
    """The message in `frame`. Raises `ProtocolError` for anything that is not one of ours."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(frame)} bytes; at most {MAX_MESSAGE_BYTES} are accepted")
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from error


def pack_tokens(tokens: npt.ArrayLike) -> bytes:
    """Token ids as wire bytes. Raises `InvalidRequest` for ids that do not fit an int32."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # lists of different lengths, for one
        raise InvalidRequest(f"token ids must be a flat list of integers: {error}") from error
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidRequest(f"token ids must be a flat list of integers, not {array.dtype} of shape {array.shape}")
    if array.dtype != np.int32 and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise InvalidRequest("token ids must lie between 0 and 2147483647")
    return array.astype(_WIRE_INT32, copy=False).tobytes()


def unpack_tokens(data: bytes) -> TokenArray:
    """Wire bytes as an int32 array of shape [n] (read-only view of `data`). Raises `InvalidRequest` on a bad length."""
    if len(data) % 4:
        raise InvalidRequest(f"token bytes must be a multiple of 4 long, not {len(data)}")
    return np.frombuffer(data, dtype=_WIRE_INT32).astype(np.int32, copy=False)


def to_info(error: MicroserveError) -> ErrorInfo:
    """The error as it travels."""
    return ErrorInfo(error.code, error.message, error.param, error.retry_after)


def from_info(info: ErrorInfo) -> MicroserveError:
    """The error that `info` describes, of its own class."""
    return error_from_code(info.code, info.message, param=info.param, retry_after=info.retry_after)
