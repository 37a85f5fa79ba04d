"""A generation as text: tokens in, pieces of text out, with stop strings and exact usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from microserve.router.stops import StopScanner
from microserve.runtime.errors import InternalError
from microserve.runtime.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.router.strategy import Chunk
    from microserve.router.text import TextModel
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.messages import TokenLogprobs


class TokenStream(Protocol):
    """What a text stream needs of a `Generation`."""

    def __aiter__(self) -> TokenStream: ...
    async def __anext__(self) -> Chunk: ...
    def cancel(self) -> None: ...
    def suffice(self) -> None: ...


@dataclass(slots=True)
class TextPiece:
    """New text and the tokens that arrived with it; the text may trail its tokens. The last one has the rest.

    `logprobs`, when asked for, has one entry per token. `finish_reason` ("stop" or "length") and `usage` are set on the
    last piece and only there. `stop` is what ended it: the stop string, or the id of the stop token.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    stop: str | int | None = None


class TextStream:
    """Async iterator of `TextPiece` over `generation`; ends after the piece with `finish_reason`, or raises its error.

    `prompt` is int32 [n]; its end is the context that the first token continues. `stop` strings are left out of the
    text, unless `include_stop`; one that is complete before `min_tokens` tokens does not count. A match cancels the
    generation; usage then counts the tokens up to and including the one that completed the match.
    """

    __slots__ = (
        "_count",
        "_detokenizer",
        "_done",
        "_feed",
        "_generation",
        "_include_stop",
        "_min_tokens",
        "_prompt_tokens",
        "_scanner",
    )

    def __init__(
        self,
        generation: TokenStream,
        model: TextModel,
        prompt: TokenArray,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._generation = generation
        self._detokenizer = model.detokenizer(prompt, skip_special_tokens=skip_special_tokens)
        self._feed = self._detokenizer.feed
        self._scanner = StopScanner(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._prompt_tokens = len(prompt)
        self._count = 0
        self._done = False

    def cancel(self) -> None:
        """Gives the engine's work back. Idempotent, and harmless after the end."""
        self._generation.cancel()

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> TextPiece:
        if self._done:
            raise StopAsyncIteration
        try:
            chunk = await self._generation.__anext__()
        except StopAsyncIteration:
            self._done = True
            raise InternalError("a generation ended without saying why") from None
        except BaseException:
            self._done = True
            raise
        if self._scanner is not None:
            return self._scan(chunk, self._scanner)
        text = self._feed(chunk.tokens)
        self._count += len(chunk.tokens)
        if chunk.finish is not None:
            return self._last(chunk, text + self._detokenizer.finish())
        return TextPiece(text, chunk.tokens, chunk.logprobs)

    def _last(self, chunk: Chunk, text: str) -> TextPiece:
        """The piece of a chunk that has `finish`."""
        finish = chunk.finish
        if finish is None:
            raise InternalError("not a last chunk")
        self._done = True
        return TextPiece(text, chunk.tokens, chunk.logprobs, finish.finish_reason, finish.usage, finish.stop_token)

    def _scan(self, chunk: Chunk, scanner: StopScanner) -> TextPiece:
        """Token by token: only so is it known which token completed a stop string."""
        parts = []
        for position, token in enumerate(chunk.tokens, start=1):
            text = self._feed((token,))
            self._count += 1
            parts.append(scanner.feed(text, ignore=self._count < self._min_tokens))
            if scanner.matched is not None:
                return self._stopped(chunk, position, "".join(parts), scanner.matched)
        if chunk.finish is None:
            return TextPiece("".join(parts), chunk.tokens, chunk.logprobs)
        parts.append(scanner.feed(self._detokenizer.finish()))
        if scanner.matched is not None:
            return self._stopped(chunk, len(chunk.tokens), "".join(parts), scanner.matched)
        parts.append(scanner.flush())
        return self._last(chunk, "".join(parts))

    def _stopped(self, chunk: Chunk, kept: int, text: str, matched: str) -> TextPiece:
        """A stop string is complete with the chunk's token number `kept`; what comes behind it was never wanted."""
        self._done = True
        self._generation.suffice()
        cached = chunk.finish.usage.cached_tokens if chunk.finish is not None else self._cached_tokens()
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._count, cached_tokens=cached)
        logprobs = None if chunk.logprobs is None else chunk.logprobs[:kept]
        if self._include_stop:
            text += matched
        return TextPiece(text, chunk.tokens[:kept], logprobs, "stop", usage, matched)

    def _cached_tokens(self) -> int:
        """Prompt tokens found in the cache, if the generation knows before its end."""
        return int(getattr(self._generation, "cached_tokens", 0))
