"""The verbs of leases and of the prefix tree: checked here, done in the step thread, answered here.

Lives on the asyncio thread.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from microserve.engine.checks import check_budget, check_finite, check_position, check_prompt
from microserve.engine.outputs import CommitTicket, Opened, Prepare
from microserve.engine.peers import check_sender
from microserve.engine.sending import prompt_digest
from microserve.runtime.clock import monotonic
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import InvalidRequest, MicroserveError, StaleEpoch
from microserve.runtime.messages import (
    CacheEvict,
    CacheEvicted,
    CacheMatch,
    CacheMatched,
    CachePin,
    CachePrefixes,
    CacheUnpin,
    Claim,
    Claimed,
    ClaimEnded,
    Commit,
    Committed,
    Forgo,
    KvAddress,
    Ok,
    Prefixes,
    PrefixEntry,
    Prepared,
    PrepRecv,
    Release,
    Released,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.calls import CallBook, SubCall
    from microserve.engine.outputs import Output
    from microserve.engine.receiving import Receiving
    from microserve.kv.cache import KvCache
    from microserve.runtime.bus import Session
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import EngineInfo, ReplyBody
    from microserve.runtime.rpc import IncomingCall

T = TypeVar("T")

KvVerb = (
    Release | Forgo | Claim | ClaimEnded | CacheMatch | CachePin | CacheUnpin | CacheEvict | CachePrefixes
)
"""What is answered within a turn of the step thread."""


class KvSteps(Protocol):
    """What these verbs need of the step thread (`StepLoop`)."""

    def command(self, function: Callable[[], None]) -> None: ...

    def ask(self, function: Callable[[], T], done: Callable[[T], None]) -> None: ...


class KvVerbs:
    """Leases and the prefix tree. Of `receiving` and `cache` nothing is called but in the step thread."""

    def __init__(
        self,
        *,
        info: Callable[[], EngineInfo],
        book: CallBook,
        sinks: dict[object, Callable[[Output], None]],
        steps: KvSteps,
        receiving: Receiving,
        cache: KvCache,
        limit: Callable[[int], None],
        clock: Clock = monotonic,
    ) -> None:
        self._info = info
        self._book = book
        self._sinks = sinks
        self._steps = steps
        self._receiving = receiving
        self._cache = cache
        self._limit = limit
        self._clock = clock
        self._granted: dict[tuple[str, int, str], tuple[int, Claimed]] = {}
        """Open claims by sender and send, each with its range's number: whoever asks again gets the same answer."""

    # --- sub-requests ----------------------------------------------------------------------------------------------

    def prepare(self, call: IncomingCall, body: PrepRecv) -> None:
        """Begins a `prep_recv` that the book does not know. Raises the refusal."""
        tokens = check_prompt(body.prompt, self._info().model)
        self._limit(len(tokens))
        ticket = Prepare(
            request_id=body.request_id,
            sub_id=body.sub_id,
            tokens=tokens,
            end=check_position(body.end, len(tokens), "end"),
            expect_tokens=body.expect_tokens,
            admit_by=check_budget(self._clock(), body.admit_by, "admit_by"),
            owner=call.session,
        )
        sub = self._book.open(call, body.sub_id, prepare_key(body))
        self._sinks[ticket] = lambda output: self._prepared(sub, ticket, output)
        sub.stop = lambda error: self._steps.command(partial(self._receiving.cancel, ticket))
        self._steps.command(lambda: self._receiving.prepare(ticket, self._clock()))

    def _prepared(self, sub: SubCall, ticket: Prepare, output: Output) -> None:
        del self._sinks[ticket]
        body = output.body
        if isinstance(body, MicroserveError):
            sub.fail(body)
        elif isinstance(body, Opened):
            lease, info = body.lease, self._info()
            if sub.ended:
                # Whoever asked has gone: nobody knows of this lease.
                self._steps.command(lambda: self._close(lease.id))
                return
            address = KvAddress(
                engine_id=info.engine_id,
                epoch=info.epoch,
                endpoint=info.endpoint,
                lease=lease.id,
                matched=lease.matched,
                end=lease.end,
                pages=pack_tokens(lease.pages),
                layout=info.layout,
            )
            sub.reply(Prepared(address=address))

    def _close(self, lease_id: int) -> None:
        self._receiving.release(lease_id, self._clock())

    def commit(self, call: IncomingCall, body: Commit) -> None:
        """Begins a `commit` that the book does not know."""
        wait = check_finite(body.wait, "wait")
        ticket = CommitTicket(request_id=body.request_id, sub_id=body.sub_id, lease=body.lease)
        sub = self._book.open(call, body.sub_id, commit_key(body))
        self._sinks[ticket] = lambda output: self._committed(sub, ticket, output)
        sub.stop = lambda error: self._steps.command(partial(self._receiving.cancel, ticket))
        self._steps.command(lambda: self._receiving.commit(ticket, wait or 0.0, self._clock()))

    def _committed(self, sub: SubCall, ticket: CommitTicket, output: Output) -> None:
        del self._sinks[ticket]
        body = output.body
        if isinstance(body, MicroserveError):
            sub.fail(body)
        elif isinstance(body, Committed):
            sub.reply(body)

    # --- what is answered within a turn ------------------------------------------------------------------------------

    def answer(self, call: IncomingCall, body: KvVerb) -> None:
        """Does it in the step thread and answers. Raises the refusal where that can be told before."""
        receiving, cache, clock = self._receiving, self._cache, self._clock
        match body:
            case Claim():
                check_sender(call.session, body.engine_id, body.sender_epoch)
                self.grant(body, partial(_answer, call))
            case ClaimEnded():
                self._check_holder(call.session, body.claim)
                self.claim_ended(body.claim, body.error, lambda: call.reply(Ok()))
            case Release():
                self._ask(call, lambda: Released(outcome=receiving.release(body.lease, clock())))
            case Forgo():
                self._ask(
                    call, lambda: Released(outcome=receiving.forgo(body.lease, body.begin, body.end, clock()))
                )
            case CacheMatch():
                prompt = check_prompt(body.prompt, self._info().model)
                self._ask(call, lambda: CacheMatched(tokens=cache.match(prompt).length))
            case CachePin():
                prompt = check_prompt(body.prompt, self._info().model)
                self._ask(call, lambda: CacheMatched(tokens=cache.pin(prompt, body.ttl)))
            case CacheUnpin():
                prompt = check_prompt(body.prompt, self._info().model)
                self._ask(call, lambda: CacheMatched(tokens=cache.unpin(prompt)))
            case CacheEvict():
                whole = None if body.prompt is None else check_prompt(body.prompt, self._info().model)
                self._ask(call, lambda: CacheEvicted(pages=cache.evict(whole)))
            case CachePrefixes():
                self._ask(call, lambda: self._prefixes(body.count))

    def _ask(self, call: IncomingCall, function: Callable[[], ReplyBody]) -> None:
        self._steps.ask(partial(_attempt, function), partial(_answer, call))

    def _prefixes(self, count: int) -> Prefixes:
        return Prefixes(
            prefixes=[
                PrefixEntry(
                    prompt=pack_tokens(found.tokens), pages=found.pages, references=found.references, pinned=found.pinned
                )
                for found in self._cache.largest_prefixes(count)
            ]
        )

    # --- claims ----------------------------------------------------------------------------------------------------

    def grant(self, body: Claim, done: Callable[[Claimed | MicroserveError], None]) -> None:
        """A sender wants to write a range; `done` is given the claim or the refusal. Raises `StaleEpoch`."""
        epoch = self._info().epoch
        if body.epoch != epoch:
            raise StaleEpoch(f"the address is of epoch {body.epoch:x}; this is {epoch:x}", param="epoch")
        self._steps.ask(partial(_attempt, lambda: self._grant(body)), done)

    def _grant(self, body: Claim) -> Claimed:
        """In the step thread."""
        sender = (body.engine_id, body.sender_epoch)
        key, what = (*sender, body.sub_id), hash((body.lease, body.begin, body.end))
        known = self._granted.get(key) if body.sub_id else None
        if known is not None and known[0] == what:
            return known[1]
        claimed = self._receiving.claim(body.lease, body.begin, body.end, sender, body.digest, self._clock())
        self._granted[key] = (what, claimed)
        return claimed

    def claim_ended(self, claim: int, error: str, done: Callable[[], None] = lambda: None) -> None:
        """The pages of `claim` are written no more."""
        self._steps.ask(lambda: self._end(claim, error), lambda _: done())

    def _end(self, claim: int, error: str) -> None:
        self._receiving.claim_ended(claim, error, self._clock())
