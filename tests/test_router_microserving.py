"""The engines' verbs over HTTP, on a real router core with engines that do as they are told."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.http_support import Call
from tests.router_support import ScriptedEngine, World, engine_info, folder_with_tokenizer
from tests.virtual_time import run_virtual

from microserve.router.http import make_app
from microserve.router.microserving.verbs import VERBS
from microserve.router.text import TextModel
from microserve.runtime import messages
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import Busy, LeaseNotFound, StaleEpoch

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

ROOT = "/microserving/v1"
ADDRESS = messages.KvAddress(
    engine_id="a",
    epoch=7,
    endpoint="tcp://x:1",
    lease=2**53 - 1,
    matched=16,
    end=40,
    pages=pack_tokens([3, 4]),
    layout=engine_info("a").layout,
)


class Door:
    """A router's HTTP, with one engine "a"."""

    def __init__(self, world: World, engine: ScriptedEngine) -> None:
        self.world = world
        self.engine = engine
        self._app = make_app(world.core)

    def start(self, method: str, path: str, body: Any = None) -> Call:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return Call(self._app, method, ROOT + path, data)

    async def ask(self, method: str, path: str, body: Any = None) -> Call:
        return await self.start(method, path, body).finish()

    async def post(self, verb: str, body: Any = None) -> Call:
        return await self.ask("POST", f"/engines/a/{verb}", body)

    def answer(self, kind: type, reply: Any) -> None:
        self.engine.answers[kind] = lambda call: call.reply(reply)


def run(work: Callable[[Door], Coroutine[Any, Any, None]], **info: Any) -> None:
    async def main() -> None:
        async with World() as world:
            await work(Door(world, await world.add("a", **info)))

    run_virtual(main())


def test_engines_are_listed_and_described() -> None:
    async def work(door: Door) -> None:
        listed = (await door.ask("GET", "/engines")).json()["engines"]
        assert [(each["info"]["engine_id"], each["state"], each["info"]["layout"]["page_size"]) for each in listed] == [
            ("a", "ready", 16)
        ]
        link = messages.PeerLink(engine_id="b", epoch=1, state="ready", transport="shm")
        door.answer(
            messages.Info, messages.InfoReply(info=engine_info("a"), load=messages.Load(running=2), links=[link])
        )
        found = (await door.ask("GET", "/engines/a")).json()
        assert (found["load"]["running"], found["links"][0]["transport"]) == (2, "shm")
        missing = await door.ask("GET", "/engines/b")
        assert (missing.status, missing.error["param"]) == (404, "engine_id")

    run(work)


def test_what_prep_recv_answers_is_what_remote_send_takes() -> None:
    async def work(door: Door) -> None:
        door.answer(messages.PrepRecv, messages.Prepared(address=ADDRESS))
        prepared = await door.post("prep_recv", {"prompt": [1, 2, 3], "end": -1, "expect_tokens": 5, "sub_id": "s"})
        assert prepared.status == 200
        address = prepared.json()
        assert (address["lease"], address["pages"], address["matched"]) == (2**53 - 1, [3, 4], 16)
        assert door.engine.calls[-1].body == messages.PrepRecv(
            request_id="s", sub_id="s", prompt=pack_tokens([1, 2, 3]), end=-1, expect_tokens=5
        )
        door.answer(messages.RemoteSend, messages.SendReport(computed=8, reused=16, bytes=99, seconds=0.5))
        sent = await door.post("remote_send", {"prompt": [1, 2, 3], "address": address, "sub_id": "t"})
        assert sent.json() == {"computed": 8, "reused": 16, "bytes": 99, "seconds": 0.5, "push_seconds": 0.0}
        body = door.engine.calls[-1].body
        assert isinstance(body, messages.RemoteSend)
        assert (body.address, body.begin, body.end) == (ADDRESS, 16, 40)

    run(work)


