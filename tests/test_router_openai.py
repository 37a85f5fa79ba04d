from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.http_support import FakeCore, chat, completion, events_of, ids, post, text_model

from microserve.runtime.errors import Busy, PeerLost
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.http_support import Call

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def ask(path: str, body: dict[str, Any], *answers: str, core: FakeCore | None = None) -> Call:
    """One whole exchange, its choices answering with `answers`."""

    async def run() -> Call:
        serving = core if core is not None else FakeCore()
        serving.answers += answers
        call = await post(serving.app(), path, body).finish()
        assert not [
            task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.cancelling()
        ]
        return call

    return asyncio.run(run())


def follow(path: str, body: dict[str, Any], story: Callable[[FakeCore, Call], Awaitable[None]], **options: Any) -> Call:
    """An exchange that `story` steers, once its choices have started."""

    async def run() -> Call:
        core = FakeCore()
        call = post(core.app(**options), path, body)
        await core.started.wait()
        await story(core, call)
        await call.finish()
        return call

    return asyncio.run(run())


def usage(prompt: int, output: int, cached: int = 1) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# --- whole answers


def test_the_choices_of_a_request_are_told_as_such() -> None:
    """One version is chosen for all of them."""
    core = FakeCore()
    call = ask(COMPLETIONS, completion(prompt=["hello", "you"], n=2), "a", "b", "c", "d", core=core)
    name = call.headers["x-request-id"]
    assert [(each.spec.request_id, each.spec.choice_of) for each in core.generations] == [
        (name, name),
        (f"{name}-1", name),
        (f"{name}-2", name),
        (f"{name}-3", name),
    ]


def test_a_chat() -> None:
    core = FakeCore()
    call = ask(CHAT, chat(), "Hello", core=core)
    answer = call.json()
    assert call.status == 200
    assert call.headers["content-type"] == "application/json"
    assert call.headers["x-microserve-strategy"] == "test@1"
    assert call.headers["x-microserve-engine"] == "e0"
    assert answer["id"] == f"chatcmpl-{call.headers['x-request-id']}"
    assert (answer["object"], answer["model"]) == ("chat.completion", "demo")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = text_model().encode(RENDERED).tolist()
    assert core.generations[0].spec.prompt.tolist() == prompt
    assert core.generations[0].spec.request_id == call.headers["x-request-id"]
    assert answer["usage"] == usage(len(prompt), len(ids("Hello")))


def test_a_completion() -> None:
    answer = ask(COMPLETIONS, completion(), " you").json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": " you", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == usage(len(ids("hello")), len(ids(" you")))


def test_prompts_of_every_kind() -> None:
    for prompt, expected in (
        ("ab", [ids("ab")]),
        (["ab", "c"], [ids("ab"), ids("c")]),
        ([9, 8], [[9, 8]]),
        ([[9], [8, 7]], [[9], [8, 7]]),
    ):
        core = FakeCore()
        answer = ask(COMPLETIONS, completion(prompt=prompt), *["x"] * len(expected), core=core).json()
        assert [generation.spec.prompt.tolist() for generation in core.generations] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_share_a_prompt_and_differ_in_seed() -> None:
    core = FakeCore()
    answer = ask(COMPLETIONS, completion(prompt=["a", "b"], n=2, seed=2**63 - 1), "1", "2", "3", "4", core=core).json()
    assert [choice["text"] for choice in answer["choices"]] == ["1", "2", "3", "4"]
    assert [generation.spec.sampling.seed for generation in core.generations] == [2**63 - 1, -(2**63)] * 2
    names = [generation.spec.request_id for generation in core.generations]
    assert names == [names[0], *(f"{names[0]}-{number}" for number in (1, 2, 3))]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_a_prompt_is_cached_as_far_as_no_choice_computed_it() -> None:
    async def story(core: FakeCore, _call: Call) -> None:
        for generation, cached in zip(core.generations, (5, 2, 4), strict=True):
            generation.cached = cached
            generation.say("x", finish="stop")

    found = follow(CHAT, chat(n=3), story).json()["usage"]
    assert found == usage(len(text_model().encode(RENDERED)), 3, cached=2)


