"""What one choice has started at engines: calls, leases, charges. Whatever ends the choice gives all of it back.

Giving back is posting: calls are cancelled first, then leases are released, and nobody waits for an answer. Leases that
are granted after that are released as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from microserve.router.link import Charge
from microserve.router.pending import Pending, RunKv, RunSending, SubRecord, uncovered
from microserve.router.prefix_index import page_names
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import Cancelled, LeaseTooLarge, MicroserveError, PeerLost, ProtocolError, Unavailable
from microserve.runtime.messages import Abort, Forgo, Prepared, Release, SendReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microserve.router.fleet import EngineFleet
    from microserve.router.link import EngineLink
    from microserve.router.strategy import Request
    from microserve.runtime.clock import Clock
    from microserve.runtime.ids import IdSource
    from microserve.runtime.messages import CacheMatch, Commit, PrepRecv, RemoteSend, ReplyBody, StartGenerate
    from microserve.runtime.rpc import CallStream

    Verb = PrepRecv | RemoteSend | StartGenerate | Commit | CacheMatch
    Posted = Abort | Forgo | Release

MOST_RECORDS = 64
"""Sub-requests of one choice that are remembered."""

_POST_BUDGET = 10.0
"""Seconds after which the answer to something posted, which nobody looks at, is not expected any more."""

_GRACE = 5.0
"""Seconds beyond the end of a choice for which the answer of a preparation is waited for, to give its lease back."""

_ENGINES_WAIT = 10.0
"""Seconds that engines wait for KV where a call does not say (`kv_wait` of their configuration)."""


class SubRequests:
    """Everything that one choice has started. `told` is given every record when it has ended."""

    def __init__(
        self,
        request: Request,
        prompt_bytes: bytes,
        *,
        fleet: EngineFleet,
        clock: Clock,
        deadline: float,
        sub_ids: IdSource,
        told: Callable[[SubRecord], None],
    ) -> None:
        self.request = request
        self.prompt_bytes = prompt_bytes
        self.fleet = fleet
        self.avoid: set[str] = set()
        """Engines that would not, or died: not picked when the program runs again."""
        self.too_large: EngineLink | None = None
        """The engine that leases no room for what it was asked to prepare, whoever else may."""
        self.generating: list[str] = []
        """Engines that were asked to generate, in order."""
        self.epochs: dict[str, int] = {}
        """Which incarnations of them."""
        self.records: list[SubRecord] = []
        self._clock = clock
        self._deadline = deadline
        self._sub_ids = sub_ids
        self._told = told
        self._closed = self._letting_go = False
        self._open: dict[CallStream, Callable[[], None]] = {}
        """How each open call is stopped."""
        self._preparing = 0
        self._kvs: list[RunKv] = []
        self._charges: list[Charge] = []
        self._names: list[int] | None = None
        self._began: tuple[EngineLink, RunKv | None, int] | None = None
        self._cached_at_end: int | None = None
        self._first_cached: int | None = None
        """What nobody computed, of a choice whose first tokens came from another engine than the next ones."""
        self._went_elsewhere = False

    def go_on(self, request: Request) -> None:
        """The choice begins again, with what is left of it. Everything that was started has been let go of."""
        self._went_elsewhere = True
        self.request = request
        self.prompt_bytes = pack_tokens(request.prompt)
        self._names = None

    # --- making calls ------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises `Cancelled` when the choice has ended: a strategy that goes on can start nothing."""
        if self._closed:
            raise Cancelled("the request has ended")

    def next_sub_id(self) -> str:
        return self._sub_ids.next()

    def charge(self, link: EngineLink, tokens: int) -> Charge:
        """Counts work on an engine, until it is released, or the choice ends."""
        self.check_open()
        charge = Charge(link, tokens)
        self._charges.append(charge)
        return charge

    def discharge(self, charge: Charge) -> None:
        """The work is done, or will not be."""
        charge.release()
        with contextlib.suppress(ValueError):
            self._charges.remove(charge)

    def call(
        self,
        link: EngineLink,
        body: Verb,
        record: SubRecord,
        ended: Callable[[ReplyBody | None, MicroserveError | None], None],
        *,
        stop: Callable[[], None] | None = None,
        grace: float = 0.0,
    ) -> CallStream:
        """Sends a call now. `ended` is told its answer or error, once, and never before this returns.

        `stop` is called in place of cancelling it when the choice ends. Raises what keeps it from being sent.
        """
        self.check_open()
        try:
            client = link.client
            if client is None:
                raise PeerLost(f"the session with engine {link.id} is lost")
            call = client.stream(body, budget=max(0.001, self.remaining) + grace)
        except MicroserveError as error:
            self._blame(link, error)
            self.finish(record, error.code)
            raise

        def on_end() -> None:
            self._open.pop(call, None)
            call.on_end = None
            error = call.error
            if error is not None:
                self._blame(link, error)
            ended(None if error is not None else call.reply, error)
            self.finish(record, "ok" if error is None else error.code)

        self._open[call] = stop if stop is not None else call.cancel
        if call.ended:
            asyncio.get_running_loop().call_soon(on_end)
        else:
            call.on_end = on_end
        return call

    def begin_record(self, verb: str, link: EngineLink, begin: int, end: int) -> SubRecord:
        """What will be known of a sub-request that is about to start."""
        record = SubRecord(verb, link.id, begin, end, self._clock())
        if len(self.records) < MOST_RECORDS:
            self.records.append(record)
        return record

    def finish(self, record: SubRecord, outcome: str) -> None:
        """A sub-request has ended. No effect the second time."""
        if record.ended is None:
            record.ended = self._clock()
            record.outcome = outcome
            self._told(record)

    def _blame(self, link: EngineLink, error: MicroserveError) -> None:
        gone = link.client is None or link.client.closed
        # A sender also says "peer lost" of the receiver.
        if isinstance(error, Unavailable) or (isinstance(error, PeerLost) and gone):
            self.avoid.add(link.id)

    def post(self, link: EngineLink, body: Posted) -> None:
        """Says something that nobody waits for. A session that is lost gives back by itself what belonged to it."""
        if link.client is not None:
            with contextlib.suppress(PeerLost):
                link.client.stream(body, budget=_POST_BUDGET)

    # --- time --------------------------------------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        """Seconds until the choice has to be complete."""
        return self._deadline - self._clock()

    def patience(self, asked: float | None) -> float:
        """How long to wait for something: as asked, and at most half of the time that is left, so that there is time to
        do without."""
        half = max(0.0, self.remaining / 2)
        return half if asked is None else min(asked, half)

    def kv_wait(self, asked: float | None) -> float | None:
        """How long an engine is to wait for KV; None: as its operator has set."""
        wait = self.patience(asked)
        return None if asked is None and wait >= _ENGINES_WAIT else wait

    def admission(self, asked: float | None) -> float | None:
        """How long a preparation may wait for room. Who holds a lease, or may get one, does not wait for another unless
        it says so: two such choices could wait for each other."""
        holds = self._preparing or any(not kv.over for kv in self._kvs)
        return None if holds and asked is None else self.patience(asked)

    # --- leases ------------------------------------------------------------------------------------------------------

    def prepare(self, link: EngineLink, body: PrepRecv, end: int) -> Pending[RunKv]:
        """Asks for a lease; it belongs to the choice as soon as it is there."""
        pending: Pending[RunKv] = Pending()
        record = self.begin_record("prep_recv", link, 0, end)
        given_up = False

        def ended(reply: ReplyBody | None, error: MicroserveError | None) -> None:
            address = reply.address if isinstance(reply, Prepared) else None
            if given_up:
                # It was granted before the engine heard that nobody wants it any more.
                if address is not None:
                    self.post(link, Release(lease=address.lease))
                return
            self._preparing -= 1
            if isinstance(error, LeaseTooLarge):
                self.too_large = link
            if address is None:
                pending.settle(None, error or ProtocolError(f"engine {link.id} prepared with {type(reply).__name__}"))
                return
            record.matched = address.matched
            kv = RunKv(link, address, body.prompt)
            self._kvs.append(kv)
            pending.settle(kv, None)

        def stop() -> None:
            # Not a cancel: after that the answer would be dropped, and a lease in it with it.
            nonlocal given_up
            given_up = True
            self._preparing -= 1
            self.post(link, Abort(sub_id=body.sub_id))
            error = Cancelled("the request has ended")
            self.finish(record, error.code)
            pending.settle(None, error)

        self.call(link, body, record, ended, stop=stop, grace=_GRACE)
        self._preparing += 1
        return pending

    def release(self, kv: RunKv) -> None:
        """Nobody needs the lease any more. Idempotent."""
        if not kv.over:
            kv.over = True
            self.post(kv.link, Release(lease=kv.address.lease))
        if kv in self._kvs:
            self._kvs.remove(kv)

    def send(self, sending: RunSending, body: RemoteSend, charge: Charge) -> None:
        """Starts a send. A failure, to start it even, is the sending's, and the receiver is told what will not come."""
        link, kv = sending.sender, sending.kv
        record = self.begin_record("remote_send", link, sending.begin, sending.end)
        kv.sendings.append(sending)

        def ended(reply: ReplyBody | None, error: MicroserveError | None) -> None:
            self.discharge(charge)
            if isinstance(reply, SendReport):
                record.computed, record.reused, record.nbytes = reply.computed, reply.reused, reply.bytes
                self.cached(link, kv.prompt, sending.end)
                sending.settle(reply, None)
                self._moved(kv)
            else:
                sending.settle(None, error or ProtocolError(f"engine {link.id} sent with {type(reply).__name__}"))
                self._forgo(sending)

        try:
            sending.call = self.call(link, body, record, ended)
        except MicroserveError as error:
            self.check_open()
            ended(None, error)

    def _forgo(self, sending: RunSending) -> None:
        """Tells the receiver what nobody sends any more. Another send of the same range may still be under way."""
        kv = sending.kv
        if kv.over or self._letting_go:
            return
        size = kv.address.layout.page_size
        begin = max(kv.matched, sending.begin // size * size)
        end = min(kv.end, -(-sending.end // size) * size)
        promised = [(other.begin, other.end) for other in kv.sendings if not other.failed]
        for first, last in uncovered(begin, end, promised):
            self.post(kv.link, Forgo(lease=kv.address.lease, begin=first, end=last))

    # --- what is cached where ----------------------------------------------------------------------------------------

    def names(self, prompt: bytes) -> list[int]:
        """Page names of a prompt, for the index of prefixes."""
        if prompt is not self.prompt_bytes:
            return page_names(self.request.model, prompt, self.request.page_size)
        if self._names is None:
            self._names = page_names(self.request.model, prompt, self.request.page_size)
        return self._names

    def matched(self, link: EngineLink, prompt: bytes) -> int:
        """Tokens of the prompt that an engine probably has."""
        return self.fleet.prefixes.depth(link, self.names(prompt)) * self.request.page_size

    def all_matched(self) -> Mapping[EngineLink, int]:
        """As above, of the request's prompt, for every engine that has any."""
        found = self.fleet.prefixes.match(self.names(self.prompt_bytes))
        return {link: pages * self.request.page_size for link, pages in found.items()}

    def cached(self, link: EngineLink, prompt: bytes, until: int) -> None:
        """An engine has the KV of `prompt[:until]` now."""
        if self.fleet.link(link.id) is link:
            self.fleet.prefixes.record(link, self.names(prompt)[: until // self.request.page_size])

    def committed(self, kv: RunKv, until: int) -> None:
        """A lease has ended in the prefix tree of its engine."""
        kv.over = True
        kv.committed = until
        self.cached(kv.link, kv.prompt, until)
        self._moved(kv)

    def _moved(self, kv: RunKv) -> None:
        """Who moves a context means the next request to follow it: of two engines that have the same, the receiver is
        to be preferred. So the senders are believed to have a page less."""
        if kv.committed:
            last = self.names(kv.prompt)[kv.committed // self.request.page_size - 1]
            for sending in kv.sendings:
                if sending.done and sending.sender is not kv.link:
                    self.fleet.prefixes.drop(sending.sender, last)

    def cached_tokens(self, link: EngineLink, kv: RunKv | None, cached: int, received: int) -> int:
        """Prompt tokens that nobody computed for this choice, of a generation on `link`, from `kv` or without.

        `cached` the engine found in its prefix tree, and `received` it got. Part of either was computed for us.
        """
        if self._first_cached is not None:
            return self._first_cached
        own = moved = 0
        for each in self._kvs:
            for sending in each.sendings:
                report = sending.answer
                if report is None:
                    continue
                if each is kv:
                    moved += report.computed
                elif each.link is link or sending.sender is link:
                    own += report.computed
        return max(0, cached - own) + max(0, received - moved)

    def began(self, link: EngineLink, kv: RunKv | None, cached: int) -> None:
        """A generation has its first tokens, and said how much of the prompt it found in its prefix tree."""
        self._began = (link, kv, cached)

    @property
    def cached_is_known(self) -> bool:
        """Whether no report changes any more what counts as cached: the first tokens came from elsewhere."""
        return self._first_cached is not None or self._went_elsewhere

    def went_on(self, cached: int) -> None:
        """A generation has ended where the program wanted it to, not the request. `cached` tokens of the prompt nobody
        computed for it; whatever else is cached where it goes on was computed for this choice."""
        if self._first_cached is None:
            self._first_cached = cached

    @property
    def cached_so_far(self) -> int:
        """As `cached_tokens`, of a generation that has not ended: as far as it and the senders have told."""
        if self._first_cached is not None:
            return self._first_cached
        if self._cached_at_end is not None:
            return self._cached_at_end
        if self._began is None:
            return 0
        link, kv, cached = self._began
        reports = [sending.answer for sending in kv.sendings] if kv is not None else []
        received = sum(report.computed + report.reused for report in reports if report is not None)
        return self.cached_tokens(link, kv, cached, received)

    # --- the end -----------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Gives back everything: calls first, so that engines stop, then leases, then charges."""
        self._letting_go = True
        for stop in list(self._open.values()):
            stop()
        self._open.clear()
        for kv in list(self._kvs):
            self.release(kv)
        for charge in self._charges:
            charge.release()
        self._charges.clear()
        self._letting_go = False

    def close(self) -> None:
        """The choice has ended: as `let_go`, and nothing can be started any more."""
        if not self._closed:
            # What senders computed is known by leases, which are let go.
            self._cached_at_end = self.cached_so_far
        self._closed = True
        self.let_go()