@pytest.mark.parametrize(
    ("verb", "body", "message", "reply", "answer"),
    [
        (
            "commit",
            {"lease": 5, "wait": 2.0, "sub_id": "s"},
            messages.Commit(request_id="s", sub_id="s", lease=5, wait=2.0),
            messages.Committed(committed_until=32),
            {"committed_until": 32},
        ),
        ("release", {"lease": 5}, messages.Release(lease=5), messages.Released(outcome="freed"), {"outcome": "freed"}),
        (
            "forgo",
            {"lease": 5, "begin": 0, "end": 16},
            messages.Forgo(lease=5, begin=0, end=16),
            messages.Released(outcome="quarantined"),
            {"outcome": "quarantined"},
        ),
        ("abort", {"sub_id": "s"}, messages.Abort(sub_id="s"), messages.Aborted(outcome="freed"), {"outcome": "freed"}),
        (
            "cache_match",
            {"prompt": [1, 2]},
            messages.CacheMatch(prompt=pack_tokens([1, 2])),
            messages.CacheMatched(tokens=16),
            {"tokens": 16},
        ),
        (
            "cache_pin",
            {"prompt": [1], "ttl": 60},
            messages.CachePin(prompt=pack_tokens([1]), ttl=60),
            messages.CacheMatched(tokens=16),
            {"tokens": 16},
        ),
        (
            "cache_unpin",
            {"prompt": [1]},
            messages.CacheUnpin(prompt=pack_tokens([1])),
            messages.CacheMatched(tokens=0),
            {"tokens": 0},
        ),
        ("cache_evict", {}, messages.CacheEvict(), messages.CacheEvicted(pages=4), {"pages": 4}),
        ("cache_evict", None, messages.CacheEvict(), messages.CacheEvicted(pages=4), {"pages": 4}),
        (
            "cache_prefixes",
            {"count": 1},
            messages.CachePrefixes(count=1),
            messages.Prefixes(
                prefixes=[messages.PrefixEntry(prompt=pack_tokens([7, 8]), pages=1, references=0, pinned=True)]
            ),
            {"prefixes": [{"prompt": [7, 8], "pages": 1, "references": 0, "pinned": True}]},
        ),
        ("drain", None, messages.Drain(), messages.Ok(), {}),
        ("resume", {}, messages.Resume(), messages.Ok(), {}),
        (
            "stats",
            None,
            messages.Stats(),
            messages.StatsReply(values={"x": 1.0}),
            {"values": {"x": 1.0}, "integrity": "ok"},
        ),
    ],
)
def test_each_verb_becomes_its_message_and_its_answer_comes_back(
    verb: str, body: Any, message: Any, reply: Any, answer: dict[str, Any]
) -> None:
    async def work(door: Door) -> None:
        door.answer(type(message), reply)
        got = await door.post(verb, body)
        assert (got.status, got.json()) == (200, answer)
        assert door.engine.calls[-1].body == message

    run(work)


def generate(call: Any) -> None:
    call.part(messages.Tokens(ids=pack_tokens([5, 6])))
    call.part(messages.Tokens(ids=pack_tokens([7])))
    usage = messages.Usage(prompt_tokens=2, completion_tokens=3)
    call.reply(messages.Generated(finish_reason="length", usage=usage, received_tokens=16))


BODY = {"prompt": [1, 2], "begin": -1, "lease": 9, "sampling": {"max_tokens": 3, "temperature": 0.0}}


def test_start_generate_answers_whole() -> None:
    async def work(door: Door) -> None:
        door.engine.answers[messages.StartGenerate] = generate
        answer = (await door.post("start_generate", BODY)).json()
        assert (answer["tokens"], answer["finish_reason"], answer["received_tokens"]) == ([5, 6, 7], "length", 16)
        body = door.engine.started()
        assert (body.begin, body.lease, body.sampling.max_tokens) == (-1, 9, 3)

    run(work)


