from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.http_support import CONTEXT, Call, FakeCore, chat, completion, ids, post, text_model

from microserve.runtime.config import RouterConfig
from microserve.runtime.errors import Busy, Draining

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def ask(
    path: str,
    content: Any,
    *,
    core: FakeCore | None = None,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> Call:
    async def run() -> Call:
        serving = core if core is not None else FakeCore()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await Call(serving.app(), method, path, body, headers).finish()

    return asyncio.run(run())


def get(path: str, *, core: FakeCore | None = None) -> Call:
    return ask(path, b"", core=core, method="GET")


# --- pages


def test_models() -> None:
    answer = get("/v1/models").json()
    assert answer["object"] == "list"
    assert [entry["id"] for entry in answer["data"]] == ["demo"]
    assert answer["data"][0]["object"] == "model"
    assert answer["data"][0]["max_model_len"] == CONTEXT
    assert answer["data"][0]["owned_by"] == "microserve"


def test_one_model_is_the_lists_entry() -> None:
    async def run() -> None:
        app = FakeCore().app()
        listed = (await Call(app, "GET", "/v1/models", b"").finish()).json()["data"]
        assert (await Call(app, "GET", "/v1/models/demo", b"").finish()).json() == listed[0]
        assert (await Call(app, "GET", "/v1/models/", b"").finish()).json()["data"] == listed

    asyncio.run(run())


def test_an_unknown_model() -> None:
    call = get("/v1/models/a/b")
    assert call.status == 404
    assert call.error == {
        "message": "model 'a/b' is not served",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_health_and_readiness() -> None:
    assert (get("/health").status, get("/ready").status) == (200, 200)
    assert get("/ready").json() == {"ready": True, "reasons": [], "models": ["demo"]}
    alone = get("/ready", core=FakeCore(ready=False))
    assert (alone.status, alone.json()["reasons"]) == (503, ["no engine is ready"])
    leaving = get("/ready", core=FakeCore(draining=True))
    assert (leaving.status, leaving.json()["reasons"]) == (503, ["the router is draining"])
    full = get("/ready", core=FakeCore(full=True))
    assert (full.status, full.json()["reasons"]) == (503, ["all places are taken, and the queue is full"])


def test_metrics() -> None:
    call = get("/metrics")
    assert call.status == 200
    assert call.headers["content-type"].startswith("text/plain")
    assert b"microserve_router_active 0.0" in call.body


def test_tokenize_and_back() -> None:
    call = ask("/tokenize", {"prompt": "héllo", "return_token_strs": True})
    assert call.json()["tokens"] == ids("héllo")
    assert call.json()["count"] == len(ids("héllo"))
    assert call.json()["max_model_len"] == CONTEXT
    assert len(call.json()["token_strs"]) == call.json()["count"]
    assert ask("/detokenize", {"model": "demo", "tokens": ids("héllo")}).json() == {"prompt": "héllo"}


def test_tokenize_a_conversation() -> None:
    call = ask("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    text = text_model().render_chat([{"role": "user", "content": "hi"}])
    assert call.json()["tokens"] == text_model().encode(text, add_special_tokens=False).tolist()


def test_tokenize_takes_one_of_two() -> None:
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}):
        assert ask("/tokenize", body).error["message"] == "exactly one of 'prompt' and 'messages' is required"
    assert ask("/detokenize", {"tokens": [100_000]}).error["param"] == "tokens"


# --- ids, routes, bodies


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"my-id_1.2:3", True), (b"", False), (b"has space", False), (b"x" * 129, False), (b"new\nline", False)],
)
def test_a_sane_request_id_is_kept(given: bytes, kept: bool) -> None:
    call = ask("/health", b"", method="GET", headers=[(b"x-request-id", given)])
    assert (call.headers["x-request-id"] == given.decode()) is kept
    assert call.headers["x-request-id"]


def test_every_answer_has_a_request_id() -> None:
    calls = [get("/nowhere"), get(CHAT), ask(CHAT, b"{"), ask(CHAT, chat(), core=FakeCore(answers=["x"]))]
    assert [call.status for call in calls] == [404, 405, 400, 200]
    assert all(call.headers["x-request-id"].startswith("req-") for call in calls)


def test_unknown_routes_and_methods_have_the_shape_of_errors() -> None:
    assert get("/v1/nowhere").error["code"] == "not_found"
    assert get("/v1/nowhere").error["type"] == "invalid_request_error"
    wrong = get(COMPLETIONS)
    assert wrong.error["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


def test_a_body_that_is_too_large() -> None:
    core = FakeCore(config=RouterConfig(max_body_bytes=1024))
    call = ask(COMPLETIONS, completion(prompt="x" * 2000), core=core)
    assert (call.status, call.error["code"]) == (413, "too_large")
    assert call.headers["connection"] == "close"


def test_a_body_that_is_too_large_without_saying_so() -> None:
    async def run() -> Call:
        app = FakeCore(config=RouterConfig(max_body_bytes=1024)).app()
        call = Call(app, "POST", COMPLETIONS, b"x" * 2000, [])
        return await call.finish()

    assert asyncio.run(run()).status == 413


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"model": "\xff"}', b"[" * 5000])
def test_bad_json(body: bytes) -> None:
    call = ask(CHAT, body)
    assert call.status == 400
    assert "not valid JSON" in call.error["message"] or "must be a JSON object" in call.error["message"]


