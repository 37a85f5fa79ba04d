"""What clients of the OpenAI API send, as structs that validate themselves."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from microserve.runtime.messages import Int64, NonNegative

MAX_CHOICES = 128
"""Choices of one request: `n` times its prompts."""

# As wide as the engines' `SamplingParams`; most are held against the context or the vocabulary after that.
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenIds = list[int]


class StreamOptions(Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take. None always means the default."""

    model: str
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    # What serving clients add.
    top_k: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: NonNegative | None = None
    stop_token_ids: Annotated[TokenIds, Meta(max_length=256)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # Changes nothing that a model says: accepted, and not used.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    prompt: str | list[int | str | TokenIds]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Positive | None = None
    suffix: str | None = None


class ContentPart(Struct):
    """A part of a message. Only text is served; the fields of other types are not looked at."""

    type: str
    text: str | None = None


class Message(Struct, forbid_unknown_fields=True):
    """One message of a conversation. What clients echo back from an earlier answer is accepted while it is empty."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    # Served only where they ask for nothing.
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """`POST /tokenize`: a `prompt`, or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """`POST /detokenize`. Special tokens are shown."""

    tokens: TokenIds
    model: str | None = None
