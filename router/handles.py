"""What a strategy is given to work with: the fleet and its engines, as one choice sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.router.strategy import Chunk
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import MicroserveError, ProtocolError
from microserve.runtime.messages import Generated, StartGenerate, Tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microserve.router.dispatch import Generation
    from microserve.router.link import EngineLink
    from microserve.runtime.messages import Load, TokenLogprobs
    from microserve.runtime.rpc import CallStream


class RunFleet:
    """The `Fleet` of one choice."""

    __slots__ = ("_run",)

    def __init__(self, run: Generation) -> None:
        self._run = run

    @property
    def engines(self) -> list[str]:
        return self._run.candidates()

    def pick(self, label: str | None = None) -> RunEngine:
        return self._run.pick(label)


class RunEngine:
    """An `Engine` of one choice, charged with it."""

    __slots__ = ("_link", "_run")

    def __init__(self, run: Generation, link: EngineLink) -> None:
        self._run = run
        self._link = link

    @property
    def id(self) -> str:
        return self._link.id

    @property
    def labels(self) -> Mapping[str, str]:
        return self._link.info.labels

    @property
    def load(self) -> Load:
        return self._link.load

    def start_generate(self, *, begin: int = 0) -> TokenStream:
        run = self._run
        body = StartGenerate(
            request_id=run.request.id,
            sub_id=run.next_sub_id(),
            prompt=run.prompt_bytes,
            begin=begin,
            sampling=run.request.sampling,
        )
        return TokenStream(run.begin(self._link, body), self._link.id, run.avoid)


class TokenStream:
    """The chunks of one `start_generate`."""

    __slots__ = ("_avoid", "_call", "_engine", "_finished")

    def __init__(self, call: CallStream, engine: str, avoid: set[str]) -> None:
        self._call = call
        self._engine = engine
        self._avoid = avoid
        self._finished = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Chunk:
        if self._finished:
            raise StopAsyncIteration
        call = self._call
        try:
            body = await call.__anext__()
        except StopAsyncIteration:
            return self._last(Chunk([]))
        except MicroserveError:
            # Should the program run again, then not here.
            self._avoid.add(self._engine)
            raise
        chunk = Chunk(*_tokens(body))
        for body in call.take():
            ids, logprobs = _tokens(body)
            chunk.tokens += ids
            if logprobs is not None:
                chunk.logprobs = (chunk.logprobs or []) + logprobs
        if call.ended:
            # The answer usually comes with the last token: then both are one chunk.
            try:
                return self._last(chunk)
            except ProtocolError:
                # It ended in an error, which is raised when what arrived before it has been taken.
                return chunk
        return chunk

    def _last(self, chunk: Chunk) -> Chunk:
        reply = self._call.reply
        if type(reply) is not Generated:
            raise ProtocolError(f"engine {self._engine} ended a generation with {type(reply).__name__}")
        self._finished = True
        chunk.finish = reply
        return chunk


def _tokens(body: object) -> tuple[list[int], list[TokenLogprobs] | None]:
    if type(body) is not Tokens:
        raise ProtocolError(f"an engine streamed {type(body).__name__} instead of tokens")
    ids = body.ids
    if len(ids) == 4:
        return [int.from_bytes(ids, "little", signed=True)], body.logprobs
    return unpack_tokens(ids).tolist(), body.logprobs
