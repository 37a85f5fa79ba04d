"""The router's verbs over a bus: engines announce, clients generate, cancel, list and ask."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import pytest
from tests.router_support import World, engine_info, folder_with_tokenizer
from tests.virtual_time import run_virtual

from microserve.router.bus_api import RouterApi
from microserve.router.text import TextModel
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import (
    Cancelled,
    ContextLengthExceeded,
    Draining,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PeerLost,
)
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    Announce,
    ChatMessage,
    Detokenize,
    Detokenized,
    Finished,
    Generate,
    Heartbeat,
    Info,
    Leave,
    ListModels,
    Load,
    Models,
    Ok,
    SamplingParams,
    Status,
    StatusReply,
    TextChunk,
    Tokenize,
    Tokenized,
)
from microserve.runtime.rpc import RpcClient, connect

if TYPE_CHECKING:
    from pathlib import Path

    from microserve.runtime.rpc import CallStream

ADDRESS = "memory://router"


class Served(World):
    """A world whose router listens on the bus, with a client."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.api = RouterApi(self.core, clock=self.network.clock)
        await self.bus.listen(ADDRESS, self.api.server)
        self.client_bus = self.network.bus(Peer("client", "c", 1))
        self.client: RpcClient = await connect(self.client_bus, ADDRESS)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.api.close()
        await self.client_bus.close()
        await super().__aexit__(*error)

    def start(self, **fields: Any) -> CallStream:
        return self.client.stream(Generate(**fields))


async def with_text(world: Served, folder: Path) -> Any:
    path = folder_with_tokenizer(folder)
    # As if it had been loaded in its thread: there are no threads in virtual time.
    world.core._texts[path] = TextModel.load(path)
    return await world.add("a", path=path)


def test_an_engine_announces_itself_and_leaves() -> None:
    async def main() -> None:
        async with Served() as world:
            info = engine_info("a")
            with pytest.raises(NotFound):
                await world.client.call(Heartbeat(engine_id="a", epoch=1, load=Load()))
            assert await world.client.call(Announce(info=info, load=Load())) == Ok()
            assert await world.client.call(Heartbeat(engine_id="a", epoch=1, load=Load(running=2))) == Ok()
            status = await world.client.call(Status())
            assert isinstance(status, StatusReply)
            assert [(e.info.engine_id, e.load.running, e.state) for e in status.engines] == [("a", 2, "connecting")]
            assert await world.client.call(Leave(engine_id="a", epoch=1)) == Ok()
            assert world.core.fleet.links == []

    run_virtual(main())


def test_generate_with_ids_streams_tokens_and_finishes() -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await world.add("a")
            stream = world.start(prompt=pack_tokens([1, 2]), sampling=SamplingParams(max_tokens=2), request_id="mine")
            await world.settle()
            assert engine.started().request_id == "mine"
            await engine.tokens(5)
            await engine.finish(6)
            parts = [part async for part in stream]
            assert parts == [TextChunk(text="", ids=pack_tokens([token])) for token in (5, 6)]
            assert stream.reply == Finished(
                finish_reason="length",
                usage=stream.reply.usage,  # type: ignore[union-attr]
                request_id="mine",
                strategy=world.core.versions.default.version,
                engine="a",
            )

    run_virtual(main())


def test_generate_with_text_and_a_stop_string(tmp_path: Path) -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await with_text(world, tmp_path)
            stream = world.start(text="abc", stop=("zz",))
            await world.settle()
            assert unpack_tokens(engine.started().prompt).tolist() == [0, 1, 2]
            await engine.tokens(3, 4)
            await engine.tokens(25)
            await engine.tokens(25)
            parts = [part async for part in stream]
            assert "".join(part.text for part in parts if isinstance(part, TextChunk)) == "de"
            reply = stream.reply
            assert isinstance(reply, Finished)
            assert (reply.finish_reason, reply.usage.completion_tokens) == ("stop", 4)
            assert len(engine.cancelled) == 1
            assert world.charges() == {"a": (0, 0)}

    run_virtual(main())


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await with_text(world, tmp_path)
            stream = world.start(messages=[ChatMessage("user", "ab"), ChatMessage("assistant", "c")])
            await world.settle()
            assert unpack_tokens(engine.started().prompt).tolist() == [20, 0, 1, 0, 2]
            await engine.finish(7)
            assert [part.text async for part in stream if isinstance(part, TextChunk)] == ["h"]

    run_virtual(main())