def test_start_generate_streams_events() -> None:
    async def work(door: Door) -> None:
        door.engine.answers[messages.StartGenerate] = generate
        call = await door.post("start_generate", BODY | {"stream": True})
        assert call.headers["content-type"].startswith("text/event-stream")
        *parts, end, done = call.events()
        assert [token for part in parts for token in part["tokens"]] == [5, 6, 7]
        assert (end["finish_reason"], end["tokens"], done) == ("length", [], "[DONE]")

    run(work)


def test_an_error_before_the_first_token_has_a_status_and_one_after_it_is_an_event() -> None:
    async def work(door: Door) -> None:
        def lost(call: Any) -> None:
            call.fail(LeaseNotFound("gone"))

        def broken(call: Any) -> None:
            call.part(messages.Tokens(ids=pack_tokens([5])))
            call.fail(Busy("no more"))

        door.engine.answers[messages.StartGenerate] = lost
        call = await door.post("start_generate", BODY | {"stream": True})
        assert (call.status, call.error["code"]) == (404, "lease_not_found")
        door.engine.answers[messages.StartGenerate] = broken
        call = await door.post("start_generate", BODY | {"stream": True})
        assert call.status == 200
        assert call.events()[-1]["error"]["code"] == "busy"

    run(work)


def test_a_client_that_hangs_up_ends_the_call_at_the_engine() -> None:
    async def work(door: Door) -> None:
        call = door.start("POST", "/engines/a/start_generate", BODY)
        await door.world.settle()
        await asyncio.sleep(0.01)  # virtual time
        assert len(door.engine.open) == 1
        call.hang_up()
        await call.finish()
        await door.world.settle()
        assert len(door.engine.cancelled) == 1

    run(work)


def test_text_is_tokenised_by_the_engines_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with World() as world:
            path = folder_with_tokenizer(tmp_path)
            # As if it had been loaded in its thread: there are no threads in virtual time.
            world.core._texts[path] = TextModel.load(path)
            door = Door(world, await world.add("a", path=path))
            door.answer(messages.CacheMatch, messages.CacheMatched(tokens=0))
            assert (await door.post("cache_match", {"text": "abz"})).status == 200
            assert door.engine.calls[-1].body == messages.CacheMatch(prompt=pack_tokens([0, 1, 25]))

    run_virtual(main())


@pytest.mark.parametrize(
    ("verb", "body", "status", "param"),
    [
        ("prep_recv", {}, 400, "prompt"),
        ("prep_recv", {"prompt": [1], "text": "a"}, 400, "prompt"),
        ("prep_recv", {"prompt": []}, 400, "prompt"),
        ("prep_recv", {"prompt": [-1]}, 400, "prompt[0]"),
        ("prep_recv", {"prompt": [1], "ends": 3}, 400, "ends"),
        ("prep_recv", b"{", 400, None),
        ("remote_send", {"prompt": [1]}, 400, "address"),
        ("remote_send", {"prompt": [1], "address": {"lease": "x"}}, 400, "address.lease"),
        ("start_generate", {"prompt": [1], "sampling": {"max_tokens": 0}}, 400, "sampling.max_tokens"),
        ("start_generate", {"prompt": [1], "sampling": {"max_token": 5}}, 400, "sampling.max_token"),
        ("release", {"lease": -1}, 400, "lease"),
        ("cache_pin", {"prompt": [1], "ttl": 0}, 400, "ttl"),
        ("drain", {"now": True}, 400, "now"),
        ("meet", {}, 404, None),
    ],
)
def test_what_is_wrong_is_told_and_reaches_no_engine(verb: str, body: Any, status: int, param: str | None) -> None:
    async def work(door: Door) -> None:
        call = await door.post(verb, body)
        assert (call.status, call.error["param"]) == (status, param)
        assert door.engine.calls == []

    run(work)