# --- what is refused, by name


@pytest.mark.parametrize(
    ("path", "body", "param", "part"),
    [
        (CHAT, [], None, "must be a JSON object"),
        (CHAT, {"messages": []}, "model", "required"),
        (CHAT, {"model": "demo"}, "messages", "required"),
        (CHAT, chat(messages=[]), "messages", "empty"),
        (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content", "required"),
        (CHAT, chat(messages=[{"content": "x"}]), "messages[0].role", "required"),
        (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].role", "not supported"),
        (CHAT, chat(messages=[{"role": "user", "content": 3}]), "messages[0].content", "Expected"),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages[0].content[0].type",
            "only 'text'",
        ),
        (CHAT, chat(messages=[{"role": "user", "content": "x", "weight": 1}]), "messages[0].weight", "unknown"),
        (CHAT, chat(messages=[{"rol": "user", "content": "x"}]), "messages[0].rol", "did you mean 'role'?"),
        (
            CHAT,
            chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
            "messages[0].tool_calls",
            "not supported",
        ),
        (CHAT, chat(max_token=3), "max_token", "did you mean 'max_tokens'?"),
        (CHAT, chat(zzzzzz=3), "zzzzzz", "unknown field"),
        (CHAT, chat(max_tokens="3"), "max_tokens", "Expected"),
        (CHAT, chat(max_tokens=0), "max_tokens", ">= 1"),
        (CHAT, chat(max_tokens=True), "max_tokens", "Expected"),
        (CHAT, chat(temperature=-1), "temperature", ">= 0"),
        (CHAT, chat(top_p=0), "top_p", "> 0"),
        (CHAT, chat(n=0), "n", ">= 1"),
        (CHAT, chat(n=1000), "n", "<= 128"),
        (CHAT, chat(stream="yes"), "stream", "Expected"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "needs 'stream'"),
        (CHAT, chat(stream=True, stream_options={"usage": True}), "stream_options.usage", "there are: include_usage"),
        (CHAT, chat(stop=[""]), "stop", "empty"),
        (CHAT, chat(stop=["x", 1]), "stop[1]", "Expected"),
        (CHAT, chat(stop=[str(at) for at in range(17)]), "stop", "at most 16"),
        (CHAT, chat(logit_bias={"a": 1}), "logit_bias", "Expected"),
        (CHAT, chat(logit_bias={"99999": 1}), "logit_bias", "vocabulary"),
        (CHAT, chat(stop_token_ids=[99999]), "stop_token_ids", "vocabulary"),
        (CHAT, chat(min_tokens=5, max_tokens=4), "min_tokens", "more than"),
        (CHAT, chat(top_logprobs=2), "top_logprobs", "needs 'logprobs'"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "<= 20"),
        (CHAT, chat(tools=[{"type": "function"}]), "tools", "not supported"),
        (CHAT, chat(functions=[{"name": "f"}]), "functions", "not supported"),
        (CHAT, chat(tool_choice="required"), "tool_choice", "not supported"),
        (CHAT, chat(response_format={"type": "json_object"}), "response_format", "only the response format"),
        (CHAT, chat(modalities=["audio"]), "modalities", "only the modality"),
        (CHAT, chat(reasoning_effort="high"), "reasoning_effort", "not supported"),
        (CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs.messages", "cannot be set"),
        (CHAT, chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message", "exclude"),
        (COMPLETIONS, completion(prompt=[]), "prompt", "empty"),
        (COMPLETIONS, completion(prompt=""), "prompt", "empty"),
        (COMPLETIONS, completion(prompt=[[]]), "prompt", "empty"),
        (COMPLETIONS, completion(prompt=["a", 1]), "prompt", "list of texts"),
        (COMPLETIONS, completion(prompt=[1, 99999]), "prompt", "99999 is not in the vocabulary"),
        (COMPLETIONS, completion(prompt=[-1]), "prompt", "not in the vocabulary"),
        (COMPLETIONS, completion(prompt=[2**70]), "prompt", "not in the vocabulary"),
        (COMPLETIONS, completion(prompt={"a": 1}), "prompt", "Expected"),
        (COMPLETIONS, completion(max_tokens=2**70), "max_tokens", "<= 9223372036854775807"),
        (COMPLETIONS, completion(n=2**70), "n", "<= 128"),
        (COMPLETIONS, completion(seed=2**64), "seed", "<= 9223372036854775807"),
        (COMPLETIONS, completion(top_k=2**70), "top_k", "<= 9223372036854775807"),
        (COMPLETIONS, completion(top_k=-(2**70)), "top_k", ">= -1"),
        (COMPLETIONS, completion(min_tokens=2**64), "min_tokens", "<= 9223372036854775807"),
        (COMPLETIONS, completion(logprobs=2**70), "logprobs", "<= 20"),
        (COMPLETIONS, completion(best_of=2**70), "best_of", "<= 9223372036854775807"),
        (COMPLETIONS, completion(stop_token_ids=[2**70]), "stop_token_ids", "vocabulary"),
        (COMPLETIONS, completion(logit_bias={str(2**70): 1}), "logit_bias", "vocabulary"),
        (CHAT, chat(max_completion_tokens=2**70), "max_completion_tokens", "<= 9223372036854775807"),
        (CHAT, chat(logprobs=True, top_logprobs=2**70), "top_logprobs", "<= 20"),
        (CHAT, chat(stop_token_ids=[2**70]), "stop_token_ids", "vocabulary"),
        (CHAT, chat(logit_bias={str(2**70): 1}), "logit_bias", "vocabulary"),
        ("/detokenize", {"tokens": [2**70]}, "tokens", "vocabulary"),
        (COMPLETIONS, completion(prompt=["a"] * 65, n=2), "n", "more than 128"),
        (COMPLETIONS, completion(suffix="x"), "suffix", "not supported"),
        (COMPLETIONS, completion(best_of=2), "best_of", "not supported"),
        (COMPLETIONS, completion(echo=True, logprobs=1), "echo", "not supported"),
        (COMPLETIONS, completion(logprobs=True), "logprobs", "Expected"),
        (COMPLETIONS, completion(messages=[]), "messages", "unknown"),
    ],
)
def test_what_cannot_be_served_is_named(path: str, body: Any, param: str | None, part: str) -> None:
    core = FakeCore()
    call = ask(path, body, core=core)
    assert call.status == 400, call.body
    assert (call.error["type"], call.error["code"]) == ("invalid_request_error", "invalid_request")
    assert call.error["param"] == param
    assert part in call.error["message"]
    assert core.generations == []


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "prompt_cache_key": "x"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"tools": None, "stop": None, "seed": None, "n": None, "stream": None, "logit_bias": None, "audio": None},
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ]
        },
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}]},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    call = ask(CHAT, chat(**fields), core=FakeCore(answers=["ok"]))
    assert call.status == 200, call.body
    assert call.json()["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, completion(prompt=[1] * CONTEXT), "prompt"),
        (COMPLETIONS, completion(max_tokens=CONTEXT), "max_tokens"),
        (CHAT, chat(messages=[{"role": "user", "content": "é" * 2 * CONTEXT}]), "messages"),
        (CHAT, chat(max_tokens=CONTEXT), "max_tokens"),
        (CHAT, chat(max_completion_tokens=CONTEXT), "max_completion_tokens"),
    ],
)
def test_what_does_not_fit_the_context(path: str, body: Any, param: str) -> None:
    call = ask(path, body)
    assert call.status == 400
    assert (call.error["code"], call.error["param"]) == ("context_length_exceeded", param)