def test_choices_without_a_seed_have_none() -> None:
    core = FakeCore()
    ask(CHAT, chat(n=3), "1", "2", "3", core=core)
    assert [generation.spec.sampling.seed for generation in core.generations] == [None] * 3


def test_sampling_reaches_the_engine() -> None:
    core = FakeCore()
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "logit_bias": {"5": -100},
        "seed": -3,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [4, 5],
    }
    ask(CHAT, chat(max_completion_tokens=9, logprobs=True, top_logprobs=3, **fields), "x", core=core)
    assert core.generations[0].spec.sampling == SamplingParams(
        **{**fields, "logit_bias": {5: -100.0}, "stop_token_ids": (4, 5)},  # type: ignore[arg-type]
        max_tokens=9,
        logprobs=3,
    )


def test_defaults() -> None:
    core = FakeCore()
    ask(CHAT, chat(top_k=-1), "x", core=core)
    ask(COMPLETIONS, completion(), "x", core=core)
    ask(COMPLETIONS, completion(prompt=[1] * 195), "x", core=core)
    room = 200 - len(text_model().encode(RENDERED))
    assert [generation.spec.sampling for generation in core.generations] == [
        SamplingParams(max_tokens=room),
        SamplingParams(max_tokens=16),
        SamplingParams(max_tokens=5),
    ]


def test_echo() -> None:
    answer = ask(COMPLETIONS, completion(prompt=["hé", "b"], echo=True), "1", "2").json()
    assert [choice["text"] for choice in answer["choices"]] == ["hé1", "b2"]
    assert ask(COMPLETIONS, completion(prompt=ids("hé"), echo=True), "1").json()["choices"][0]["text"] == "hé1"


def test_chat_logprobs() -> None:
    answer = ask(CHAT, chat(logprobs=True, top_logprobs=2), "z!").json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [list(text_model().token_bytes(token)) for token in ids("z!")]
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids("z!"))
    assert content[0]["token"] == "z"
    seven = text_model().token_text(7)
    assert [(top["token"], top["logprob"]) for top in content[0]["top_logprobs"]] == [("z", -0.5), (seven, -9999.0)]
    plain = ask(CHAT, chat(logprobs=True), "z").json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_completion_logprobs() -> None:
    answer = ask(COMPLETIONS, completion(logprobs=1), "é🪐!").json()
    found = answer["choices"][0]["logprobs"]
    names = [text_model().token_text(token) for token in ids("é🪐!")]
    assert found["tokens"] == names
    assert found["token_logprobs"] == [-0.5] * len(names)
    assert found["top_logprobs"] == [{name: -0.5} for name in names]
    # Half characters take no room until they are whole.
    assert found["text_offset"][0] == 0
    assert found["text_offset"][-1] == len("é🪐")
    assert found["text_offset"] == sorted(found["text_offset"])


def test_token_ids_on_request() -> None:
    answer = ask(COMPLETIONS, completion(return_token_ids=True), "hey").json()
    assert answer["choices"][0]["prompt_token_ids"] == ids("hello")
    assert answer["choices"][0]["token_ids"] == ids("hey")
    talk = ask(CHAT, chat(return_token_ids=True), "hey").json()
    assert talk["prompt_token_ids"] == text_model().encode(RENDERED).tolist()
    assert talk["choices"][0]["token_ids"] == ids("hey")


def test_a_stop_string_frees_the_engine() -> None:
    async def story(core: FakeCore, _call: Call) -> None:
        core.generations[0].say("one END two")
        await core.generations[0].cancelled.wait()

    call = follow(CHAT, chat(stop="END"), story)
    choice = call.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")
    counted = call.json()["usage"]["completion_tokens"]
    assert text_model().decode(ids("one END two")[:counted]).rstrip(" ") == "one END"


def test_a_final_message_is_continued() -> None:
    core = FakeCore()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I thi"}]
    ask(CHAT, chat(messages=messages, continue_final_message=True), "nk", core=core)
    assert text_model().decode(core.generations[0].spec.prompt, skip_special_tokens=False) == RENDERED + "I thi"


