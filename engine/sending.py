"""`remote_send`: KV of a range is produced here and pushed into a receiver's pages, chunk by chunk.

Lives on the asyncio thread and joins three that do the work: the step thread computes and says which pages are ready,
the receiver grants a claim on the range, the transfer thread pushes. What has gathered while one push was under way
goes out in the next. However a send ends, its pages are held until its last push has ended, and its claim is ended
after that: only then may the receiver's pages be used for anything else.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from microserve.engine.checks import Range, check_finite, check_prompt, check_range
from microserve.engine.outputs import Computed, Ready
from microserve.engine.peers import layout_difference
from microserve.engine.request import Request
from microserve.engine.transfers import Push, Pushed, encode_arrival
from microserve.runtime.clock import monotonic
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LayoutMismatch,
    MicroserveError,
    ProtocolError,
    StaleEpoch,
    TransferFailed,
)
from microserve.runtime.log import get_logger
from microserve.runtime.messages import Claim, PeerAddress, SamplingParams, SendReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.calls import CallBook, SubCall
    from microserve.engine.link import Way
    from microserve.engine.outputs import Output
    from microserve.engine.peers import Peers
    from microserve.engine.plan import PageArray, TokenArray
    from microserve.engine.scheduler import Scheduler
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import Claimed, EngineInfo, KvAddress, RemoteSend
    from microserve.runtime.rpc import IncomingCall

_log = get_logger(__name__)

T = TypeVar("T")

_NOTHING_SAMPLED = SamplingParams(max_tokens=1)


class SendSteps(Protocol):
    """What sends need of the step thread (`StepLoop`)."""

    def command(self, function: Callable[[], None]) -> None: ...

    def ask(self, function: Callable[[], T], done: Callable[[T], None]) -> None: ...


class _Send:
    """One send. `pages` are counted from the beginning of the range."""

    __slots__ = (
        "address",
        "asked_at",
        "began",
        "claim",
        "claiming",
        "computed",
        "nbytes",
        "over",
        "pushed",
        "pushing",
        "range",
        "ready",
        "request",
        "seconds",
        "sub",
        "target",
        "term",
        "timer",
        "tokens",
        "way",
    )

    def __init__(
        self, sub: SubCall, address: KvAddress, prompt: TokenArray, range: Range, page_size: int, began: float
    ) -> None:
        self.sub = sub
        self.address = address
        self.tokens = prompt[: range.end]
        self.range = range
        self.began = began
        # Up to the end of a page, where the prompt has it: only whole pages are found in the prefix tree, and kept.
        whole = -(-range.end // page_size) * page_size
        known = prompt[:whole] if whole <= len(prompt) else self.tokens
        self.request = Request(known, _NOTHING_SAMPLED, request_id=sub.request_id, sub_id=sub.sub_id, sends=True)
        self.claiming: asyncio.Task[None] | None = None
        self.way: Way | None = None
        self.claim: int | None = None
        """Granted, and not ended yet."""
        self.asked_at = self.term = 0.0
        self.target: PageArray = np.empty(0, dtype=np.int32)
        self.ready: list[PageArray] = []
        """Our pages that can go out, next in line."""
        self.pushing = 0
        """Pages in the push that is under way."""
        self.pushed = 0
        self.computed: Computed | None = None
        self.nbytes = 0
        self.seconds = 0.0
        self.over = False
        """It has failed: nothing more is pushed."""
        self.timer: asyncio.TimerHandle | None = None


class Sends:
    """Every send of this engine.

    `local` is the way to ourselves; `push` hands a push to the transfer thread, and `warm` tells it that one to a peer
    will come soon. Of `scheduler` nothing is called but in
    the step thread. `limit` raises for a prompt that is too long. Whoever delivers outputs finds ours in `sinks`.
    """

    def __init__(
        self,
        *,
        info: Callable[[], EngineInfo],
        book: CallBook,
        sinks: dict[object, Callable[[Output], None]],
        steps: SendSteps,
        scheduler: Scheduler,
        peers: Peers,
        local: Way,
        push: Callable[[Push], None],
        warm: Callable[[str], None] = lambda peer: None,
        limit: Callable[[int], None],
        event: Callable[[str, str], None] = lambda kind, detail: None,
        clock: Clock = monotonic,
    ) -> None:
        self._info = info
        self._book = book
        self._sinks = sinks
        self._steps = steps
        self._scheduler = scheduler
        self._peers = peers
        self._local = local
        self._push = push
        self._warm = warm
        self._limit = limit
        self._event = event
        self._clock = clock
        self._live: set[_Send] = set()
        self._ended = asyncio.Event()

    def __len__(self) -> int:
        """Sends that hold pages, those that were answered included."""
        return len(self._live)

    def start(self, call: IncomingCall, body: RemoteSend) -> None:
        """Begins a send that the book does not know. Raises the refusal."""
        info = self._info()
        tokens, range = self._check(body, info)
        deadline = check_finite(call.deadline, "budget")
        sub = self._book.open(call, body.sub_id, send_key(body))
        if not range.length:
            sub.reply(SendReport(computed=0, reused=0, bytes=0, seconds=0.0))
            return
        now = self._clock()
        send = _Send(sub, body.address, tokens, range, info.layout.page_size, now)
        sub.stop = lambda error: self._fail(send, error)
        self._live.add(send)
        self._sinks[send.request] = lambda output: self._take(send, output)
        if deadline is not None:
            self._expire_at(send, deadline, "the time of the send is over")
        self._steps.ask(lambda: self._submit(send.request), lambda error: self._submitted(send, error))

    def _check(self, body: RemoteSend, info: EngineInfo) -> tuple[TokenArray, Range]:
        address = body.address
        tokens = check_prompt(body.prompt, info.model)
        self._limit(len(tokens))
        if difference := layout_difference(info.layout, address.layout):
            raise LayoutMismatch(f"KV cannot move from here to {address.engine_id}: {difference}", param="address")
        if address.engine_id == info.engine_id and address.epoch != info.epoch:
            raise StaleEpoch(f"the address is of epoch {address.epoch:x}; this is {info.epoch:x}", param="address")
        range = check_range(body.begin, body.end, len(tokens))
        if not range.length:
            return tokens, range
        size = info.layout.page_size
        if range.begin < address.matched or range.end > address.end:
            raise InvalidRequest(
                f"[{range.begin}, {range.end}) is not within the address's [{address.matched}, {address.end})",
                param="begin",
            )
        if range.begin % size or (range.end % size and range.end != address.end):
            raise InvalidRequest(
                f"[{range.begin}, {range.end}) does not stand at pages of {size} tokens "
                "(only the address's end may lie within one)",
                param="begin",
            )
        return tokens, range

    # --- in the step thread ----------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> MicroserveError | None:
        try:
            self._scheduler.submit_send(request, self._clock())
        except MicroserveError as error:
            return error
        return None

    # --- what happens to a send ------------------------------------------------------------------------------------

    def _submitted(self, send: _Send, error: MicroserveError | None) -> None:
        """There is room for it, or there is not. Not before there is: a range that was claimed has no other writer."""
        if error is not None:
            self._fail(send, error)
        elif not send.over:
            claiming = asyncio.get_running_loop().create_task(self._claim(send), name=f"claim for {send.sub.sub_id}")
            send.claiming = claiming

    def _take(self, send: _Send, output: Output) -> None:
        """The step thread says something."""
        body = output.body
        if isinstance(body, MicroserveError):
            self._fail(send, body)
        elif not send.over:
            if isinstance(body, Ready):
                self._gather(send, body)
            elif isinstance(body, Computed):
                send.computed = body
            self._advance(send)

    def _gather(self, send: _Send, ready: Ready) -> None:
        size = self._info().layout.page_size
        first, last = send.range.begin // size, -(-send.range.end // size)
        pages = ready.pages[max(0, first - ready.first) : max(0, last - ready.first)]
        if len(pages):
            send.ready.append(pages)

    async def _claim(self, send: _Send) -> None:
        info, address, range = self._info(), send.address, send.range
        try:
            if address.engine_id == info.engine_id:
                way = self._local
            else:
                peer = PeerAddress(engine_id=address.engine_id, epoch=address.epoch, endpoint=address.endpoint)
                way = await self._peers.reach(peer)
            if send.request.cached == send.request.known:
                # What is to be pushed waits for nothing but the answer.
                self._warm(way.name)
            asked_at = self._clock()
            body = Claim(
                lease=address.lease,
                epoch=address.epoch,
                begin=range.begin,
                end=range.end,
                engine_id=info.engine_id,
                sender_epoch=info.epoch,
                sub_id=send.sub.sub_id,
                digest=prompt_digest(send.tokens),
            )
            claimed = await way.claim(body)
        except MicroserveError as error:
            self._fail(send, error)
            return
        self._claimed(send, way, claimed, asked_at)

    def _claimed(self, send: _Send, way: Way, claimed: Claimed, asked_at: float) -> None:
        send.way, send.claim = way, claimed.claim
        send.asked_at, send.term = asked_at, claimed.term
        send.target = unpack_tokens(claimed.pages)
        size = self._info().layout.page_size
        if len(send.target) != -(-send.range.length // size):
            self._fail(send, ProtocolError(f"a claim on {send.range.length} tokens brought {len(send.target)} pages"))
            return
        self._expire_at(send, asked_at + claimed.term, "the term of the claim is over")
        self._advance(send)

    def _advance(self, send: _Send) -> None:
        """Whatever can be done now: push, or end."""
        if send.over or send.claim is None or send.way is None or send.pushing:
            return
        if send.ready:
            source = send.ready[0] if len(send.ready) == 1 else np.concatenate(send.ready)
            send.ready = []
            send.pushing = len(source)
            address = send.address
            send.way.push_began()
            self._push(
                Push(
                    peer=send.way.name,
                    source=source,
                    target=send.target[send.pushed : send.pushed + len(source)],
                    notification=encode_arrival(address.epoch, address.lease, send.claim, send.pushed, len(source)),
                    not_after=send.asked_at + send.term,
                    done=lambda pushed: self._pushed(send, pushed),
                )
            )
        elif send.computed is not None:
            if send.pushed != len(send.target):
                self._fail(send, TransferFailed(f"{send.pushed} of {len(send.target)} pages were ready to be sent"))
            else:
                self._finish(send, send.computed)

    def _pushed(self, send: _Send, pushed: Pushed) -> None:
        count, send.pushing = send.pushing, 0
        if send.way is not None:
            send.way.push_ended(pushed.nbytes, pushed.seconds, pushed.error)
        if not pushed.certain:
            # The receiver must go on to believe that its pages are being written: our own end will tell it.
            send.claim = None
        if pushed.error:
            receiver = send.address.engine_id
            _log.warning(
                "push failed",
                every=10.0,
                burst=10,
                request=send.request.request_id,
                sub=send.sub.sub_id,
                engine=receiver,
                engine_epoch=send.address.epoch,
                pages=count,
                error=pushed.error,
            )
            self._event("push_failed", f"{receiver}: {pushed.error}")
        send.pushed += count
        send.nbytes += pushed.nbytes
        send.seconds += pushed.seconds
        if send.over:
            self._let_go(send, "the send was given up")
        elif pushed.error:
            self._fail(send, TransferFailed(f"pages could not be pushed to engine {receiver}: {pushed.error}"))
        else:
            self._advance(send)

    # --- endings ---------------------------------------------------------------------------------------------------

    def _finish(self, send: _Send, computed: Computed) -> None:
        reused = min(max(0, computed.reused - send.range.begin), send.range.length)
        report = SendReport(
            computed=send.range.length - reused,
            reused=reused,
            bytes=send.nbytes,
            seconds=self._clock() - send.began,
            push_seconds=send.seconds,
        )
        send.over = True
        # The claim first: whoever hears the report may rely on the receiver.
        self._let_go(send, "")
        send.sub.reply(report)

    def _fail(self, send: _Send, error: MicroserveError) -> None:
        """Answers now. What was under way is waited for before pages and claim are given back."""
        if send.over:
            return
        send.over = True
        send.sub.fail(error)
        self._steps.command(partial(self._scheduler.stop_send, send.request))
        if send.claiming is not None and send.claiming is not asyncio.current_task():
            send.claiming.cancel()
        if not send.pushing:
            self._let_go(send, error.message or error.code)

    def _let_go(self, send: _Send, error: str) -> None:
        """No push is under way any more."""
        if send.timer is not None:
            send.timer.cancel()
        if send.claim is not None and send.way is not None:
            send.way.end_claim(send.claim, error)
            send.claim = None
        self._steps.command(partial(self._scheduler.finish_send, send.request))
        self._sinks.pop(send.request, None)
        self._live.discard(send)
        if not self._live:
            self._ended.set()

    def _expire_at(self, send: _Send, when: float, why: str) -> None:
        """Ends the send at `when`, unless an earlier end is set."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, when - self._clock())
        if send.timer is not None:
            if send.timer.when() <= at:
                return
            send.timer.cancel()
        send.timer = loop.call_at(at, self._fail, send, DeadlineExceeded(why))

    async def close(self, patience: float = 1.0) -> None:
        """Waits until nothing is pushed any more, at most `patience` seconds. Every call must have ended before."""
        if self._live:
            self._ended.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._ended.wait()
            except TimeoutError:
                _log.warning("pushes are under way still", sends=len(self._live))


def send_key(body: RemoteSend) -> int:
    """What a send asks for, as one number: a repeated call has the same."""
    address = body.address
    return hash((type(body), body.prompt, body.begin, body.end, address.engine_id, address.epoch, address.lease))


def prompt_digest(tokens: TokenArray) -> bytes:
    """What sender and receiver compare: the digest of `tokens` as they travel."""
    return hashlib.blake2b(tokens.astype("<i4", copy=False).tobytes(), digest_size=16).digest()
