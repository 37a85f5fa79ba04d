"""What the two endpoints answer: whole bodies, and the events of a stream.

A stream's events differ from each other in little more than the text, so everything else is encoded once a stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.router.openai.logprobs import ChatLogprobs, CompletionLogprobs
    from microserve.router.text_stream import TextPiece
    from microserve.runtime.messages import Usage

encode: Final = msgspec.json.Encoder().encode

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


@dataclass(slots=True)
class Choice:
    """What one choice has produced. `prompt_ids` is set when the client wants token ids back."""

    index: int
    prompt_index: int
    echo: str = ""
    prompt_ids: list[int] | None = None
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
    entries: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None

    def add(self, piece: TextPiece) -> None:
        """Takes in the next piece."""
        self.text.append(piece.text)
        if self.prompt_ids is not None:
            self.tokens += piece.tokens
        if self.logprobs is not None and piece.logprobs is not None:
            self.entries.append(self.logprobs.entry(piece.tokens, piece.logprobs))
        self.end(piece)

    def end(self, piece: TextPiece) -> None:
        """Takes in only how it ended."""
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.usage = piece.usage


def total_usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of all choices. A prompt counts once for all its choices, and is cached where none of them computed it."""
    prompts: dict[int, Usage] = {}
    completion = 0
    for choice in choices:
        usage = choice.usage
        if usage is None:
            continue
        completion += usage.completion_tokens
        seen = prompts.get(choice.prompt_index)
        if seen is None or usage.cached_tokens < seen.cached_tokens:
            prompts[choice.prompt_index] = usage
    prompt = sum(usage.prompt_tokens for usage in prompts.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts.values())},
    }


class Shape(Protocol):
    """One endpoint's way of putting it."""

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The body of an answer that is not streamed."""
        ...

    def opening(self, choice: Choice) -> bytes:
        """Events before a choice's first text; may be empty."""
        ...

    def event(self, choice: Choice, piece: TextPiece) -> bytes:
        """Events for a piece; empty when there is nothing to say yet."""
        ...

    def usage(self, choices: Sequence[Choice]) -> bytes:
        """The event with the totals."""
        ...


class _Events:
    """The constant parts of a stream's events."""

    def __init__(self, response_id: str, kind: str, created: int, model: str, *, include_usage: bool) -> None:
        self.head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            encode(response_id),
            kind.encode(),
            created,
            encode(model),
        )
        self.tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def usage(self, choices: Sequence[Choice]) -> bytes:
        return self.head + b'],"usage":' + encode(total_usage(choices)) + b"}\n\n"


def _reason(piece: TextPiece) -> bytes:
    return b"null" if piece.finish_reason is None else encode(piece.finish_reason)


class ChatShape:
    """`/v1/chat/completions`: a message, or deltas of one."""

    def __init__(self, response_id: str, created: int, model: str, *, include_usage: bool = False) -> None:
        self._facts = (response_id, created, model)
        self._events = _Events(response_id, "chat.completion.chunk", created, model, include_usage=include_usage)
        self._fronts: dict[int, bytes] = {}
        self._back = b',"finish_reason":null}' + self._events.tail

    def whole(self, choices: Sequence[Choice]) -> bytes:
        response_id, created, model = self._facts
        body: dict[str, Any] = {
            "id": response_id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [self._choice(choice) for choice in choices],
            "usage": total_usage(choices),
        }
        if choices[0].prompt_ids is not None:
            body["prompt_token_ids"] = choices[0].prompt_ids
        return encode(body)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            logprobs = {"content": [token for entry in choice.entries for token in entry["content"]], "refusal": None}
        answer: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
        if choice.prompt_ids is not None:
            answer["token_ids"] = choice.tokens
        return answer

    def opening(self, choice: Choice) -> bytes:
        front = self._events.head + b'{"index":%d,"delta":{' % choice.index
        self._fronts[choice.index] = front
        data = front + b'"role":"assistant","content":"","refusal":null},"logprobs":null' + self._back
        if choice.prompt_ids is not None and choice.index == 0:
            ids = b'],"prompt_token_ids":' + encode(choice.prompt_ids)
            data = data.replace(self._events.tail, ids + self._events.tail[1:])
        return data

    def event(self, choice: Choice, piece: TextPiece) -> bytes:
        logprobs = b""
        if choice.logprobs is not None and piece.logprobs:
            logprobs = encode(choice.logprobs.entry(piece.tokens, piece.logprobs))
        data = b""
        front = self._fronts[choice.index]
        if piece.text or logprobs or (choice.prompt_ids is not None and piece.tokens):
            data = front + b'"content":' + encode(piece.text) + b'},"logprobs":' + (logprobs or b"null")
            if choice.prompt_ids is not None:
                data += b',"token_ids":' + encode(piece.tokens)
            data += self._back
        if piece.finish_reason is not None:
            data += front + b'},"logprobs":null,"finish_reason":' + _reason(piece) + b"}" + self._events.tail
        return data

    def usage(self, choices: Sequence[Choice]) -> bytes:
        return self._events.usage(choices)


class CompletionShape:
    """`/v1/completions`: plain text, the last of it together with the reason why it ended."""

    def __init__(self, response_id: str, created: int, model: str, *, include_usage: bool = False) -> None:
        self._facts = (response_id, created, model)
        self._events = _Events(response_id, "text_completion", created, model, include_usage=include_usage)
        self._fronts: dict[int, bytes] = {}

    def whole(self, choices: Sequence[Choice]) -> bytes:
        response_id, created, model = self._facts
        return encode(
            {
                "id": response_id,
                "object": "text_completion",
                "created": created,
                "model": model,
                "choices": [self._choice(choice) for choice in choices],
                "usage": total_usage(choices),
            }
        )

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs: dict[str, list[Any]] | None = None
        if choice.logprobs is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [value for entry in choice.entries for value in entry[name]] for name in names}
        answer: dict[str, Any] = {
            "index": choice.index,
            "text": choice.echo + "".join(choice.text),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
        if choice.prompt_ids is not None:
            answer["prompt_token_ids"] = choice.prompt_ids
            answer["token_ids"] = choice.tokens
        return answer

    def opening(self, choice: Choice) -> bytes:
        front = self._fronts[choice.index] = self._events.head + b'{"index":%d,"text":' % choice.index
        if not choice.echo and choice.prompt_ids is None:
            return b""
        data = front + encode(choice.echo) + b',"logprobs":null,"finish_reason":null'
        if choice.prompt_ids is not None:
            data += b',"prompt_token_ids":' + encode(choice.prompt_ids) + b',"token_ids":[]'
        return data + b"}" + self._events.tail

    def event(self, choice: Choice, piece: TextPiece) -> bytes:
        logprobs = b""
        if choice.logprobs is not None and piece.logprobs:
            logprobs = encode(choice.logprobs.entry(piece.tokens, piece.logprobs))
        wants_ids = choice.prompt_ids is not None
        if not (piece.text or logprobs or piece.finish_reason is not None or (wants_ids and piece.tokens)):
            return b""
        data = self._fronts[choice.index] + encode(piece.text) + b',"logprobs":' + (logprobs or b"null")
        if wants_ids:
            data += b',"token_ids":' + encode(piece.tokens)
        return data + b',"finish_reason":' + _reason(piece) + b"}" + self._events.tail

    def usage(self, choices: Sequence[Choice]) -> bytes:
        return self._events.usage(choices)
