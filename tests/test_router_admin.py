"""Strategies changed live: over HTTP, over the bus, by the client and by the command, on a real router core."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.http_support import Call, FakeCore
from tests.router_support import World
from tests.virtual_time import run_virtual

from microserve.router.bus_api import RouterApi
from microserve.runtime.async_client import AsyncClient
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import InvalidRequest, ModelNotFound, NotFound
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    CacheMatch,
    CacheMatched,
    Generated,
    Meet,
    PeerAddress,
    StartGenerate,
    Tokens,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

ADDRESS = "memory://router"


def with_client(work: Callable[[World, AsyncClient], Coroutine[Any, Any, None]], **config: Any) -> None:
    async def main() -> None:
        async with World(**config) as world:
            api = RouterApi(world.core, clock=world.network.clock)
            await world.bus.listen(ADDRESS, api.server)
            bus = world.network.bus(Peer("client", "c", 1))
            client = AsyncClient(ADDRESS, bus=bus)
            try:
                await work(world, client)
            finally:
                await client.close()
                await api.close()
                await bus.close()

    run_virtual(main())


def test_the_client_sets_checks_lists_and_rolls_back() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        before = world.core.versions.default.version
        assert [each.version for each in (await client.strategies()).active] == [before]
        checked = await client.set_strategy("data_parallel", model="m", dry_run=True)
        assert checked.dry_run
        assert len((await client.strategies()).active) == 1
        await client.set_strategy("data_parallel", model="m")
        assert [each.model for each in (await client.strategies()).active] == ["", "m"]
        assert [each.version for each in (await client.rollback_strategy(model="m")).active] == [before]
        with pytest.raises(InvalidRequest, match="no strategy 'nonsense'"):
            await client.set_strategy("nonsense")
        await world.add("x", model="there")
        with pytest.raises(ModelNotFound, match="no engine serves model 'their'; there is: there"):
            await client.set_strategy("data_parallel", model="their")
        with pytest.raises(NotFound):
            await client.rollback_strategy(model="m")

    with_client(work)


def test_a_call_on_an_engine_goes_through_and_comes_back() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")
        engine.answers[CacheMatch] = lambda call: call.reply(CacheMatched(tokens=32))
        assert await client.engine("a").cache_match([1, 2, 3]) == 32
        assert engine.calls[-1].body == CacheMatch(prompt=pack_tokens([1, 2, 3]))
        with pytest.raises(NotFound, match="no engine 'b'; there are: a"):
            await client.engine("b").cache_match([1])

    with_client(work)


def test_a_stream_on_an_engine_goes_through_part_by_part() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")

        def answer(call: Any) -> None:
            call.part(Tokens(ids=pack_tokens([5])))
            call.part(Tokens(ids=pack_tokens([6])))
            call.reply(Generated(finish_reason="length", usage=Usage(prompt_tokens=2, completion_tokens=2)))

        engine.answers[StartGenerate] = answer
        ids, end = await client.engine("a").generate([1, 2], max_tokens=2, lease=9, begin=-1)
        assert (ids, end.finish_reason) == ([5, 6], "length")
        body = engine.started()
        assert (body.lease, body.begin, body.sampling.max_tokens) == (9, -1, 2)

    with_client(work)


def test_leaving_a_stream_ends_it_at_the_engine() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        engine = await world.add("a")
        engine.answers[StartGenerate] = lambda call: call.part(Tokens(ids=pack_tokens([5])))
        stream = client.engine("a").start_generate([1, 2], max_tokens=2)
        assert isinstance(await anext(stream), Tokens)
        await stream.aclose()  # type: ignore[attr-defined]
        await world.settle()
        assert len(engine.cancelled) == 1

    with_client(work)


def test_what_is_between_engines_is_refused() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        await world.add("a")
        engine = client.engine("a")
        with pytest.raises(InvalidRequest, match="between engines"):
            await engine._call(Meet(peers=[]))

    with_client(work)


def test_engines_of_a_model_are_told_of_each_other_once_for_changes_that_come_together() -> None:
    async def work(world: World, client: AsyncClient) -> None:
        a, b = await world.add("a"), await world.add("b")
        other = await world.add("x", model="another")
        await asyncio.sleep(0.1)  # virtual time
        await world.settle()
        address = {name: PeerAddress(engine_id=name, epoch=1, endpoint=f"memory://{name}-1") for name in "ab"}
        assert a.met == [Meet(peers=[address["b"]])]
        assert b.met == [Meet(peers=[address["a"]])]
        assert other.met == []

    with_client(work)


# --- HTTP ----------------------------------------------------------------------------------------------------------


def request(core: FakeCore, method: str, path: str, body: bytes = b"") -> Call:
    async def main() -> Call:
        return await Call(core.app(), method, path, body).finish()

    return asyncio.run(main())


def asked(core: FakeCore, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    answer = request(core, method, path, b"" if body is None else json.dumps(body).encode())
    return answer.status, answer.json()


def test_http_lists_sets_and_rolls_back() -> None:
    core = FakeCore()
    status, found = asked(core, "GET", "/admin/strategies")
    assert status == 200
    assert [each["name"] for each in found["active"]] == ["data_parallel"]
    assert "data_parallel" in [each["name"] for each in found["strategies"]]
    status, found = asked(core, "PUT", "/admin/strategies", {"name": "data_parallel", "model": "demo"})
    assert (status, found["dry_run"], found["active"][0]["model"]) == (200, False, "demo")
    status, told = asked(core, "PUT", "/admin/strategies", {"strategy": "data_parallel"})
    assert (status, told["error"]["message"]) == (
        400,
        "unknown field 'strategy'; there are: name, settings, model, share, dry_run",
    )
    status, found = asked(core, "POST", "/admin/strategies/rollback", {"model": "demo"})
    assert (status, found["active"][0]["model"], len(asyncio.run(core.versions.show()).active)) == (200, "", 1)
    assert len(asyncio.run(core.versions.show()).history) == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("PUT", "/admin/strategies", {"name": "nonsense"}, 400, "name"),
        ("PUT", "/admin/strategies", {"name": "data_parallel", "settings": {"x": 1}}, 400, "x"),
        ("PUT", "/admin/strategies", {"name": "data_parallel", "share": 7}, 400, "share"),
        ("PUT", "/admin/strategies", {"name": "data_parallel", "share": 1e-320}, 400, "share"),
        ("PUT", "/admin/strategies", {"name": "prefill_decode", "settings": {"min_remote": 10**26}}, 400, "min_remote"),
        ("POST", "/admin/strategies/rollback", {"number": 99}, 404, "number"),
        ("POST", "/admin/strategies/rollback", {"number": 0}, 400, "number"),
    ],
)
def test_http_refuses_in_the_shape_that_clients_know(
    method: str, path: str, body: object, status: int, param: str
) -> None:
    core = FakeCore()
    got, answer = asked(core, method, path, body)
    assert (got, answer["error"]["param"]) == (status, param)
    assert len(asyncio.run(core.versions.show()).history) == 1


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"name": 1}', b'{"name": "data_parallel", "nonsense": 1}', b"{}"])
def test_http_refuses_a_body_that_is_none(body: bytes) -> None:
    core = FakeCore()
    answer = request(core, "PUT", "/admin/strategies", body)
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"


def test_other_methods_are_refused() -> None:
    assert request(FakeCore(), "DELETE", "/admin/strategies").status == 405
