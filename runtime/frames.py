"""Frames: what one ZMQ frame holds.

A header of 9 bytes (protocol version: u8; sequence number: u64, little-endian) and the message as msgpack. Within a
session each direction counts from 1: 1 is the `Hello` of the side that dialled, or the `Welcome` of the other. Sequence
number 0 marks an answer to somebody who has no session, `Bye` or `Failure`. Published events carry their own `seq`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from microserve.runtime.arguments import Objection, objection
from microserve.runtime.codec import decode, encode
from microserve.runtime.errors import InvalidRequest, ProtocolError, TooLarge, VersionMismatch
from microserve.runtime.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Call

if TYPE_CHECKING:
    from microserve.runtime.messages import AnyMessage, Message

HEADER: Final = struct.Struct("<BQ")
HEADER_BYTES: Final = HEADER.size
GREETING_SEQ: Final = (1).to_bytes(8, "little")
"""The sequence number of a greeting, as it stands in the header."""
MAX_FRAME_BYTES: Final = MAX_MESSAGE_BYTES + HEADER_BYTES


def pack(message: Message, seq: int) -> bytes:
    """The frame that carries `message`. Raises `TooLarge`."""
    body = encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise TooLarge(f"message of {len(body)} bytes; at most {MAX_MESSAGE_BYTES} travel")
    return HEADER.pack(PROTOCOL_VERSION, seq) + body


def unpack(frame: bytes) -> tuple[int, AnyMessage]:
    """(sequence number, message). Raises `ProtocolError` or `VersionMismatch`."""
    seq = unpack_seq(frame)
    return seq, decode(memoryview(frame)[HEADER_BYTES:])


def unpack_seq(frame: bytes) -> int:
    """The sequence number of a frame of our version. Raises `ProtocolError` or `VersionMismatch`."""
    if len(frame) <= HEADER_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes is too short")
    version, seq = HEADER.unpack_from(frame)
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(f"frame of protocol version {version}; we speak {PROTOCOL_VERSION}")
    return int(seq)


class _Head(msgspec.Struct):
    t: str
    id: int


_head_decoder = msgspec.msgpack.Decoder(_Head)
_map_decoder = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_call_decoder = msgspec.msgpack.Decoder(Call)
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Remains:
    """What can be told about a message that does not decode: a newer peer's verb, for example."""

    tag: str
    """The message's tag, or ""."""
    id: int | None
    """The id of the call that it belongs to."""
    refusal: InvalidRequest | None = None
    """What is wrong with an argument, where all else is a call of a verb that we know."""


def salvage(body: memoryview) -> Remains:
    """Looks at the tag and the call id of an undecodable message, and at a call's arguments."""
    try:
        head = _head_decoder.decode(body)
    except _UNREADABLE:
        pass
    else:
        if head.id < 0:
            return Remains(head.t, None)
        return Remains(head.t, head.id, _refusal(body) if head.t == "call" else None)
    try:
        return Remains(msgspec.msgpack.decode(_map_decoder.decode(body)["t"], type=str), None)
    except (*_UNREADABLE, KeyError):
        return Remains("", None)


def _refusal(body: memoryview) -> InvalidRequest | None:
    """Which argument of a call is wrong, if that is all that is. The call is decoded again: nobody else pays for it."""
    try:
        _call_decoder.decode(body)
    except msgspec.ValidationError as error:
        wrong = objection(error)
    except _UNREADABLE:
        return None
    else:
        return None
    field = wrong.field.split(".")
    # A call on an engine has the engine's verb in its own body.
    verbs = 2 if field[:2] == ["body", "body"] else 1
    if field[:verbs] != ["body"] * verbs or field[verbs:] in ([], ["t"]):
        # Not a call of ours, or a verb (`t`) that we do not know.
        return None
    return Objection(wrong.what, ".".join(wrong.at.split(".")[verbs:])).refusal()