@pytest.mark.parametrize(
    ("verb", "body", "message"),
    [
        ("start_generate", {"prompt": [1], "samplin": {}}, "unknown field 'samplin'; did you mean 'sampling'?"),
        (
            "start_generate",
            {"prompt": [1], "sampling": {"max_token": 5}},
            "unknown field 'sampling.max_token'; did you mean 'max_tokens'?",
        ),
        ("start_generate", {"prompt": [1], "sampling": {"zzz": 5}}, "unknown field 'sampling.zzz'"),
        (
            "remote_send",
            {"prompt": [1], "address": {"leas": 1}},
            "unknown field 'address.leas'; did you mean 'lease'?",
        ),
    ],
)
def test_what_may_have_been_meant_is_a_field_of_the_same_place(verb: str, body: Any, message: str) -> None:
    async def work(door: Door) -> None:
        assert (await door.post(verb, body)).error["message"] == message

    run(work)


def test_an_engines_refusal_keeps_its_code_and_status() -> None:
    async def work(door: Door) -> None:
        door.engine.refuse_with = StaleEpoch("that address is of an earlier incarnation", param="address")
        call = await door.post("release", {"lease": 1})
        assert (call.status, call.error["code"], call.error["param"]) == (409, "stale_epoch", "address")

    run(work)


def content_of(response: dict[str, Any]) -> dict[str, str]:
    """The schemas of an answer by media type."""
    return {kind: each["schema"]["$ref"].rpartition("/")[2] for kind, each in response["content"].items()}


OPTIONAL_BODY = {"cache_evict", "cache_prefixes", "info", "stats", "drain", "resume"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_body_is_required_where_the_description_says_so(verb: str) -> None:
    async def work(door: Door) -> None:
        door.engine.refuse_with = Busy("asked")
        assert (await door.post(verb)).status == (429 if verb in OPTIONAL_BODY else 400)

    run(work)


def test_it_describes_itself() -> None:
    async def work(door: Door) -> None:
        document = (await door.ask("GET", "/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert {f"{ROOT}/engines/{{id}}/{name}" for name in VERBS} <= set(document["paths"])
        body = document["components"]["schemas"]["PrepRecvBody"]
        assert body["properties"]["prompt"]["anyOf"][0]["items"]["minimum"] == 0
        ok = document["paths"][f"{ROOT}/engines"]["get"]["responses"]["200"]
        assert content_of(ok) == {"application/json": "EnginesBody"}
        schemas = document["components"]["schemas"]
        assert schemas["EnginesBody"]["properties"]["engines"]["items"] == {"$ref": "#/components/schemas/FleetEngine"}
        assert {"info", "load", "state"} <= set(schemas["FleetEngine"]["properties"])
        generating = document["paths"][f"{ROOT}/engines/{{id}}/start_generate"]["post"]["responses"]["200"]["content"]
        assert generating["application/json"]["schema"]["$ref"].endswith("/GeneratedBody")
        events = generating["text/event-stream"]["schema"]
        assert (events["type"], events["contentMediaType"]) == ("string", "text/event-stream")
        assert [each["$ref"].rpartition("/")[2] for each in events["contentSchema"]["anyOf"]] == [
            "TokensEvent",
            "GeneratedBody",
            "ErrorBody",
        ]
        text = json.dumps(document)
        for name in set(document["components"]["schemas"]):
            assert f"#/components/schemas/{name}" in text
        bodies = {name: document["paths"][f"{ROOT}/engines/{{id}}/{name}"]["post"]["requestBody"] for name in VERBS}
        assert all("application/json" in body["content"] for body in bodies.values())
        assert {name for name, body in bodies.items() if not body["required"]} == OPTIONAL_BODY
        tagged = [
            name
            for name, schema in schemas.items()
            if "t" in {*schema.get("required", ()), *schema.get("properties", ())}
        ]
        assert tagged == [], "the tag is the bus's"
        page = await door.ask("GET", "/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert b"<script" not in page.body
        assert b"prep_recv" in page.body

    run(work)