def test_an_unknown_model_cannot_generate() -> None:
    call = ask(CHAT, chat(model="other"))
    assert (call.status, call.error["code"], call.error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("core", "status", "code", "after"),
    [
        (FakeCore(answers=[Busy("full", retry_after=3.2)]), 429, "busy", ("4", "3200")),
        (FakeCore(answers=[Draining("going")]), 503, "draining", ("1", "1000")),
        (FakeCore(ready=False), 503, "no_engine", ("3", "2500")),
    ],
)
def test_unavailability_says_when_to_come_back(core: FakeCore, status: int, code: str, after: tuple[str, str]) -> None:
    call = ask(CHAT, chat(), core=core)
    assert (call.status, call.error["code"]) == (status, code)
    assert (call.headers["retry-after"], call.headers["retry-after-ms"]) == after
    assert call.error["type"] == ("rate_limit_error" if status == 429 else "server_error")


def test_a_bug_costs_only_its_own_request() -> None:
    async def run() -> None:
        core = FakeCore()
        app = core.app()
        call = post(app, CHAT, chat())
        await core.started.wait()
        core.generations[0].fail(RuntimeError("secret"))
        await call.finish()
        assert (call.status, call.error["code"]) == (500, "internal")
        assert "secret" not in call.error["message"]
        assert call.headers["x-request-id"] in call.error["message"]
        core.answers.append("fine")
        assert (await post(app, CHAT, chat()).finish()).status == 200

    asyncio.run(run())