# --- streams


def test_a_chat_stream() -> None:
    async def story(core: FakeCore, call: Call) -> None:
        (generation,) = core.generations
        generation.say("Hel")
        first = events_of(await call.next())
        assert [event["choices"][0]["delta"] for event in first] == [
            {"role": "assistant", "content": "", "refusal": None},
            {"content": "Hel"},
        ]
        generation.say("lo")
        assert [event["choices"][0]["delta"] for event in events_of(await call.next())] == [{"content": "lo"}]
        generation.say("", finish="length")

    call = follow(CHAT, chat(stream=True), story)
    assert call.status == 200
    assert call.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert call.headers["x-microserve-engine"] == "e0"
    *events, done = call.events()
    assert done == "[DONE]"
    assert events[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert {(event["id"], event["created"], event["model"], event["object"]) for event in events} == {
        (f"chatcmpl-{call.headers['x-request-id']}", events[0]["created"], "demo", "chat.completion.chunk")
    }
    assert all("usage" not in event for event in events)
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 3


def test_a_completion_stream() -> None:
    async def story(core: FakeCore, call: Call) -> None:
        core.generations[0].say("a")
        await call.next()
        core.generations[0].say("b", finish="stop")

    *events, done = follow(COMPLETIONS, completion(stream=True, echo=True), story).events()
    assert done == "[DONE]"
    assert [(event["choices"][0]["text"], event["choices"][0]["finish_reason"]) for event in events] == [
        ("hello", None),
        ("a", None),
        ("b", "stop"),
    ]


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_usage_comes_last_when_asked_for(path: str, body: Callable[..., dict[str, Any]]) -> None:
    call = ask(path, body(stream=True, stream_options={"include_usage": True}), "abc")
    *events, last, done = call.events()
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ids("abc"))
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert all(event["usage"] is None for event in events)


def test_a_first_token_that_ends_it_all() -> None:
    call = ask(CHAT, chat(stream=True, stream_options={"include_usage": True}), "")
    first, last, total, done = call.events()
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert total["usage"]["completion_tokens"] == 0
    assert done == "[DONE]"


def test_no_event_for_half_a_character() -> None:
    planet = ids("🪐")

    async def story(core: FakeCore, call: Call) -> None:
        from microserve.router.strategy import Chunk

        (generation,) = core.generations
        generation.say("x")
        await call.next()
        for token in planet:
            generation.steps.put_nowait(Chunk([token]))
        assert [event["choices"][0]["delta"]["content"] for event in events_of(await call.next())] == ["🪐"]
        generation.say("", finish="stop")

    follow(CHAT, chat(stream=True), story)


def test_logprobs_and_token_ids_in_a_stream() -> None:
    call = ask(CHAT, chat(stream=True, logprobs=True, top_logprobs=1, return_token_ids=True), "ab")
    role, text, last, _ = call.events()
    assert role["prompt_token_ids"] == text_model().encode(RENDERED).tolist()
    assert [entry["bytes"] for entry in text["choices"][0]["logprobs"]["content"]] == [
        list(text_model().token_bytes(token)) for token in ids("ab")
    ]
    assert text["choices"][0]["token_ids"] == ids("ab")
    assert last["choices"][0]["logprobs"] is None
    call = ask(COMPLETIONS, completion(stream=True, logprobs=0, return_token_ids=True), "ab")
    opening, text, _ = call.events()
    assert opening["choices"][0]["prompt_token_ids"] == ids("hello")
    assert text["choices"][0]["token_ids"] == ids("ab")
    assert text["choices"][0]["logprobs"]["token_logprobs"] == [-0.5] * len(ids("ab"))