def test_cancel_and_a_lost_client_free_the_engine() -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await world.add("a")
            first = world.start(prompt=pack_tokens([1]))
            await world.settle()
            await engine.tokens(4)
            first.cancel()
            await world.settle()
            assert len(engine.cancelled) == 1
            second = world.start(prompt=pack_tokens([1]))
            await world.settle()
            world.network.kill(world.client_bus.me)
            await world.settle()
            assert len(engine.cancelled) == 2
            assert world.charges() == {"a": (0, 0)}
            assert world.api.server.open_calls == 0
            del second

    run_virtual(main())


def test_a_call_that_is_cancelled_before_it_runs_is_answered() -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await world.add("a")
            stream = world.start(prompt=pack_tokens([1]))
            stream.cancel()
            with pytest.raises(Cancelled):
                await anext(stream)
            await world.settle()
            assert world.api.server.open_calls == 0
            assert engine.open == []

    run_virtual(main())


def test_errors_arrive_as_they_are() -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await world.add("a")
            ids = pack_tokens([1, 2])
            wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
                ({"prompt": ids, "model": "x"}, ModelNotFound, "model 'x' is not served"),
                ({}, InvalidRequest, "exactly one of text, prompt and messages, not none"),
                ({"prompt": ids, "text": "a"}, InvalidRequest, "not text and prompt"),
                ({"prompt": b"123"}, InvalidRequest, "multiple of 4"),
                ({"prompt": b""}, InvalidRequest, "the prompt is empty"),
                ({"text": "a"}, InvalidRequest, "give token ids"),
                ({"prompt": ids, "stop": ("x",)}, InvalidRequest, "give token ids"),
                ({"prompt": ids, "sampling": SamplingParams(max_tokens=99)}, ContextLengthExceeded, "maximum context"),
            ]
            for fields, kind, message in wrong:
                with pytest.raises(kind, match=message):
                    await anext(world.start(**fields))
            with pytest.raises(InvalidRequest, match="a router does not serve Info"):
                await world.client.call(Info())
            assert engine.calls == []
            stream = world.start(prompt=ids)
            await world.settle()
            await engine.tokens(3)
            await engine.die()
            assert isinstance(await anext(stream), TextChunk)
            with pytest.raises(PeerLost):
                await anext(stream)
            world.core.drain()
            with pytest.raises(Draining):
                await anext(world.start(prompt=ids))

    run_virtual(main())


def test_the_callers_budget_is_the_requests_deadline() -> None:
    async def main() -> None:
        async with Served() as world:
            await world.add("a")
            stream = world.client.stream(Generate(prompt=pack_tokens([1]), timeout=30.0), budget=10.0)
            await world.settle()
            (generation,) = world.core._active
            assert generation.deadline - generation.created_at == pytest.approx(10.0)
            stream.cancel()
            await world.settle()

    run_virtual(main())


def test_models_and_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        async with Served() as world:
            assert await world.client.call(ListModels()) == Models(models=[])
            engine = await with_text(world, tmp_path)
            assert await world.client.call(ListModels()) == Models(models=[engine.info.model])
            assert await world.client.call(Tokenize(text="cab")) == Tokenized(ids=pack_tokens([2, 0, 1]))
            assert await world.client.call(Detokenize(ids=pack_tokens([2, 0, 1]))) == Detokenized(text="cab")
            with pytest.raises(ModelNotFound):
                await world.client.call(Tokenize(text="cab", model="x"))

    run_virtual(main())


def test_closing_ends_what_is_being_answered() -> None:
    async def main() -> None:
        async with Served() as world:
            engine = await world.add("a")
            stream = world.start(prompt=pack_tokens([1]))
            await world.settle()
            await world.api.close()
            with pytest.raises(Cancelled):
                await anext(stream)
            await asyncio.sleep(0)
            await world.settle()
            assert engine.open == []

    run_virtual(main())
