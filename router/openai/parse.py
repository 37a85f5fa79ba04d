"""From a request's bytes to what the router serves: decoded, checked, and every objection named by its field."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import msgspec.inspect
import numpy as np

from microserve.router.openai.requests import ChatRequest, CompletionRequest, GenerationFields, Message
from microserve.router.stops import checked_stops
from microserve.runtime.arguments import Objection, joined, objection
from microserve.runtime.errors import InvalidRequest
from microserve.runtime.messages import ModelInfo, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.runtime.codec import TokenArray

T = TypeVar("T")

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)

_FEW = 8
"""Fields that are listed where one is wrong."""

# --- decoding


def parse(decoder: msgspec.json.Decoder[T], body: bytes | bytearray) -> T:
    """The request in `body`. Raises `InvalidRequest` with `param` set to the field that is wrong."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(objection(error), decoder.type) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


def _explain(wrong: Objection, expected: Any) -> InvalidRequest:
    """The error that a client understands, with what may have been meant where the field is unknown."""
    what, at = wrong
    if (found := _UNKNOWN.fullmatch(what)) is not None:
        name = found["name"]
        known = _fields_at(expected, at)
        close = difflib.get_close_matches(name, known, n=1)
        # All of a long list would hide what is wrong.
        hint = f"; there are: {', '.join(known)}" if 0 < len(known) <= _FEW else ""
        hint = f"; did you mean '{close[0]}'?" if close else hint
        return InvalidRequest(f"unknown field '{joined(at, name)}'{hint}", param=joined(at, name))
    refusal = wrong.refusal()
    if refusal.param is None:
        return InvalidRequest(f"the body must be a JSON object: {what}")
    return refusal


def _fields_at(expected: Any, at: str) -> Sequence[str]:
    """The fields of what a body of type `expected` has `at` a path such as "messages[0]"; none where it is unclear."""
    found: Any = msgspec.inspect.type_info(expected)
    for name in re.findall(r"[A-Za-z_]\w*", at):
        found = next((_struct(field.type) for field in getattr(found, "fields", ()) if field.encode_name == name), None)
    return [field.encode_name for field in getattr(found, "fields", ())]


def _struct(found: Any) -> Any:
    """The struct that a field holds, if it does: by itself, in a list, or as one of several things."""
    if isinstance(found, msgspec.inspect.Metadata):
        return _struct(found.type)
    if isinstance(found, msgspec.inspect.ListType):
        return _struct(found.item_type)
    if isinstance(found, msgspec.inspect.UnionType):
        return next((each for each in map(_struct, found.types) if each is not None), None)
    return found if isinstance(found, msgspec.inspect.StructType) else None


# --- what is not served


def _empty(value: Any) -> bool:
    return not value


def _nothing(_value: Any) -> bool:
    return False


_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "response_format": (
        lambda value: isinstance(value, dict) and value.get("type") == "text",
        "only the response format 'text' is supported",
    ),
    "tools": (_empty, "tools are not supported"),
    "tool_choice": (lambda value: value in ("none", "auto"), "tools are not supported"),
    "functions": (_empty, "functions are not supported"),
    "function_call": (lambda value: value in ("none", "auto"), "functions are not supported"),
    "modalities": (lambda value: value == ["text"], "only the modality 'text' is supported"),
    "audio": (_nothing, "audio is not supported"),
    "web_search_options": (_nothing, "web search is not supported"),
    "reasoning_effort": (lambda value: value == "none", "reasoning effort is not supported"),
    "verbosity": (lambda value: value == "medium", "verbosity is not supported"),
}
"""Fields that are accepted only where they ask for nothing: what is harmless, and what is said otherwise."""


