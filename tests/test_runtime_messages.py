"""Conformance: every message is plain msgpack that any msgpack library reads and writes.

Examples are made by looking at the structs, so that a message that is added is tested without being named here.
"""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from msgspec import inspect

from microserve.runtime import messages
from microserve.runtime.codec import decode, encode
from microserve.runtime.messages import AnyMessage, Call, EngineVerb, Message, Part, Reply, ReplyBody, RouterVerb


def tagged() -> list[type[Message]]:
    """Every message of the module, in the order of their definition."""
    return [
        cls
        for cls in vars(messages).values()
        if isinstance(cls, type) and issubclass(cls, Message) and cls is not Message
    ]


def members(union: Any) -> tuple[type, ...]:
    return tuple(union.__args__)


def example(kind: inspect.Type, full: bool, depth: int = 0) -> Any:
    """A value of that type: with every optional field (`full`), or as little as is allowed."""
    match kind:
        case inspect.UnionType(types=types):
            rest = [each for each in types if not isinstance(each, inspect.NoneType)]
            if len(rest) < len(types) and not full:
                return None
            return example(rest[depth % len(rest)], full, depth)
        case inspect.StructType(fields=fields, cls=cls):
            given = {f.name: example(f.type, full, depth + 1) for f in fields if full or f.required}
            return cls(**given) if not cls.__struct_config__.array_like else cls(*given.values())
        case inspect.StrType():
            return "ä→ text"
        case inspect.IntType():
            return 1
        case inspect.FloatType():
            return 0.75
        case inspect.BoolType():
            return True
        case inspect.BytesType():
            return b"\x01\x00\xff\xfe"
        case inspect.ListType(item_type=item):
            return [example(item, full, number) for number in range(3)]
        case inspect.VarTupleType(item_type=item):
            return tuple(example(item, full, number) for number in range(3))
        case inspect.DictType(key_type=key, value_type=value):
            return {example(key, full): example(value, full)}
        case _:
            raise TypeError(f"no example for {kind}: teach the test about it")


def cases() -> list[Any]:
    return [
        pytest.param(example(inspect.type_info(cls), full), id=f"{cls.__name__}-{'full' if full else 'least'}")
        for cls in tagged()
        for full in (False, True)
    ]


@pytest.mark.parametrize("message", cases())
def test_the_msgpack_package_reads_and_writes_every_message(message: Message) -> None:
    data = encode(message)
    plain = msgpack.unpackb(data, strict_map_key=False)
    assert plain["t"] == type(message).__struct_config__.tag
    again = msgpack.packb(plain)
    assert msgspec.msgpack.decode(again, type=type(message)) == message
    assert msgspec.msgpack.decode(data, type=type(message)) == message


@pytest.mark.parametrize("message", cases())
def test_every_message_travels_on_its_own_or_as_a_body(message: Message) -> None:
    if isinstance(message, members(AnyMessage)):
        travels: list[Message] = [message]
    elif isinstance(message, members(EngineVerb | RouterVerb)):
        travels = [Call(id=1, body=message, budget=2.5)]  # type: ignore[arg-type]
    else:
        assert isinstance(message, members(ReplyBody)), f"{type(message).__name__} has no place in any union"
        travels = [Part(id=1, body=message), Reply(id=1, body=message)]  # type: ignore[arg-type]
    for whole in travels:
        assert decode(encode(whole)) == whole
        assert decode(msgpack.packb(msgpack.unpackb(encode(whole), strict_map_key=False))) == whole


def test_tags_are_unique() -> None:
    tags = [cls.__struct_config__.tag for cls in tagged()]
    assert len(set(tags)) == len(tags) >= 38


def test_the_least_message_leaves_out_what_has_a_default() -> None:
    for cls in tagged():
        least = msgpack.unpackb(encode(example(inspect.type_info(cls), False)), strict_map_key=False)
        required = {field.encode_name for field in msgspec.structs.fields(cls) if field.required}
        assert set(least) == required | {"t"}, cls.__name__
