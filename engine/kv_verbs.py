"""The verbs of leases and of the prefix tree: checked here, done in the step thread, answered here.

Lives on the asyncio thread.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from microserve.engine.checks import check_budget, check_finite, check_position, check_prompt
from microserve.engine.outputs import CommitTicket, Opened, Output, Prepare
from microserve.engine.peers import check_sender
from microserve.engine.sending import prompt_digest
from microserve.runtime.clock import monotonic
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import Cancelled, InvalidRequest, MicroserveError
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
    PrefixEntry,
    Prefixes,
    Prepared,
    PrepRecv,
    Release,
    Released,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.calls import CallBook, SubCall
    from microserve.engine.plan import TokenArray
    from microserve.engine.receiving import Receiving
    from microserve.engine.request import Request
    from microserve.engine.scheduler import Scheduler
    from microserve.runtime.bus import Session
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import EngineInfo, ReplyBody
    from microserve.runtime.rpc import IncomingCall

T = TypeVar("T")

KvVerb = Release | Forgo | Claim | ClaimEnded | CacheMatch | CachePin | CacheUnpin | CacheEvict | CachePrefixes
"""What is answered within a turn of the step thread."""


_LATE = 0.5
"""Seconds for which notifications are looked for after their claim has ended."""


class KvSteps(Protocol):
    """What these verbs need of the step thread (`StepLoop`)."""

    def command(self, function: Callable[[], None]) -> None: ...

    def ask(self, function: Callable[[], T], done: Callable[[T], None]) -> None: ...


class _Grant(NamedTuple):
    asked: Claim
    claimed: Claimed


class KvVerbs:
    """Leases and the prefix tree. Of `receiving` and `scheduler` nothing is called but in the step thread.

    `limit` raises for a prompt that is too long; `kv_wait` is how long a generation or a
    commit waits for KV if it does not say. `expect` is told how many claims more or fewer may bring pages now; from any
    thread. Whoever delivers outputs finds ours in `sinks`.
    """

    def __init__(
        self,
        *,
        info: Callable[[], EngineInfo],
        book: CallBook,
        sinks: dict[object, Callable[[Output], None]],
        steps: KvSteps,
        scheduler: Scheduler,
        receiving: Receiving,
        limit: Callable[[int], None],
        kv_wait: float,
        expect: Callable[[int], None] = lambda change: None,
        clock: Clock = monotonic,
    ) -> None:
        self._info = info
        self._book = book
        self._sinks = sinks
        self._steps = steps
        self._receiving = receiving
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._limit = limit
        self.kv_wait = kv_wait
        """May be set to another at any time."""
        self._expect = expect
        self._clock = clock
        self._grants: dict[tuple[str, int, str], _Grant] = {}
        """Open claims by sender (engine, epoch) and send. In the step thread."""
        self._keys: dict[int, tuple[str, int, str]] = {}

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
            expect_tokens=min(body.expect_tokens, self._info().model.max_context),
            admit_by=check_budget(self._clock(), body.admit_by, "admit_by"),
            owner=call.session,
        )
        sub = self._book.open(call, body.sub_id, prepare_key(body))
        self._sinks[ticket] = lambda output: self._prepared(sub, ticket, output)
        sub.stop = lambda error: self._forget(ticket, partial(self._receiving.abort_prepare, ticket))
        self._begin(ticket, lambda: self._receiving.prepare(ticket, self._clock()))

    def _prepared(self, sub: SubCall, ticket: Prepare, output: Output) -> None:
        self._sinks.pop(ticket, None)
        body = output.body
        if isinstance(body, MicroserveError):
            sub.fail(body)
        elif isinstance(body, Opened):
            lease, info = body.lease, self._info()
            if sub.ended:
                # Whoever asked has gone: nobody knows of this lease.
                self._steps.ask(lambda: self._release(lease.id), lambda _: None)
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

    def start(self, request: Request, lease_id: int, begin: int, wait: float | None) -> None:
        """A generation goes on with the KV of a lease, from `begin`; what it is told comes as outputs of `request`."""
        until = self._clock() + (self.kv_wait if wait is None else wait)

        def start() -> None:
            try:
                self._receiving.start(request, lease_id, begin, until, self._clock())
            except MicroserveError as error:
                self._scheduler.refuse(request, error)

        self._steps.command(start)

    def commit(self, call: IncomingCall, body: Commit) -> None:
        """Begins a `commit` that the book does not know. Raises the refusal."""
        wait = check_finite(body.wait, "wait")
        # The sender's "done" may overtake our transport's own notifications: committing at once would lose pages.
        until = self._clock() + (self.kv_wait if wait is None else wait)
        ticket = CommitTicket(request_id=body.request_id, sub_id=body.sub_id, lease=body.lease)
        sub = self._book.open(call, body.sub_id, commit_key(body))
        self._sinks[ticket] = lambda output: self._committed(sub, ticket, output)
        sub.stop = lambda error: self._forget(ticket, lambda: self._receiving.abort_commit(ticket, self._clock()))
        self._begin(ticket, lambda: self._receiving.commit(ticket, until, self._clock()))

    def _committed(self, sub: SubCall, ticket: CommitTicket, output: Output) -> None:
        self._sinks.pop(ticket, None)
        body = output.body
        if isinstance(body, MicroserveError):
            sub.fail(body)
        elif isinstance(body, Committed):
            sub.reply(body)

    def _begin(self, ticket: Prepare | CommitTicket, function: Callable[[], None]) -> None:
        def begin() -> None:
            try:
                function()
            except MicroserveError as error:
                self._scheduler.tell(Output(ticket, error, True))

        self._steps.command(begin)

    def _forget(self, ticket: Prepare | CommitTicket, function: Callable[[], None]) -> None:
        """Nobody waits for `ticket`. What it got meanwhile comes to its sink first, which gives it back."""

        def forget() -> None:
            function()
            self._scheduler.tell(Output(ticket, Cancelled("nobody waits for it"), True))

        self._steps.command(forget)

    def _release(self, lease_id: int) -> str:
        return self._receiving.release(lease_id, self._clock())

    def owner_lost(self, session: Session) -> None:
        """A session is gone: its leases end, except those in use."""
        self._steps.command(lambda: self._owner_lost(session))

    def _owner_lost(self, session: Session) -> None:
        self._receiving.owner_lost(session, self._clock())

    # --- what is answered within a turn ------------------------------------------------------------------------------

    def answer(self, call: IncomingCall, body: KvVerb) -> None:
        """Does it in the step thread, and answers. Raises the refusal where it can be told before."""
        receiving, cache, clock = self._receiving, self._cache, self._clock
        match body:
            case Claim():
                check_sender(call.session, body.engine_id, body.sender_epoch)
                self._ask(call, lambda: self.grant(body))
            case ClaimEnded():
                sender = (call.session.peer.name, call.session.peer.epoch)
                self._expect_a_while()
                self._ask(call, lambda: self._claim_ended(call.session.peer.kind, sender, body))
            case Release():
                self._ask(call, lambda: Released(outcome=self._release(body.lease)))
            case Forgo():
                self._ask(call, lambda: Released(outcome=receiving.forgo(body.lease, body.begin, body.end, clock())))
            case CacheMatch():
                prompt = self._prompt(body.prompt)
                self._ask(call, lambda: CacheMatched(tokens=cache.match(prompt).length))
            case CachePin():
                prompt = self._prompt(body.prompt)
                self._ask(call, lambda: CacheMatched(tokens=cache.pin(prompt, body.ttl)))
            case CacheUnpin():
                prompt = self._prompt(body.prompt)
                self._ask(call, lambda: CacheMatched(tokens=cache.unpin(prompt)))
            case CacheEvict():
                whole = None if body.prompt is None else self._prompt(body.prompt)
                self._ask(call, lambda: CacheEvicted(pages=cache.evict(whole)))
            case CachePrefixes():
                self._ask(call, lambda: self._prefixes(body.count))

    def _expect_a_while(self) -> None:
        # A claim's last notification may come by its own way, a little after the word that the claim has ended.
        self._expect(1)
        asyncio.get_running_loop().call_later(_LATE, self._expect, -1)

    def _prompt(self, data: bytes) -> TokenArray:
        return check_prompt(data, self._info().model)

    def _ask(self, call: IncomingCall, function: Callable[[], ReplyBody]) -> None:
        self._steps.ask(partial(attempt, function), partial(_answer, call))

    def _prefixes(self, count: int) -> Prefixes:
        found = self._cache.largest_prefixes(count)
        return Prefixes(
            prefixes=[
                PrefixEntry(
                    prompt=pack_tokens(each.tokens), pages=each.pages, references=each.references, pinned=each.pinned
                )
                for each in found
            ]
        )

    # --- claims, in the step thread ----------------------------------------------------------------------------------

    def grant(self, body: Claim) -> Claimed:
        """A sender wants to write a range. Raises the refusal. Asked again for one send, the answer is the same."""
        sender = (body.engine_id, body.sender_epoch)
        known = self._grants.get((*sender, body.sub_id)) if body.sub_id else None
        if known is not None and known.asked == body:
            return known.claimed
        now = self._clock()
        lease = self._receiving.leases.get(body.lease)
        if body.digest and body.digest != prompt_digest(lease.tokens[: max(0, body.end)]):
            raise InvalidRequest("the prompt is not the one that the lease was prepared for", param="prompt")
        claim = self._receiving.claim(body.lease, body.epoch, body.begin, body.end, sender, now)
        size = self._cache.page_size
        pages = lease.pages[(body.begin - lease.matched) // size : -(-(body.end - lease.matched) // size)]
        claimed = Claimed(claim=claim, term=max(0.0, lease.dies - now), pages=pack_tokens(pages))
        # Without a name of its own, a claim is told apart by its number.
        key = (*sender, body.sub_id or f"#{claim}")
        self._grants[key] = _Grant(body, claimed)
        self._keys[claim] = key
        self._expect(1)
        return claimed

    def end_claim(self, claim: int, error: str) -> None:
        """The pages of `claim` are written no more. Idempotent."""
        key = self._keys.pop(claim, None)
        if key is not None:
            del self._grants[key]
            self._expect(-1)
        self._receiving.claim_ended(claim, error, self._clock())

    def _claim_ended(self, kind: str, sender: tuple[str, int], body: ClaimEnded) -> Ok:
        key = self._keys.get(body.claim)
        if key is not None and (kind, sender) != ("engine", key[:2]):
            raise InvalidRequest(f"claim {body.claim} belongs to engine {key[0]}", param="claim")
        self.end_claim(body.claim, body.error)
        return Ok()

    def sender_dead(self, engine_id: str, epoch: int) -> None:
        """That incarnation of an engine, and every earlier one, is proven dead."""
        for key in [key for key in self._grants if key[0] == engine_id and key[1] <= epoch]:
            del self._keys[self._grants.pop(key).claimed.claim]
            self._expect(-1)
        self._receiving.sender_dead(engine_id, epoch, self._clock())


class LocalWay:
    """The way from this engine to its own pool. Implements `link.Way`."""

    def __init__(self, name: str, steps: KvSteps, verbs: KvVerbs) -> None:
        self.name = name
        self._steps = steps
        self._verbs = verbs

    async def claim(self, body: Claim) -> Claimed:
        answer: asyncio.Future[Claimed] = asyncio.get_running_loop().create_future()

        def answered(result: Claimed | MicroserveError) -> None:
            if answer.done():
                # Whoever asked has been cancelled.
                if isinstance(result, Claimed):
                    self.end_claim(result.claim, "the send was given up")
            elif isinstance(result, MicroserveError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        self._steps.ask(partial(attempt, lambda: self._verbs.grant(body)), answered)
        try:
            return await answer
        except asyncio.CancelledError:
            # The answer may have come in the same turn of the loop: nobody else knows of the claim.
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.end_claim(answer.result().claim, "the send was given up")
            raise

    def end_claim(self, claim: int, error: str) -> None:
        self._steps.command(lambda: self._verbs.end_claim(claim, error))

    def push_began(self) -> None:
        """Nothing is counted within one engine."""

    def push_ended(self, nbytes: int, seconds: float, error: str) -> None:
        """As above."""


def attempt(function: Callable[[], T]) -> T | MicroserveError:
    """The result, or the refusal as a value: what one thread raises cannot be caught in another."""
    try:
        return function()
    except MicroserveError as error:
        return error


def _answer(call: IncomingCall, result: ReplyBody | MicroserveError) -> None:
    if isinstance(result, MicroserveError):
        call.fail(result)
    else:
        call.reply(result)


def prepare_key(body: PrepRecv) -> int:
    """What a preparation asks for, as one number, budgets aside: a repeated call has the same."""
    return hash((type(body), body.prompt, body.end, body.expect_tokens))


def commit_key(body: Commit) -> int:
    """As `prepare_key`."""
    return hash((type(body), body.lease))