def test_choices_are_interleaved() -> None:
    async def story(core: FakeCore, call: Call) -> None:
        first, second = core.generations
        second.say("b")
        assert [event["choices"][0]["index"] for event in events_of(await call.next())] == [1, 1]
        first.say("a")
        assert [event["choices"][0]["index"] for event in events_of(await call.next())] == [0, 0]
        first.say("", finish="stop")
        assert events_of(await call.next())[0]["choices"][0]["finish_reason"] == "stop"
        second.say("c", finish="length")

    call = follow(CHAT, chat(stream=True, n=2, stream_options={"include_usage": True}), story)
    *events, total, done = call.events()
    assert done == "[DONE]"
    assert [event["choices"][0]["index"] for event in events] == [1, 1, 0, 0, 0, 1, 1]
    assert total["usage"]["completion_tokens"] == 3
    assert total["usage"]["prompt_tokens"] == len(text_model().encode(RENDERED))


# --- ends that nobody wanted


def test_an_error_before_the_first_token_has_a_status() -> None:
    async def story(core: FakeCore, _call: Call) -> None:
        core.generations[0].fail(Busy("no place", retry_after=2))

    call = follow(CHAT, chat(stream=True), story)
    assert (call.status, call.error["code"]) == (429, "busy")
    assert call.headers["retry-after"] == "2"
    assert call.headers["content-type"] == "application/json"


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def story(core: FakeCore, call: Call) -> None:
        core.generations[0].say("x")
        await call.next()
        core.generations[0].fail(PeerLost("engine e0 is lost"))

    call = follow(CHAT, chat(stream=True), story)
    assert call.complete
    assert call.events()[-1] == {
        "error": {"message": "engine e0 is lost", "type": "server_error", "param": None, "code": "peer_lost"}
    }


@pytest.mark.parametrize("stream", [False, True])
def test_one_failing_choice_ends_all(stream: bool) -> None:
    async def story(core: FakeCore, _call: Call) -> None:
        core.generations[1].fail(PeerLost("gone"))
        await asyncio.gather(*(generation.cancelled.wait() for generation in core.generations))

    call = follow(CHAT, chat(n=3, stream=stream), story)
    assert (call.status, call.error["code"]) == (502, "peer_lost")


def test_a_choice_that_is_refused_ends_those_before_it() -> None:
    async def run() -> None:
        core = FakeCore(answers=[None, None, Busy("full")])
        call = await post(core.app(), CHAT, chat(n=3)).finish()
        assert call.status == 429
        assert [generation.cancelled.is_set() for generation in core.generations] == [True, True]

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("talking", [False, True])
def test_a_client_that_goes_frees_the_engine(count: int, stream: bool, talking: bool) -> None:
    async def story(core: FakeCore, call: Call) -> None:
        if talking:
            core.generations[0].say("x")
            if stream:
                await call.next()
        call.hang_up()
        await asyncio.gather(*(generation.cancelled.wait() for generation in core.generations))

    call = follow(CHAT, chat(n=count, stream=stream), story)
    assert not call.complete
    assert call.status == (200 if stream and talking else 0)


def test_a_server_that_stops_frees_the_engine() -> None:
    async def run() -> None:
        core = FakeCore()
        call = post(core.app(), CHAT, chat(stream=True))
        await core.started.wait()
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        assert core.generations[0].cancelled.is_set()

    asyncio.run(run())


def test_silence_is_filled_with_comments() -> None:
    async def story(core: FakeCore, call: Call) -> None:
        assert await call.next() == b": keep-alive\n\n"
        assert (call.status, call.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert await call.next() == b": keep-alive\n\n"
        core.generations[0].fail(PeerLost("gone"))

    call = follow(CHAT, chat(stream=True), story, keep_alive=0.01)
    assert [event["error"]["code"] for event in call.events()] == ["peer_lost"]


def test_text_after_a_comment() -> None:
    async def story(core: FakeCore, call: Call) -> None:
        await call.next()
        core.generations[0].say("x", finish="stop")

    call = follow(COMPLETIONS, completion(stream=True), story, keep_alive=0.01)
    assert call.body.startswith(b": keep-alive\n\n")
    assert call.events()[0]["choices"][0]["text"] == "x"
    assert call.events()[-1] == "[DONE]"


def test_a_talking_stream_has_no_comments() -> None:
    async def run() -> Call:
        core = FakeCore(answers=["x"])
        return await post(core.app(keep_alive=0.0001), COMPLETIONS, completion(stream=True)).finish()

    assert b"keep-alive" not in asyncio.run(run()).body
