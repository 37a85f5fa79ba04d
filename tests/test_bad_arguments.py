"""Bad arguments of the engines' verbs: the same refusal by REST, by the router's bus and by the engine's own."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec import inspect
from tests.http_support import Call
from tests.router_support import ScriptedEngine, World, engine_info
from tests.virtual_time import run_virtual

from microserve.router.bus_api import RouterApi
from microserve.router.http import make_app
from microserve.router.microserving.verbs import VERBS
from microserve.router.openai.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from microserve.runtime import messages
from microserve.runtime.async_client import AsyncClient
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import InvalidRequest
from microserve.runtime.ids import Peer
from microserve.runtime.messages import EngineCall, SamplingParams
from microserve.runtime.rpc import connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from microserve.runtime.messages import EngineVerb

ADDRESS = "memory://router"
LAYOUT = engine_info().layout
KV: dict[str, Any] = {"engine_id": "a", "epoch": 7, "endpoint": "x", "lease": 1, "matched": 0, "end": 16}
IDS = pack_tokens([1])
NAMED = {"request_id": "r", "sub_id": "s"}


def prep(**fields: Any) -> tuple[str, dict[str, Any], EngineVerb]:
    return "prep_recv", {"prompt": [1], **NAMED, **fields}, messages.PrepRecv(prompt=IDS, **NAMED | fields)


def send(**fields: Any) -> tuple[str, dict[str, Any], EngineVerb]:
    address = messages.KvAddress(pages=pack_tokens([3]), **{**KV, "layout": LAYOUT, **fields})
    given = {**KV, "pages": [3], "layout": LAYOUT, **fields}
    body = messages.RemoteSend(prompt=IDS, address=address, begin=0, end=16, **NAMED)
    return "remote_send", {"prompt": [1], "address": given, **NAMED}, body


def start(sampling: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any], EngineVerb]:
    params = {} if sampling is None else {"sampling": sampling}
    body = messages.StartGenerate(prompt=IDS, sampling=SamplingParams(**sampling or {}), **NAMED | fields)
    return "start_generate", {"prompt": [1], **NAMED, **params, **fields}, body


def pin(ttl: Any) -> tuple[str, dict[str, Any], EngineVerb]:
    return "cache_pin", {"prompt": [1], "ttl": ttl}, messages.CachePin(prompt=IDS, ttl=ttl)


def forgo(**fields: Any) -> tuple[str, dict[str, Any], EngineVerb]:
    given: dict[str, Any] = {"lease": 1, "begin": 0, "end": 16, **fields}
    return "forgo", given, messages.Forgo(**given)


def commit(**fields: Any) -> tuple[str, dict[str, Any], EngineVerb]:
    given: dict[str, Any] = {"lease": 1, **NAMED, **fields}
    return "commit", given, messages.Commit(**given)


BAD = [
    (pin(0), "ttl"),
    (pin("soon"), "ttl"),
    (commit(lease=-5), "lease"),
    (commit(wait=-1.0), "wait"),
    (prep(expect_tokens=-4), "expect_tokens"),
    (prep(expect_tokens=2**63), "expect_tokens"),
    (prep(expect_tokens=2**64), "expect_tokens"),
    (prep(sub_id="s" * 1000), "sub_id"),
    (prep(end=10**30), "end"),
    (prep(end=-(10**30)), "end"),
    (prep(end="all"), "end"),
    (send(epoch=2**64), "address.epoch"),
    (send(matched=2**64), "address.matched"),
    (send(lease=-1), "address.lease"),
    (send(layout=msgspec.structs.replace(LAYOUT, page_size=2**64)), "address.layout.page_size"),
    (start(begin=2**64), "begin"),
    (start(prior_output=-1), "prior_output"),
    (start({"max_tokens": 0}), "sampling.max_tokens"),
    (start({"max_tokens": 2**70}), "sampling.max_tokens"),
    (start({"top_k": 2**64}), "sampling.top_k"),
    (start({"min_tokens": 2**64}), "sampling.min_tokens"),
    (start({"seed": 2**64}), "sampling.seed"),
    (start({"temperature": -1.0}), "sampling.temperature"),
    (start({"logit_bias": {2**64: 1.0}}), "sampling.logit_bias"),
    (forgo(begin=10**25), "begin"),
    (forgo(end=2**63), "end"),
    (("release", {"lease": 2**64}, messages.Release(lease=2**64)), "lease"),
    (("abort", {"sub_id": "s" * 257}, messages.Abort(sub_id="s" * 257)), "sub_id"),
    (("cache_prefixes", {"count": 1001}, messages.CachePrefixes(count=1001)), "count"),
]


class Doors:
    """Every way to an engine "a": the router's HTTP and bus, and the engine's own bus."""

    def __init__(self, world: World, engine: ScriptedEngine, client: AsyncClient) -> None:
        self.world = world
        self.engine = engine
        self.client = client
        self._app = make_app(world.core)

    async def rest(self, verb: str, body: dict[str, Any]) -> tuple[int, str, str | None]:
        data = json.dumps(body, default=msgspec.to_builtins).encode()
        call = await Call(self._app, "POST", f"/microserving/v1/engines/a/{verb}", data).finish()
        assert call.error["type"] == "invalid_request_error"
        return call.status, call.error["code"], call.error["param"]

    async def bus(self, body: EngineVerb) -> tuple[int, str, str | None]:
        rpc = await self.client.connect()
        return await refused(rpc.call(EngineCall(engine_id="a", body=body), budget=5))

    async def engines_bus(self, body: EngineVerb) -> tuple[int, str, str | None]:
        bus = self.world.network.bus(Peer("client", "direct", 1))
        try:
            rpc = await connect(bus, self.engine.info.endpoint)
            return await refused(rpc.call(body, budget=5))
        finally:
            await bus.close()


async def refused(call: Awaitable[object]) -> tuple[int, str, str | None]:
    """Status, code and param of the refusal of `call`."""
    with pytest.raises(InvalidRequest) as caught:
        await call
    return caught.value.http_status, caught.value.code, caught.value.param


def run(work: Callable[[Doors], Awaitable[None]]) -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            api = RouterApi(world.core, clock=world.network.clock)
            await world.bus.listen(ADDRESS, api.server)
            bus = world.network.bus(Peer("client", "c", 1))
            client = AsyncClient(ADDRESS, bus=bus)
            try:
                await work(Doors(world, engine, client))
                assert engine.calls == []
                assert world.bus.statistics().malformed == engine.bus.statistics().malformed == 0
            finally:
                await client.close()
                await api.close()
                await bus.close()

    run_virtual(main())


@pytest.mark.parametrize(
    ("call", "param"), [pytest.param(call, param, id=f"{call[0]}-{param}-{at}") for at, (call, param) in enumerate(BAD)]
)
def test_the_same_refusal_by_every_way(call: tuple[str, dict[str, Any], EngineVerb], param: str) -> None:
    async def work(doors: Doors) -> None:
        verb, given, body = call
        expected = (400, "invalid_request", param)
        assert await doors.rest(verb, given) == expected
        assert await doors.bus(body) == expected
        assert await doors.engines_bus(body) == expected

    run(work)


def test_the_python_client_raises_what_the_engine_would_say() -> None:
    async def work(doors: Doors) -> None:
        client, engine = doors.client, doors.client.engine("a")
        address = messages.KvAddress(pages=b"", layout=LAYOUT, **KV | {"epoch": 2**64})
        calls: list[tuple[Awaitable[object], str]] = [
            (engine.cache_pin([1], ttl=0), "ttl"),
            (engine.commit(-5), "lease"),
            (engine.prep_recv([1], expect_tokens=-4), "expect_tokens"),
            (engine.prep_recv([1], sub_id="s" * 1000), "sub_id"),
            (engine.prep_recv([1], request_id="r", sub_id="\ud800"), "sub_id"),
            (engine.prep_recv([1], end=10**30), "end"),
            (engine.remote_send([1], address), "address.epoch"),
            (engine.generate([1], max_tokens=2**70), "max_tokens"),
            (engine.generate([1], begin=2**64), "begin"),
            (engine.forgo(1, 10**25, 0), "begin"),
            (client.generate([1], top_k=2**70), "top_k"),
            (client.generate([1], request_id="r" * 257), "request_id"),
            (client.generate([1], model="\ud800"), "model"),
            (client.set_strategy("data_parallel", share=-1), "share"),
            (client.set_strategy("data_parallel", {"x": 2**70}), "settings"),
            (client.rollback_strategy(number=10**30), "number"),
            (client.events(after=-1), "after"),
            (client.requests(limit=0), "limit"),
        ]
        found = [await refused(call) for call, _ in calls]
        assert found == [(400, "invalid_request", param) for _, param in calls]
        rpc = await client.connect()
        assert rpc.open_calls == 0

    run(work)


def integers(kind: inspect.Type, at: str) -> Iterator[tuple[str, inspect.IntType]]:
    """Every integer within a type, and where it is."""
    match kind:
        case inspect.IntType():
            yield at, kind
        case inspect.UnionType(types=types):
            for each in types:
                yield from integers(each, at)
        case inspect.StructType(fields=fields):
            for field in fields:
                yield from integers(field.type, f"{at}.{field.encode_name}")
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            yield from integers(item, at)
        case inspect.DictType(key_type=key, value_type=value):
            yield from integers(key, at)
            yield from integers(value, at)


CHECKED_LATER = {
    *("CompletionRequest.prompt", "DetokenizeRequest.tokens"),
    *(f"{kind}.{name}" for kind in ("CompletionRequest", "ChatRequest") for name in ("logit_bias", "stop_token_ids")),
}
"""Token ids, held against the vocabulary: `test_router_http` has a case for each."""


def test_no_integer_of_a_request_is_larger_than_the_bus_carries() -> None:
    kinds = [verb.body for verb in VERBS.values()]
    kinds += [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
    found = [each for kind in kinds for each in integers(inspect.type_info(kind), kind.__name__)]
    bounds = {at: (kind.ge, kind.le) for at, kind in found if at not in CHECKED_LATER}
    assert {at for at, _ in found} >= CHECKED_LATER | {"ForgoBody.begin", "StartGenerateBody.sampling.top_k"}
    assert [
        at
        for at, (least, most) in bounds.items()
        if least is None or most is None or not -(2**63) <= least <= most < 2**63
    ] == []


def test_bad_arguments_do_not_disturb_their_session() -> None:
    async def work(doors: Doors) -> None:
        doors.engine.answers[messages.CacheMatch] = lambda call: call.reply(messages.CacheMatched(tokens=16))
        engine = doors.client.engine("a")
        answers = await asyncio.gather(
            engine.cache_match([1]), engine.cache_pin([1], ttl=0), engine.cache_match([2]), return_exceptions=True
        )
        assert [type(each) for each in answers] == [int, InvalidRequest, int]
        doors.engine.calls.clear()

    run(work)