def refuse_unsupported(request: GenerationFields) -> None:
    """Raises `InvalidRequest` for what would change the meaning of the request and is not served."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
    if isinstance(request, ChatRequest):
        for name, (harmless, message) in _UNSUPPORTED.items():
            value = getattr(request, name)
            if value is not None and not harmless(value):
                raise InvalidRequest(message, param=name)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    elif isinstance(request, CompletionRequest):
        if request.suffix:
            raise InvalidRequest("suffix is not supported", param="suffix")
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise InvalidRequest("best_of is not supported, unless it equals n", param="best_of")
        if request.echo and request.logprobs is not None:
            raise InvalidRequest("echo together with logprobs is not supported", param="echo")


# --- conversation

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def conversation(messages: list[Message]) -> list[dict[str, object]]:
    """The messages as a chat template takes them: text only, parts joined by line ends.

    Raises `InvalidRequest` for roles, parts and fields that need tools or media.
    """
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    found: list[dict[str, object]] = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        role = _ROLES.get(message.role)
        if role is None:
            raise InvalidRequest(
                f"{at}.role: {message.role!r} is not supported; use one of {', '.join(_ROLES)}", param=f"{at}.role"
            )
        for name in ("tool_calls", "tool_call_id", "function_call", "audio"):
            if getattr(message, name):
                raise InvalidRequest(f"{at}.{name} is not supported", param=f"{at}.{name}")
        entry: dict[str, object] = {"role": role, "content": _content(message, at)}
        if message.name is not None:
            entry["name"] = message.name
        found.append(entry)
    return found


def _content(message: Message, at: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"'{at}.content' is required", param=f"{at}.content")
    texts = []
    for index, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            where = f"{at}.content[{index}].type"
            raise InvalidRequest(f"{where}: only 'text' is supported, not {part.type!r}", param=where)
        if part.text is None:
            where = f"{at}.content[{index}].text"
            raise InvalidRequest(f"'{where}' is required", param=where)
        texts.append(part.text)
    return "\n".join(texts)


# --- prompts


def prompts(value: str | list[int | str | list[int]]) -> list[str] | list[list[int]]:
    """The prompts of a completion, one text or one list of ids each. Raises `InvalidRequest` for mixtures."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest("the prompt must not be empty", param="prompt")
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return texts
    ids = [item for item in value if isinstance(item, int)]
    if len(ids) == len(value):
        return [ids]
    lists = [item for item in value if isinstance(item, list)]
    if len(lists) == len(value):
        return lists
    raise InvalidRequest(
        "the prompt is a text, a list of texts, a list of token ids, or a list of those", param="prompt"
    )


def token_array(ids: Sequence[int], vocab_size: int, param: str) -> TokenArray:
    """`ids` as int32 [n]. Raises `InvalidRequest` for an id outside the vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{param}: token id {wrong} is not in the vocabulary of {vocab_size}", param=param)
    return np.array(ids, dtype=np.int32)


# --- sampling


def stop_strings(request: GenerationFields) -> tuple[str, ...]:
    stop = request.stop
    if stop is None:
        return ()
    return checked_stops((stop,) if isinstance(stop, str) else stop)


def top_logprobs(request: GenerationFields) -> int | None:
    """How many alternatives to return with each token's log probability; None returns no log probabilities."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None


def chat_limit(request: GenerationFields) -> tuple[int | None, str]:
    """The limit on a chat's output tokens (None: what the context leaves), and the field that says it."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens, "max_completion_tokens"
    return request.max_tokens, "max_tokens"


def sampling(request: GenerationFields, limit: int, model: ModelInfo) -> SamplingParams:
    """The engine's parameters; `limit` is the most tokens that it may generate. Raises `InvalidRequest`."""
    if request.min_tokens is not None and request.min_tokens > limit:
        raise InvalidRequest(f"min_tokens is {request.min_tokens}, more than the limit of {limit}", param="min_tokens")
    for name, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        for token in ids or ():
            if not 0 <= token < model.vocab_size:
                raise InvalidRequest(
                    f"{name}: token id {token} is not in the vocabulary of {model.vocab_size}", param=name
                )
    return SamplingParams(
        max_tokens=limit,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias or {},
        seed=request.seed,
        logprobs=top_logprobs(request),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(request.stop_token_ids or ()),
    )


_RESERVED_VARIABLES = frozenset({"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"})


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """`chat_template_kwargs`, without what the router sets itself. Raises `InvalidRequest` for those."""
    variables = request.chat_template_kwargs or {}
    for name in variables:
        if name in _RESERVED_VARIABLES:
            param = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"'{param}' cannot be set there", param=param)
    return variables
