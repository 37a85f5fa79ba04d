"""The codec: what is not a message of ours is a `ProtocolError`, whatever it is; token ids as raw int32."""

from __future__ import annotations

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from microserve.runtime.codec import decode, encode, pack_tokens, unpack_tokens
from microserve.runtime.errors import InvalidRequest, ProtocolError, TooLarge, VersionMismatch
from microserve.runtime.frames import HEADER, HEADER_BYTES, pack, salvage, unpack
from microserve.runtime.messages import MAX_MESSAGE_BYTES, Call, Ping, Stats, Tokenize, Tokens

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
TAGS = st.sampled_from(["hello", "ping", "call", "part", "reply", "failure", "batch", "event", "stats", "zzz"])
FIELDS = st.dictionaries(st.text(max_size=6) | st.just("id"), PLAIN)
NEARLY = st.builds(lambda tag, rest: {**rest, "t": tag}, TAGS, FIELDS)


@given(st.binary(max_size=300))
@example(b"\x91" * 5000)
@example(b"\x81" * 5000)
def test_random_bytes_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)
    salvage(memoryview(data))


@given(NEARLY)
def test_almost_a_message_is_a_message_or_a_protocol_error(value: dict[str, object]) -> None:
    data = msgpack.packb(value)
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


@given(st.binary(max_size=100))
def test_random_frames_are_typed_errors(data: bytes) -> None:
    with pytest.raises((ProtocolError, VersionMismatch)):
        unpack(data)


def test_too_large_a_message_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ProtocolError, match="67108865 bytes"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(TooLarge, match="at most 67108864"):
        pack(Tokenize(text="x" * MAX_MESSAGE_BYTES), 1)


def test_a_frame_is_a_header_and_plain_msgpack() -> None:
    frame = pack(Call(id=7, body=Stats()), 2**40 + 1)
    assert frame[:HEADER_BYTES] == bytes([1]) + (2**40 + 1).to_bytes(8, "little")
    assert msgpack.unpackb(frame[HEADER_BYTES:]) == {"t": "call", "id": 7, "body": {"t": "stats"}}
    assert unpack(frame) == (2**40 + 1, Call(id=7, body=Stats()))


@pytest.mark.parametrize("frame", [b"", b"\x01", HEADER.pack(1, 1)])
def test_a_frame_needs_a_header_and_a_body(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match="too short"):
        unpack(frame)


def test_a_frame_of_another_version_is_told_apart() -> None:
    with pytest.raises(VersionMismatch, match="version 2; we speak 1"):
        unpack(b"\x02" + pack(Ping(), 1)[1:])


@pytest.mark.parametrize(
    ("value", "tag", "id"),
    [
        ({"t": "call", "id": 3, "body": {"t": "from_the_future"}}, "call", 3),
        ({"t": "call", "id": -3}, "call", None),
        ({"t": "call", "id": "x"}, "call", None),
        ({"t": "batch", "items": 5}, "batch", None),
        ({"t": 5}, "", None),
        ({"id": 5}, "", None),
        ([1, 2], "", None),
    ],
)
def test_salvage(value: object, tag: str, id: int | None) -> None:
    remains = salvage(memoryview(msgpack.packb(value)))
    assert (remains.tag, remains.id) == (tag, id)


PIN = {"t": "cache_pin", "prompt": b"", "ttl": 0}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (PIN, "ttl", "'ttl': Expected `float` > 0.0"),
        ({"t": "cache_pin", "ttl": 1}, "prompt", "'prompt' is required"),
        (
            {"t": "generate", "messages": [{"role": 1}]},
            "messages[0].role",
            "'messages[0].role': Expected `str`, got `int`",
        ),
        ({"t": "engine_call", "engine_id": "a", "body": PIN}, "ttl", "'ttl': Expected `float` > 0.0"),
        ({"t": "engine_call", "engine_id": 5, "body": PIN}, "engine_id", "'engine_id': Expected `str`, got `int`"),
    ],
)
def test_a_wrong_argument_of_a_call_is_told_by_name(body: object, param: str, message: str) -> None:
    refusal = salvage(memoryview(msgpack.packb({"t": "call", "id": 3, "body": body}))).refusal
    assert refusal is not None
    assert (refusal.param, refusal.message) == (param, message)


@pytest.mark.parametrize(
    "value",
    [
        {"t": "call", "id": 3, "body": {"t": "from_the_future", "ttl": 0}},
        {"t": "call", "id": 3, "body": {"ttl": 0}},
        {"t": "call", "id": 3, "body": 5},
        {"t": "call", "id": 3},
        {"t": "call", "id": 3, "body": {"t": "engine_call", "engine_id": "a", "body": {"t": "from_the_future"}}},
        {"t": "call", "id": 3, "body": {"t": "engine_call", "engine_id": "a", "body": {"t": 5}}},
        {"t": "call", "id": 3, "body": {"t": "engine_call", "engine_id": "a", "body": {}}},
        {"t": "call", "id": 3, "body": {"t": "stats"}, "budget": "long"},
        {"t": "call", "id": -3, "body": PIN},
        {"t": "reply", "id": 3, "body": PIN},
    ],
)
def test_what_is_no_call_of_a_known_verb_has_no_wrong_argument(value: object) -> None:
    assert salvage(memoryview(msgpack.packb(value))).refusal is None


def test_a_frame_that_is_cut_short_has_no_wrong_argument() -> None:
    whole = msgpack.packb({"t": "call", "id": 3, "body": PIN | {"prompt": b"x" * 9}})
    assert salvage(memoryview(whole[:-1])).refusal is None


def test_unknown_fields_are_ignored_and_defaults_are_left_out() -> None:
    assert decode(msgpack.packb({"t": "ping", "since": 3})) == Ping()
    assert msgpack.unpackb(encode(Ping())) == {"t": "ping"}
    assert msgpack.unpackb(encode(Tokens(ids=b"\1\0\0\0"))) == {"t": "tokens", "ids": b"\1\0\0\0"}


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_tokens_survive(values: list[int]) -> None:
    data = pack_tokens(values)
    assert len(data) == 4 * len(values)
    back = unpack_tokens(data)
    assert back.dtype == np.int32
    assert back.tolist() == values
    assert pack_tokens(back) == data


def test_tokens_are_little_endian() -> None:
    assert pack_tokens([1, 258]) == b"\1\0\0\0\2\1\0\0"
    assert pack_tokens(np.array([1, 258], dtype=">i8")) == b"\1\0\0\0\2\1\0\0"


@pytest.mark.parametrize("values", [[-1], [2**31], [1.5], ["a"], [[1, 2]], [[1], [2, 3]], [2**70], [1, 2**63], 5])
def test_what_is_no_list_of_tokens_is_refused(values: object) -> None:
    with pytest.raises(InvalidRequest):
        pack_tokens(values)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_token_bytes_of_a_bad_length_are_refused(size: int) -> None:
    with pytest.raises(InvalidRequest, match="multiple of 4"):
        unpack_tokens(bytes(size))
