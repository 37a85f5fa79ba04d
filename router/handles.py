"""What a strategy is given to work with: the fleet and its engines, as one choice sees them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from microserve.router.pending import Pending, RunKv, RunSending, any_end
from microserve.router.strategy import Chunk
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import MicroserveError, NoEngine, ProtocolError
from microserve.runtime.messages import (
    CacheMatch,
    CacheMatched,
    Commit,
    Committed,
    Generated,
    PrepRecv,
    RemoteSend,
    SendReport,
    StartGenerate,
    Tokens,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from microserve.router.link import Charge, EngineLink
    from microserve.router.strategy import Kv, Sending
    from microserve.router.sub_requests import SubRequests
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.messages import Load, ReplyBody, TokenLogprobs
    from microserve.runtime.rpc import CallStream

MOST_EXPECTED = 256
"""Output tokens that a prepared receive keeps room for, unless the strategy says otherwise: few answers are as long as
they may be."""

_REPORT_LIMIT = 0.25
"""Seconds that the end of a generation waits for what senders have to tell of KV that it has used: that is on its
way."""
_NOTHING_SENT = SendReport(computed=0, reused=0, bytes=0, seconds=0.0)


class RunFleet:
    """The `Fleet` of one choice."""

    __slots__ = ("_run",)

    def __init__(self, run: SubRequests) -> None:
        self._run = run

    @property
    def engines(self) -> list[str]:
        return [link.id for link in self._run.fleet.candidates(self._run.request.model)]

    def engine(self, engine_id: str) -> RunEngine:
        run = self._run
        link = run.fleet.link(engine_id)
        if link is None or link not in run.fleet.candidates(run.request.model):
            raise NoEngine(f"engine '{engine_id}' cannot serve '{run.request.model}' now", retry_after=1.0)
        return RunEngine(run, link, None)

    def pick(self, label: str | None = None, *, exclude: Collection[str] = (), prefix: bool = False) -> RunEngine:
        run = self._run
        run.check_open()
        fleet, model = run.fleet, run.request.model
        if prefix:
            cached = run.all_matched()
            link = fleet.pick(model, label, avoid=run.avoid, exclude=exclude, cached=cached)
            matched = cached.get(link, 0)
        else:
            link = fleet.pick(model, label, avoid=run.avoid, exclude=exclude)
            matched = run.matched(link, run.prompt_bytes)
        return RunEngine(run, link, run.charge(link, len(run.request.prompt) - matched))


class RunEngine:
    """An `Engine` of one choice. `charge` is what it was picked with; the first sub-request takes it over."""

    __slots__ = ("_charge", "_link", "_run")

    def __init__(self, run: SubRequests, link: EngineLink, charge: Charge | None) -> None:
        self._run = run
        self._link = link
        self._charge = charge

    @property
    def id(self) -> str:
        return self._link.id

    @property
    def labels(self) -> Mapping[str, str]:
        return self._link.info.labels

    @property
    def load(self) -> Load:
        return self._link.load

    @property
    def work(self) -> float:
        own = self._charge.weight if self._charge is not None else 0
        return max(0.0, self._link.work - own)

    @property
    def matched(self) -> int:
        return self._run.matched(self._link, self._run.prompt_bytes)

    def carries(self, label: str) -> bool:
        return self._link.carries(label)

    # --- sub-requests ------------------------------------------------------------------------------------------------

    def prep_recv(
        self,
        *,
        end: int | None = None,
        prompt: Sequence[int] | TokenArray | None = None,
        expect_tokens: int | None = None,
        wait: float | None = None,
    ) -> Pending[RunKv]:
        run, link = self._run, self._link
        data = run.prompt_bytes if prompt is None else pack_tokens(prompt)
        if expect_tokens is None:
            expect_tokens = min(run.request.sampling.max_tokens, MOST_EXPECTED) if prompt is None else 0
        length = len(data) // 4
        until = _position(end, length)
        body = PrepRecv(
            request_id=run.request.id,
            sub_id=run.next_sub_id(),
            prompt=data,
            end=end,
            expect_tokens=expect_tokens,
            admit_by=run.admission(wait),
        )
        pending = run.prepare(link, body, until)
        if self._charge is not None:
            # What others send, this engine does not compute.
            self._charge.expect(max(0, length - max(until, run.matched(link, data))))
        return pending

    def remote_send(self, kv: Kv, *, begin: int | None = None, end: int | None = None) -> RunSending:
        run, link, kv = self._run, self._link, _own(kv)
        run.check_open()
        length = len(kv.prompt) // 4
        first = min(kv.matched, kv.end) if begin is None else _position(begin, length)
        last = kv.end if end is None else _position(end, length)
        sending = RunSending(link, kv, first, last)
        if first >= last:
            self._drop_charge()
            sending.settle(_NOTHING_SENT, None)
            return sending
        body = RemoteSend(
            request_id=run.request.id,
            sub_id=run.next_sub_id(),
            prompt=kv.prompt,
            address=kv.address,
            begin=first,
            end=last,
        )
        # It needs the KV of everything before the range, too.
        run.send(sending, body, self._take_charge(last - min(last, run.matched(link, kv.prompt))))
        return sending

    def start_generate(
        self,
        kv: Kv | None = None,
        *,
        begin: int | None = None,
        watch: Sending | Iterable[Sending] = (),
        kv_wait: float | None = None,
        max_tokens: int | None = None,
        after: Sequence[int] = (),
        wait: float | None = None,
    ) -> TokenStream:
        run, link = self._run, self._link
        request, prompt = run.request, run.prompt_bytes
        if len(after):
            request = request.after(list(after))
            prompt = pack_tokens(request.prompt)
        sampling, length = request.sampling, len(request.prompt)
        if max_tokens is not None:
            if max_tokens < 1:
                raise ValueError(f"max_tokens is {max_tokens}, and at least 1")
            most = min(sampling.max_tokens, request.prior_output + max_tokens)
            least = min(sampling.min_tokens, most)
            sampling = msgspec.structs.replace(sampling, max_tokens=most, min_tokens=least)
        own = None if kv is None else _own(kv)
        if own is None:
            begin = 0 if begin is None else begin
            there = run.matched(link, run.prompt_bytes)
        else:
            self._check_mine(own)
            begin = own.end if begin is None else begin
            there = max(_position(begin, length), own.matched)
        body = StartGenerate(
            request_id=run.request.id,
            sub_id=run.next_sub_id(),
            prompt=prompt,
            begin=begin,
            sampling=sampling,
            prior_output=request.prior_output,
            admit_by=None if wait is None else run.patience(wait),
            lease=None if own is None else own.address.lease,
            kv_wait=None if own is None else run.kv_wait(kv_wait),
        )
        return TokenStream(run, link, own, body, self._take_charge(max(1, length - there)))

    def commit(self, kv: Kv, *, wait: float | None = None) -> Pending[int]:
        run, link, own = self._run, self._link, _own(kv)
        self._check_mine(own)
        pending: Pending[int] = Pending()
        record = run.begin_record("commit", link, 0, own.end)
        self._drop_charge()

        def ended(reply: ReplyBody | None, error: MicroserveError | None) -> None:
            if isinstance(reply, Committed):
                run.committed(own, reply.committed_until)
                pending.settle(reply.committed_until, None)
            else:
                pending.settle(None, error or _strange(link, reply))

        body = Commit(
            request_id=run.request.id,
            sub_id=run.next_sub_id(),
            lease=own.address.lease,
            wait=run.patience(wait),
        )
        run.call(link, body, record, ended)
        return pending

    def release(self, kv: Kv) -> None:
        self._run.release(_own(kv))

    def cache_match(self, prompt: Sequence[int] | TokenArray | None = None) -> Pending[int]:
        run, link = self._run, self._link
        data = run.prompt_bytes if prompt is None else pack_tokens(prompt)
        pending: Pending[int] = Pending()
        record = run.begin_record("cache_match", link, 0, len(data) // 4)

        def ended(reply: ReplyBody | None, error: MicroserveError | None) -> None:
            if isinstance(reply, CacheMatched):
                record.matched = reply.tokens
                pending.settle(reply.tokens, None)
            else:
                pending.settle(None, error or _strange(link, reply))

        run.call(link, CacheMatch(prompt=data), record, ended)
        return pending

    # --- inner -------------------------------------------------------------------------------------------------------

    def _take_charge(self, tokens: int) -> Charge:
        """The charge of a sub-request that has so many tokens to compute."""
        charge, self._charge = self._charge, None
        if charge is None:
            return self._run.charge(self._link, tokens)
        charge.expect(tokens)
        return charge

    def _drop_charge(self) -> None:
        if self._charge is not None:
            self._run.discharge(self._charge)
            self._charge = None

    def _check_mine(self, kv: RunKv) -> None:
        if kv.link is not self._link:
            raise ValueError(f"the KV is prepared on engine {kv.engine}, not on {self.id}")


class TokenStream:
    """The chunks of one `start_generate`."""

    __slots__ = (
        "_begin",
        "_call",
        "_charge",
        "_finished",
        "_kv",
        "_link",
        "_most",
        "_prior_output",
        "_record",
        "_run",
        "_waiting",
    )

    def __init__(
        self, run: SubRequests, link: EngineLink, kv: RunKv | None, body: StartGenerate, charge: Charge
    ) -> None:
        self._run = run
        self._link = link
        self._kv = kv
        self._charge = charge
        self._waiting = True
        self._finished = False
        self._begin = body.begin
        self._prior_output = body.prior_output
        self._most = body.sampling.max_tokens
        self._record = run.begin_record("start_generate", link, body.begin, len(body.prompt) // 4)
        try:
            self._call: CallStream = run.call(link, body, self._record, self._ended)
        except MicroserveError:
            run.discharge(charge)
            raise
        run.epochs[link.id] = link.info.epoch
        if run.generating[-1:] != [link.id]:
            run.generating.append(link.id)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Chunk:
        if self._finished:
            raise StopAsyncIteration
        call = self._call
        try:
            body = await call.__anext__()
        except StopAsyncIteration:
            await self._wait_for_reports()
            return self._last(Chunk([]))
        chunk = Chunk(*_tokens(body))
        if self._waiting:
            self._begun()
            if type(body) is Tokens and body.cached is not None:
                self._run.began(self._link, self._kv, body.cached)
        for body in call.take():
            ids, logprobs = _tokens(body)
            chunk.tokens += ids
            if logprobs is not None:
                chunk.logprobs = (chunk.logprobs or []) + logprobs
        if call.ended:
            # The answer usually comes with the last token: then both are one chunk.
            try:
                return chunk if self._unreported() else self._last(chunk)
            except ProtocolError:
                # It ended in an error, which is raised when what arrived before it has been taken.
                return chunk
        return chunk

    def _begun(self) -> None:
        """The prompt is computed, and a lease used up."""
        self._waiting = False
        self._charge.expect(0)
        if self._kv is not None:
            self._kv.over = True
        run = self._run
        run.cached(self._link, run.prompt_bytes, len(run.request.prompt))

    def _ended(self, reply: ReplyBody | None, error: MicroserveError | None) -> None:
        if isinstance(reply, Generated):
            if self._waiting:
                self._begun()
            usage, record = reply.usage, self._record
            record.matched = usage.cached_tokens
            record.reused = record.matched + reply.received_tokens
            # What it had cached of earlier output is not told, and counts as computed.
            record.computed = max(0, usage.prompt_tokens + self._prior_output - record.reused)
        self._run.discharge(self._charge)

    def _unreported(self) -> list[RunSending]:
        """Sends whose reports say how much of what this generation used was computed for it, where all has come."""
        reply, kv = self._call.reply, self._kv
        if not isinstance(reply, Generated) or kv is None or not reply.received_tokens or reply.recomputed_tokens:
            return []
        return [] if self._run.cached_is_known else kv.unreported(self._begin)

    async def _wait_for_reports(self) -> None:
        """A short generation may end before the senders have told."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._run.patience(_REPORT_LIMIT)):
                while running := self._unreported():
                    await any_end(running)

    def _last(self, chunk: Chunk) -> Chunk:
        reply = self._call.reply
        if type(reply) is not Generated:
            raise _strange(self._link, reply)
        self._finished = True
        usage, run = reply.usage, self._run
        cached = usage.cached_tokens
        whole = run.cached_tokens(self._link, self._kv, cached, reply.received_tokens)
        limited = self._most < run.request.sampling.max_tokens and usage.completion_tokens >= self._most
        if reply.finish_reason == "length" and limited:
            run.went_on(whole)
            return chunk
        if whole != cached:
            reply = msgspec.structs.replace(reply, usage=msgspec.structs.replace(usage, cached_tokens=whole))
        chunk.finish = reply
        return chunk


def _tokens(body: object) -> tuple[list[int], list[TokenLogprobs] | None]:
    if type(body) is not Tokens:
        raise ProtocolError(f"an engine streamed {type(body).__name__} instead of tokens")
    ids = body.ids
    if len(ids) == 4:
        return [int.from_bytes(ids, "little", signed=True)], body.logprobs
    return unpack_tokens(ids).tolist(), body.logprobs


def _position(index: int | None, length: int) -> int:
    """As engines count: None is the end, and what is negative counts from there."""
    if index is None:
        return length
    return index if index >= 0 else max(0, length + index)


def _own(kv: Kv) -> RunKv:
    if not isinstance(kv, RunKv):
        # The program's mistake, and not the client's: so it is told with the line.
        raise TypeError(f"{type(kv).__name__} is not what prep_recv gives when it is awaited")
    return kv


def _strange(link: EngineLink, reply: object) -> ProtocolError:
    return ProtocolError(f"engine {link.id} answered with {type(reply).__name__}")
