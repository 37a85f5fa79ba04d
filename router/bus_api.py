"""The router's verbs on the bus: for engines, announcing; for clients, generating, models, tokens and status; for
operators, strategies and engines.

Where keys are in use, a session's role says what it may call: an engine's announces, a client's generates and looks,
an admin's does everything.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from microserve.router.core import GenerationSpec
from microserve.router.text_stream import TextStream
from microserve.runtime.clock import Clock, monotonic
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import Cancelled, Forbidden, InternalError, InvalidRequest, MicroserveError
from microserve.runtime.ids import IdSource
from microserve.runtime.log import get_logger
from microserve.runtime.messages import (
    Aborted,
    AbortRequest,
    Announce,
    Detokenize,
    Detokenized,
    EngineCall,
    Finished,
    Generate,
    Heartbeat,
    Info,
    Leave,
    ListEvents,
    ListModels,
    ListRequests,
    ListStrategies,
    Models,
    Ok,
    RollbackStrategy,
    SetStrategy,
    Stats,
    Status,
    StrategySet,
    TextChunk,
    Tokenize,
    Tokenized,
    Usage,
)
from microserve.runtime.rpc import RpcServer

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from microserve.router.core import RouterCore
    from microserve.router.dispatch import Generation
    from microserve.router.text import TextModel
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.keys import KeyRing
    from microserve.runtime.messages import EngineVerb, RouterVerb
    from microserve.runtime.rpc import IncomingCall

_log = get_logger(__name__)

_ENGINES = (Announce, Heartbeat, Leave)
_ADMINS = (SetStrategy, RollbackStrategy, ListRequests, AbortRequest, ListEvents)
_LOOKS = (Info, Stats)
"""Calls on engines that change nothing, and tell nothing of other people's prompts (as a look into caches does)."""


