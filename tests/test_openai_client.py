"""The official client against a live router: processes, sockets and HTTP are real."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from tests import tokenizer_zoo as zoo
from tests.cluster import FAKE, Cluster, daemon_environ

from microserve.router.text import TextModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openai.types.chat import ChatCompletionMessageParam

pytestmark = pytest.mark.timeout(180)

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine_args(checkpoint: Path) -> tuple[str, ...]:
    return (*FAKE, "--model", str(checkpoint), "--model-name", "demo")


@pytest.fixture(scope="module")
def cluster(engine_args: tuple[str, ...]) -> Iterator[Cluster]:
    with Cluster(engines=2, engine_args=engine_args) as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def async_client(cluster: Cluster) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextModel:
    return TextModel.load(checkpoint)


# --- both endpoints, whole and streamed


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_chat_whole_and_streamed_say_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=20, temperature=0)
    said = whole.choices[0].message
    assert (said.role, whole.choices[0].finish_reason) == ("assistant", "length")
    assert said.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20

    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=HELLO,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, total = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == said.content
    assert [chunk.choices[0].finish_reason for chunk in told][-1] == "length"
    assert all(chunk.usage is None for chunk in told)
    assert total.choices == []
    assert total.usage is not None
    assert total.usage.completion_tokens == 20
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_completion_whole_and_streamed_say_the_same(client: OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="Once upon", max_tokens=20, temperature=0)
    stream = client.completions.create(model="demo", prompt="Once upon", max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"


def test_every_kind_of_prompt(client: OpenAI, text: TextModel) -> None:
    ids = text.encode("Once upon").tolist()
    expected = client.completions.create(model="demo", prompt="Once upon", max_tokens=5).choices[0].text
    for prompt in (["Once upon"], ids, [ids]):
        assert client.completions.create(model="demo", prompt=prompt, max_tokens=5).choices[0].text == expected
    several = client.completions.create(model="demo", prompt=["Once upon", "x"], n=2, max_tokens=5, echo=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == "Once upon" + expected
    assert several.usage is not None
    assert several.usage.prompt_tokens == len(ids) + 1


def test_several_choices_in_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=12, n=3, seed=4)
    stream = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=12, n=3, seed=4, stream=True)
    told = ["", "", ""]
    ends = []
    for chunk in stream:
        for choice in chunk.choices:
            told[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert told == [choice.message.content for choice in whole.choices]
    assert sorted(ends) == [0, 1, 2]


def test_logprobs(client: OpenAI) -> None:
    talk = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=2)
    logprobs = talk.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 4
    assert all(entry.logprob <= 0 and entry.bytes is not None for entry in logprobs.content)
    plain = client.completions.create(model="demo", prompt="Once", max_tokens=4, logprobs=2)
    found = plain.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == 4


def test_stop_strings(client: OpenAI, text: TextModel) -> None:
    whole = client.completions.create(
        model="demo", prompt="Once upon", max_tokens=40, temperature=0, extra_body={"return_token_ids": True}
    )
    said = whole.choices[0].text
    stop = next(said[at : at + 3] for at in range(10, len(said)) if "\ufffd" not in said[at : at + 3])
    expected, _, _ = said.partition(stop)
    cut = client.completions.create(model="demo", prompt="Once upon", max_tokens=40, temperature=0, stop=[stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop")
    ids = whole.choices[0].model_dump()["token_ids"]
    needed = next(count for count in range(41) if stop in text.decode(ids[:count]))
    assert cut.usage is not None
    assert cut.usage.completion_tokens == needed
    stream = client.completions.create(
        model="demo", prompt="Once upon", max_tokens=40, temperature=0, stop=[stop], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_extras(client: OpenAI) -> None:
    extra = {"ignore_eos": True, "min_tokens": 3, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    answer = client.completions.create(model="demo", prompt="x", max_tokens=5, extra_body=extra, user="me")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_a_request_id_is_shown(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="demo", prompt="x", max_tokens=1, extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.headers["x-microserve-engine"] in ("e0", "e1")
    assert raw.parse().id == "cmpl-mine-7"


# --- errors


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[1] * 40_000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="demo", prompt="x", extra_body={"max_token": 5})
    assert unknown.value.param == "max_token"
    assert "did you mean 'max_tokens'?" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="demo", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as hot:
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert hot.value.param == "temperature"
    assert hot.value.request_id


def test_overload_is_a_rate_limit(engine_args: tuple[str, ...]) -> None:
    with (
        Cluster(engine_args=engine_args, router_args=("--max-active", "1", "--max-queued", "0")) as small,
        OpenAI(base_url=f"{small.http}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        stream = client.completions.create(model="demo", prompt="x", max_tokens=20_000, stream=True)
        with stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as busy:
                client.completions.create(model="demo", prompt="x", max_tokens=1)
            assert busy.value.code == "busy"
            assert int(busy.value.response.headers["retry-after"]) >= 1
        small.wait_for(lambda status: status.active_requests == 0, "the stream to be cancelled")
        assert client.completions.create(model="demo", prompt="x", max_tokens=1).usage is not None


def test_no_engine_is_unavailable() -> None:
    with (
        Cluster(engines=0) as empty,
        OpenAI(base_url=f"{empty.http}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        with pytest.raises(openai.InternalServerError) as none:
            client.completions.create(model="demo", prompt="x")
        assert (none.value.status_code, none.value.code) == (503, "no_engine")
        assert "retry-after" in none.value.response.headers
        ready = httpx.get(f"{empty.http}/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["no engine is ready"])
        assert httpx.get(f"{empty.http}/health").status_code == 200


def test_a_killed_engine_breaks_its_streams_with_an_error(engine_args: tuple[str, ...]) -> None:
    with (
        Cluster(engine_args=engine_args) as doomed,
        OpenAI(base_url=f"{doomed.http}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        stream = client.completions.create(model="demo", prompt="x", max_tokens=20_000, stream=True)
        next(iter(stream))
        doomed.engines[0].kill()
        with pytest.raises(openai.APIError) as lost:
            list(stream)
        assert lost.value.code == "peer_lost"


# --- cancellation and load


def test_leaving_a_stream_frees_the_engine(cluster: Cluster, client: OpenAI) -> None:
    def running(expected: int) -> None:
        cluster.wait_for(
            lambda status: (
                sum(engine.load.running for engine in status.engines) == expected
                and status.active_requests == expected
                and sum(engine.charged for engine in status.engines) == expected
            ),
            f"{expected} requests to run",
        )

    stream = client.chat.completions.create(
        model="demo", messages=HELLO, max_tokens=30_000, n=2, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    running(2)
    stream.close()
    running(0)


def test_leaving_a_whole_answer_frees_the_engine(cluster: Cluster) -> None:
    async def run() -> None:
        async with async_client(cluster) as client:
            asking = asyncio.create_task(
                client.completions.create(model="demo", prompt="x", max_tokens=30_000, extra_body={"ignore_eos": True})
            )
            await asyncio.to_thread(cluster.wait_for, lambda status: status.active_requests == 1, "the request to run")
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(run())
    cluster.wait_for(
        lambda status: status.active_requests == 0 and not sum(engine.load.running for engine in status.engines),
        "the engine to be free",
    )


def test_32_streams_at_once(cluster: Cluster) -> None:
    async def run() -> None:
        async with async_client(cluster) as client:

            async def one(number: int) -> tuple[str, int]:
                stream = await client.completions.create(
                    model="demo",
                    prompt=f"story {number}",
                    max_tokens=50,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                told, counted = "", 0
                async for chunk in stream:
                    if chunk.usage is not None:
                        counted = chunk.usage.completion_tokens
                    told += "".join(choice.text for choice in chunk.choices)
                return told, counted

            together = await asyncio.gather(*(one(number) for number in range(32)))
            assert [counted for _, counted in together] == [50] * 32
            assert together[5] == await one(5)
            assert len({told for told, _ in together}) == 32

    asyncio.run(run())


# --- a real model behind it


@pytest.fixture(scope="module")
def model_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("model")
    subprocess.run(
        [sys.executable, "-m", "microserve.engine.model.random_checkpoint", str(folder)],
        check=True,
        capture_output=True,
        env=daemon_environ(),
    )
    arguments = ("--executor", "torch", "--model", str(folder), "--model-name", "random", "--threads", "1")
    with Cluster(engine_args=(*arguments, "--kv-memory", "64MiB")) as running:
        yield running


@pytest.fixture
def model_client(model_cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{model_cluster.http}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_model_is_greedy_streamed_or_not(model_client: OpenAI) -> None:
    whole = model_client.chat.completions.create(model="random", messages=HELLO, max_tokens=24, temperature=0)
    stream = model_client.chat.completions.create(
        model="random", messages=HELLO, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content


def test_a_seed_repeats_and_choices_differ(model_client: OpenAI) -> None:
    def told(seed: int, n: int) -> list[str]:
        answer = model_client.completions.create(
            model="random", prompt="hello", max_tokens=16, n=n, seed=seed, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    three = told(11, 3)
    assert told(11, 3) == three
    assert len(set(three)) == 3
    assert [told(11 + number, 1)[0] for number in range(3)] == three


def test_a_models_logprobs_are_probabilities(model_client: OpenAI) -> None:
    answer = model_client.chat.completions.create(
        model="random", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for entry in logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1.0 + 1e-6
        # Greedy: the chosen token is the most likely one.
        assert entry.logprob == tops[0]


def test_a_models_prefix_is_reused(model_client: OpenAI) -> None:
    prompt = "a prompt that is long enough for more than one page of tokens " * 2

    def cached() -> int:
        usage = model_client.completions.create(model="random", prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() >= 16
