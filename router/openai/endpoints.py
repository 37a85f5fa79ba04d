"""`/v1/completions` and `/v1/chat/completions`: a request's choices, started together and ended together."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from microserve.router.core import GenerationSpec
from microserve.router.openai import parse
from microserve.router.openai.choices import open_source
from microserve.router.openai.exchange import ClientGone, Exchange
from microserve.router.openai.logprobs import ChatLogprobs, CompletionLogprobs
from microserve.router.openai.requests import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationFields
from microserve.router.openai.responses import DONE, ChatShape, Choice, CompletionShape, Shape
from microserve.router.text_stream import TextStream
from microserve.runtime.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from microserve.router.dispatch import Generation
    from microserve.router.fleet import EngineFleet
    from microserve.router.metrics import RouterMetrics
    from microserve.router.openai.choices import Source
    from microserve.router.text import TextModel
    from microserve.router.versions import Versions
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.config import RouterConfig
    from microserve.runtime.messages import EngineVerb, ModelInfo, SamplingParams, Strategies
    from microserve.runtime.rpc import CallStream

_COMPLETION_TOKENS = 16
_VISIBLE = re.compile(r"[\x21-\x7e]+")


class Core(Protocol):
    """What HTTP needs of the router."""

    @property
    def config(self) -> RouterConfig: ...
    @property
    def draining(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    @property
    def full(self) -> bool: ...
    @property
    def metrics(self) -> RouterMetrics: ...
    @property
    def versions(self) -> Versions: ...
    async def strategies(self) -> Strategies: ...
    def models(self) -> list[ModelInfo]: ...
    def model(self, name: str) -> ModelInfo: ...
    def text_model(self, name: str) -> TextModel: ...
    def output_budget(self, model: ModelInfo, prompt_tokens: int, max_tokens: int | None) -> int: ...
    def generate(self, spec: GenerationSpec) -> Generation: ...
    @property
    def fleet(self) -> EngineFleet: ...
    def engine_call(
        self, engine_id: str, body: EngineVerb, *, budget: float | None = None, by: str = ""
    ) -> CallStream: ...


class Endpoints:
    """Both endpoints over one router. `max_body` is in bytes."""

    def __init__(self, core: Core, *, max_body: int) -> None:
        self._core = core
        self._max_body = max_body
        self._completion = msgspec.json.Decoder(CompletionRequest)
        self._chat = msgspec.json.Decoder(ChatRequest)

    async def completions(self, exchange: Exchange) -> None:
        request = parse.parse(self._completion, await exchange.body(self._max_body))
        parse.refuse_unsupported(request)
        model = self._core.model(request.model)
        text = self._core.text_model(request.model)
        given = parse.prompts(request.prompt)
        count = request.n or 1
        if len(given) * count > MAX_CHOICES:
            raise InvalidRequest(f"{len(given)} prompts of {count} choices are more than {MAX_CHOICES}", param="n")
        special = request.add_special_tokens is not False
        prompts: list[TokenArray] = []
        for prompt in given:
            if isinstance(prompt, str):
                prompts.append(await text.aencode(prompt, special))
            else:
                prompts.append(parse.token_array(prompt, model.vocab_size, "prompt"))
            if not len(prompts[-1]):
                raise InvalidRequest("the prompt is empty", param="prompt")
        echoes = [""] * len(given)
        if request.echo:
            echoes = [prompt if isinstance(prompt, str) else text.decode(prompt) for prompt in given]
        shape = CompletionShape(
            f"cmpl-{exchange.request_id}", int(time.time()), model.name, include_usage=_include_usage(request)
        )
        await self._serve(exchange, request, model, text, prompts, echoes, shape)

    async def chat(self, exchange: Exchange) -> None:
        request = parse.parse(self._chat, await exchange.body(self._max_body))
        parse.refuse_unsupported(request)
        model = self._core.model(request.model)
        text = self._core.text_model(request.model)
        continued = bool(request.continue_final_message)
        rendered = text.render_chat(
            parse.conversation(request.messages),
            add_generation_prompt=not continued
            if request.add_generation_prompt is None
            else request.add_generation_prompt,
            continue_final_message=continued,
            **parse.template_variables(request),
        )
        # The template writes the special tokens itself.
        prompt = await text.aencode(rendered, bool(request.add_special_tokens))
        shape = ChatShape(
            f"chatcmpl-{exchange.request_id}", int(time.time()), model.name, include_usage=_include_usage(request)
        )
        await self._serve(exchange, request, model, text, [prompt], [""], shape)

    async def _serve(
        self,
        exchange: Exchange,
        request: GenerationFields,
        model: ModelInfo,
        text: TextModel,
        prompts: list[TokenArray],
        echoes: list[str],
        shape: Shape,
    ) -> None:
        sampled = [parse.sampling(request, self._limit(request, model, prompt), model) for prompt in prompts]
        stops = parse.stop_strings(request)
        streams: list[TextStream] = []
        generations: list[Generation] = []
        choices: list[Choice] = []
        try:
            for at, prompt in enumerate(prompts):
                for number in range(request.n or 1):
                    index = len(choices)
                    name = exchange.request_id if not index else f"{exchange.request_id}-{index}"
                    sampling = _seeded(sampled[at], number)
                    spec = GenerationSpec(name, model.name, prompt, sampling, choice_of=exchange.request_id)
                    generation = self._core.generate(spec)
                    generations.append(generation)
                    streams.append(
                        TextStream(
                            generation,
                            text,
                            prompt,
                            stop=stops,
                            min_tokens=request.min_tokens or 0,
                            skip_special_tokens=request.skip_special_tokens is not False,
                            include_stop=bool(request.include_stop_str_in_output),
                        )
                    )
                    choices.append(_choice(request, index, at, prompt, echoes[at], text))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        source = open_source(streams)
        exchange.watch(source.cancel)
        try:
            if request.stream:
                await _stream(exchange, source, choices, shape, generations, usage=_include_usage(request))
            else:
                await _gather(exchange, source, choices, shape, generations)
        finally:
            await source.close()

    def _limit(self, request: GenerationFields, model: ModelInfo, prompt: TokenArray) -> int:
        """Output tokens of one choice. Raises `ContextLengthExceeded` for a prompt, or a demand, that does not fit."""
        if isinstance(request, CompletionRequest):
            if request.max_tokens is not None:
                return self._core.output_budget(model, len(prompt), request.max_tokens)
            # A default, not a demand: a prompt that leaves less room gets less.
            return min(_COMPLETION_TOKENS, self._core.output_budget(model, len(prompt), None))
        asked, param = parse.chat_limit(request)
        try:
            return self._core.output_budget(model, len(prompt), asked)
        except ContextLengthExceeded as error:
            error.param = "messages" if error.param == "prompt" else param
            raise


def _include_usage(request: GenerationFields) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """Choice `number` of a seeded request has the seed + number (wrapping at 64 bits): choices differ, repeatably."""
    if sampling.seed is None or not number:
        return sampling
    seed = (sampling.seed + number + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)


def _choice(
    request: GenerationFields, index: int, prompt_index: int, prompt: TokenArray, echo: str, text: TextModel
) -> Choice:
    top = parse.top_logprobs(request)
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
    if top is not None:
        chat = isinstance(request, ChatRequest)
        logprobs = ChatLogprobs(text, top) if chat else CompletionLogprobs(text, top, len(echo), prompt)
    ids = np.asarray(prompt).tolist() if request.return_token_ids else None
    return Choice(index, prompt_index, echo, ids, logprobs=logprobs)


def _served_by(exchange: Exchange, generations: list[Generation]) -> None:
    """Headers that say which strategy version and which engines served it, as far as that is known by now."""
    version = generations[0].strategy_version  # as of every other: they were chosen by the request's id, at once
    if _VISIBLE.fullmatch(version):
        exchange.headers.append((b"x-microserve-strategy", version.encode()))
    engines = dict.fromkeys(engine for generation in generations for engine in generation.engine_ids)
    if engines:
        exchange.headers.append((b"x-microserve-engine", ",".join(engines).encode("ascii", "replace")))


async def _gather(
    exchange: Exchange, source: Source, choices: list[Choice], shape: Shape, generations: list[Generation]
) -> None:
    open_choices = len(choices)
    while open_choices:
        for index, piece in await source.next():
            choices[index].add(piece)
            open_choices -= piece.finish_reason is not None
    if exchange.gone:
        raise ClientGone
    _served_by(exchange, generations)
    await exchange.answer(shape.whole(choices))


async def _stream(
    exchange: Exchange,
    source: Source,
    choices: list[Choice],
    shape: Shape,
    generations: list[Generation],
    *,
    usage: bool,
) -> None:
    """Nothing is sent before the first piece, so what fails before that is still an answer with a status of its own."""
    exchange.keep_alive()
    open_choices = len(choices)
    named = False
    opened = [False] * len(choices)
    while open_choices:
        parts = []
        for index, piece in await source.next():
            choice = choices[index]
            if not opened[index]:
                opened[index] = True
                parts.append(shape.opening(choice))
            parts.append(shape.event(choice, piece))
            if piece.finish_reason is not None:
                choice.end(piece)
                open_choices -= 1
        if not open_choices:
            if usage:
                parts.append(shape.usage(choices))
            parts.append(DONE)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if not named:
            named = True
            if not exchange.started:
                _served_by(exchange, generations)
        if data:
            await exchange.events(data, more=open_choices > 0)