class RouterApi:
    """Answers the calls of a router's bus listener. Give `server` to `Bus.listen`."""

    def __init__(self, core: RouterCore, *, ring: KeyRing | None = None, clock: Clock = monotonic) -> None:
        """`ring`: the keys that may come in, where keys are in use."""
        self.server = RpcServer(self._handle, clock=clock)
        self._core = core
        self._ring = ring
        self._clock = clock
        self._ids = IdSource("req")
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends what is still being answered."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def _handle(self, call: IncomingCall) -> None:
        core, body = self._core, call.body
        _check_role(call.session.role, body)
        match body:
            case Heartbeat():
                core.heartbeat(body.engine_id, body.epoch, body.load)
                call.reply(Ok())
            case Announce():
                core.announce(body.info, body.load)
                call.reply(Ok())
            case Leave():
                core.leave(body.engine_id, body.epoch)
                call.reply(Ok())
            case Generate():
                self._start(call, self._generate(call, body))
            case Tokenize():
                self._start(call, self._tokenize(call, body))
            case ListModels():
                call.reply(Models(models=core.models()))
            case Detokenize():
                call.reply(Detokenized(text=core.text_model(body.model).decode(unpack_tokens(body.ids))))
            case Status():
                call.reply(core.status())
            case ListStrategies():
                self._start(call, self._list_strategies(call))
            case SetStrategy():
                self._start(call, self._set_strategy(call, body))
            case RollbackStrategy():
                call.reply(
                    StrategySet(
                        active=core.versions.roll_back(model=body.model, number=body.number, by=self._who(call))
                    )
                )
            case ListRequests():
                call.reply(core.requests(request_id=body.request_id, recent=body.recent, limit=body.limit))
            case AbortRequest():
                call.reply(Aborted(outcome=core.abort(body.request_id, by=self._who(call))))
            case ListEvents():
                call.reply(core.events.after(body.after, body.limit))
            case EngineCall():
                self._start(call, self._on_engine(call, body))
            case _:
                raise InvalidRequest(f"a router does not serve {type(body).__name__}")

    def _start(self, call: IncomingCall, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(call, work), name=f"call {call.id}")
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._done, call, work))
        call.on_cancel = functools.partial(_cancel, task)

    def _done(self, call: IncomingCall, work: Coroutine[None, None, None], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # A task that is cancelled before it runs answers nothing, and its work never begins.
        work.close()
        call.fail(Cancelled("the call was cancelled"))

    async def _answer(self, call: IncomingCall, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except MicroserveError as error:
            self._core.metrics.call_error(error.code)
            call.fail(error)
        except Exception:  # a bug of ours is the answer of this call; the others go on
            _log.exception("call failed", every=1.0, verb=type(call.body).__name__)
            call.fail(InternalError("the router failed; its log says more"))

    async def _on_engine(self, call: IncomingCall, body: EngineCall) -> None:
        budget = None if call.deadline is None else max(0.001, call.deadline - self._clock())
        stream = self._core.engine_call(body.engine_id, body.body, budget=budget, by=self._who(call))
        try:
            async for part in stream:
                call.part(part)
        finally:
            stream.cancel()  # no effect once it has ended; else our caller is gone, and the engine stops
        call.reply(stream.reply)

    def _who(self, call: IncomingCall) -> str:
        """The name of the key that a call came under; empty where keys are not in use."""
        key = self._ring.find(call.session.user) if self._ring is not None else None
        return key.name if key is not None else ""

    async def _list_strategies(self, call: IncomingCall) -> None:
        call.reply(await self._core.strategies())

    async def _set_strategy(self, call: IncomingCall, body: SetStrategy) -> None:
        active = await self._core.versions.set(
            body.name, body.settings, model=body.model, share=body.share, dry_run=body.dry_run, by=self._who(call)
        )
        call.reply(StrategySet(active=active, dry_run=body.dry_run))

    async def _tokenize(self, call: IncomingCall, body: Tokenize) -> None:
        text = self._core.text_model(body.model)
        call.reply(Tokenized(ids=pack_tokens(await text.aencode(body.text, body.add_special_tokens))))

    async def _generate(self, call: IncomingCall, body: Generate) -> None:
        core = self._core
        core.check_open()
        prompt = await self._prompt(body)
        core.output_budget(core.model(body.model), len(prompt), body.sampling.max_tokens)
        timeout = body.timeout
        if call.deadline is not None:
            left = max(0.0, call.deadline - self._clock())
            timeout = left if timeout is None else min(timeout, left)
        spec = GenerationSpec(body.request_id or self._ids.next(), body.model, prompt, body.sampling, timeout)
        text = core.text_model(body.model) if core.has_text(body.model) else None
        if text is None and body.stop:
            core.text_model(body.model)
        generation = core.generate(spec)
        try:
            if text is None:
                await _stream_tokens(call, generation)
            else:
                await _stream_text(call, generation, text, prompt, body)
        finally:
            generation.cancel()

    async def _prompt(self, body: Generate) -> TokenArray:
        given = [name for name in ("text", "prompt", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"give exactly one of text, prompt and messages, not {' and '.join(given) if given else 'none'}",
                param=given[1] if given else "prompt",
            )
        if body.prompt is not None:
            return unpack_tokens(body.prompt)
        model = self._core.text_model(body.model)
        if body.text is not None:
            return await model.aencode(body.text)
        messages = [
            {"role": each.role, "content": each.content} | ({} if each.name is None else {"name": each.name})
            for each in body.messages or ()
        ]
        # The template writes the special tokens itself.
        return await model.aencode(model.render_chat(messages), add_special_tokens=False)


async def _stream_text(
    call: IncomingCall, generation: Generation, model: TextModel, prompt: TokenArray, body: Generate
) -> None:
    stream = TextStream(generation, model, prompt, stop=body.stop, min_tokens=body.sampling.min_tokens)
    async for piece in stream:
        if piece.text or piece.tokens:
            call.part(TextChunk(text=piece.text, ids=pack_tokens(piece.tokens), logprobs=piece.logprobs))
        if piece.finish_reason is not None and piece.usage is not None:
            _finish(call, generation, piece.finish_reason, piece.usage)


async def _stream_tokens(call: IncomingCall, generation: Generation) -> None:
    """For a model whose tokenizer we do not have: ids alone."""
    async for chunk in generation:
        if chunk.tokens:
            call.part(TextChunk(text="", ids=pack_tokens(chunk.tokens), logprobs=chunk.logprobs))
        if chunk.finish is not None:
            _finish(call, generation, chunk.finish.finish_reason, chunk.finish.usage)


def _finish(call: IncomingCall, generation: Generation, reason: str, usage: Usage) -> None:
    engines = generation.engine_ids
    call.reply(
        Finished(
            finish_reason=reason,
            usage=usage,
            request_id=generation.request_id,
            strategy=generation.strategy_version,
            engine=engines[-1] if engines else "",
        )
    )


def _check_role(role: str, body: EngineVerb | RouterVerb) -> None:
    """Raises `Forbidden` where keys are in use and this one is not for that."""
    if role in ("", "admin"):
        return
    if isinstance(body, EngineCall):
        allowed = role == "client" and isinstance(body.body, _LOOKS)
    elif isinstance(body, _ENGINES):
        allowed = role == "engine"
    else:
        allowed = role == "client" and not isinstance(body, _ADMINS)
    if not allowed:
        asked = type(body).__name__ if not isinstance(body, EngineCall) else f"{type(body.body).__name__} on an engine"
        needed = "engine" if isinstance(body, _ENGINES) else "admin"
        raise Forbidden(f"a key of role {role} may not call {asked}; that takes one of role {needed}")


def _cancel(task: asyncio.Task[None], _reason: MicroserveError) -> None:
    task.cancel()
