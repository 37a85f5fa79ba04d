"""The way from this engine to one incarnation of another: what a send needs of it, and what it still has to be told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from microserve.kv.transfer.base import LinkReport
from microserve.runtime.errors import (
    CallerError,
    DeadlineExceeded,
    InternalError,
    MicroserveError,
    PeerLost,
    ProtocolError,
)
from microserve.runtime.log import get_logger
from microserve.runtime.messages import Claim, Claimed, ClaimEnded, PeerAddress, PeerLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.rpc import RpcClient

CLAIM_BUDGET = 5.0
_RETRY = 1.0

_log = get_logger(__name__)


class Way(Protocol):
    """What a send needs of a way to a receiver; a receiver may be this engine itself."""

    @property
    def name(self) -> str:
        """What the transport calls the receiver."""
        ...

    async def claim(self, body: Claim) -> Claimed:
        """The right to write. Raises the receiver's refusal, or `PeerLost` or `DeadlineExceeded`: then, and when it is
        cancelled, whatever was granted is given back without further ado."""
        ...

    def end_claim(self, claim: int, error: str) -> None:
        """The transport has finished with the claim's pages, well or (`error`) not. Does not wait; is not lost."""
        ...

    def push_began(self) -> None: ...

    def push_ended(self, nbytes: int, seconds: float, error: str) -> None: ...


@dataclass(slots=True)
class _Ending:
    """A claim of ours that is over. Without a number: it was asked for, and the answer was not heard."""

    asked: Claim | None
    claim: int | None
    error: str


class Link:
    """One peer. Made, opened and closed by `Peers`; lives on the asyncio thread. Implements `Way`."""

    def __init__(self, peer: PeerAddress, *, reset: Callable[[Link], None] = lambda link: None) -> None:
        self.engine_id = peer.engine_id
        self.epoch = peer.epoch
        self.endpoint = peer.endpoint
        self.name = peer_name(peer.engine_id, peer.epoch)
        self.state = "connecting"
        self.client: RpcClient | None = None
        self.task: asyncio.Task[None] | None = None
        """Keeps it open. Set by `Peers`."""
        self.connected = False
        """Whether the transport knows the way."""
        self.report = LinkReport(transport="")
        self.proven = False
        """Whether this incarnation has answered us: it is, or was, alive."""
        self._reset = reset
        self._error: MicroserveError = PeerLost(f"engine {peer.engine_id} was not reached yet")
        self._waiters: list[asyncio.Future[None]] = []
        self._lost: asyncio.Future[MicroserveError] | None = None
        self._hurry = asyncio.Event()
        self._endings: list[_Ending] = []
        self._flushing: asyncio.Task[None] | None = None
        self._pushing = 0
        self._broken = False
        self._sent_bytes = 0
        self._sent_seconds = 0.0
        self._failures = 0

    def describe(self, received_bytes: int) -> PeerLink:
        return PeerLink(
            engine_id=self.engine_id,
            epoch=self.epoch,
            state=self.state,
            transport=self.report.transport,
            gigabytes_per_second=self.report.gigabytes_per_second,
            detail="" if self.state == "ready" else self._error.message,
            sent_bytes=self._sent_bytes,
            sent_seconds=self._sent_seconds,
            received_bytes=received_bytes,
            failures=self._failures,
        )

    # --- for a send ------------------------------------------------------------------------------------------------

    async def claim(self, body: Claim) -> Claimed:
        client = self.client
        if client is None or self.state != "ready":
            # A session that is being opened may yet be refused, and then nobody could say how a claim has ended.
            raise self.why()
        try:
            reply = await client.call(body, budget=CLAIM_BUDGET)
        except (PeerLost, DeadlineExceeded, asyncio.CancelledError):
            # It may have been granted. Asked again, the answer is the same claim, and that can be ended.
            self._tell(_Ending(body, None, "the answer was not heard"))
            raise
        if not isinstance(reply, Claimed):
            raise ProtocolError(f"engine {self.engine_id} answered a claim with {type(reply).__name__}")
        return reply

    def end_claim(self, claim: int, error: str) -> None:
        self._tell(_Ending(None, claim, error))

    def push_began(self) -> None:
        self._pushing += 1

    def push_ended(self, nbytes: int, seconds: float, error: str) -> None:
        self._pushing -= 1
        if error:
            self._failures += 1
            self._broken = True
        else:
            self._sent_bytes += nbytes
            self._sent_seconds += seconds
        if self._broken and not self._pushing:
            # Nobody else pushes there: a new connection harms nobody, and the old one may be what failed.
            self._broken = False
            self._reset(self)

    # --- for `Peers` -----------------------------------------------------------------------------------------------

    def begin(self, client: RpcClient) -> None:
        """`client` is about to dial."""
        self.client = client
        lost: asyncio.Future[MicroserveError] = asyncio.get_running_loop().create_future()
        self._lost = lost

        def on_lost(error: MicroserveError) -> None:
            if not lost.done():
                lost.set_result(error)

        client.on_lost = on_lost

    def open(self) -> None:
        """It can be used from now on."""
        self.state = "ready"
        self.proven = True
        self._settle()
        self._flush()

    def lose(self, error: MicroserveError) -> None:
        """It cannot be used until `open`."""
        self._fall("lost", error)

    def refuse(self, error: MicroserveError) -> None:
        """It will never be usable. What the peer had to be told it has been told: see `settle_debts`."""
        self._fall("refused", error)

    def end(self, error: MicroserveError) -> None:
        """The peer is forgotten."""
        self._endings.clear()
        self._fall("lost", error)
        for task in self.tasks():
            task.cancel()

    def _fall(self, state: str, error: MicroserveError) -> None:
        self.state = state
        self._error = error
        client, self.client = self.client, None
        if client is not None:
            client.close(error.message)
        self._settle()

    def tasks(self) -> list[asyncio.Task[None]]:
        """What runs for this link, but for whoever asks."""
        current = asyncio.current_task()
        return [task for task in (self.task, self._flushing) if task is not None and task is not current]

    async def until_lost(self) -> MicroserveError:
        if self._lost is None:
            raise InternalError("the session was never begun")
        return await self._lost

    async def settled(self) -> None:
        """Returns when the attempt to open it that is under way, or the next one, has ended one way or another."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _settle(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def hurry(self) -> None:
        """Somebody waits: the next attempt is due now."""
        self._hurry.set()

    async def pause(self, seconds: float) -> None:
        """Between attempts."""
        self._hurry.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return

    def why(self) -> MicroserveError:
        """Why it cannot be used, as an error that may be raised."""
        return type(self._error)(self._error.message, param=self._error.param)

    # --- what the peer has to be told ------------------------------------------------------------------------------

    @property
    def owes(self) -> bool:
        """Whether the peer still has to be told that a claim has ended."""
        return bool(self._endings) or self._flushing is not None

    def _tell(self, ending: _Ending) -> None:
        self._endings.append(ending)
        self._flush()

    async def settle_debts(self) -> bool:
        """Tells the peer what it has to be told, over the session that was begun. Whether nothing is left."""
        self._flush()
        await self.flushed()
        return not self.owes

    async def flushed(self) -> None:
        """Returns when there is nothing left that could be told now."""
        while self._flushing is not None:
            await asyncio.wait([self._flushing])

    def _flush(self) -> None:
        if self._endings and self._flushing is None and self.client is not None and not self.client.closed:
            task = asyncio.get_running_loop().create_task(self._flush_all(), name=f"claims at {self.engine_id}")
            self._flushing = task

    async def _flush_all(self) -> None:
        try:
            while self._endings and (client := self.client) is not None and not client.closed:
                batch, self._endings = self._endings, []
                told = await asyncio.gather(*(self._tell_now(client, ending) for ending in batch))
                left = [ending for ending, heard in zip(batch, told, strict=True) if not heard]
                if left:
                    self._endings = left + self._endings
                    await asyncio.sleep(_RETRY)
        finally:
            self._flushing = None

    async def _tell_now(self, client: RpcClient, ending: _Ending) -> bool:
        """Whether the peer knows now, or need not know."""
        try:
            if ending.claim is None and ending.asked is not None:
                reply = await client.call(ending.asked, budget=CLAIM_BUDGET)
                if not isinstance(reply, Claimed):
                    return True
                ending.claim = reply.claim
            if ending.claim is not None:
                await client.call(ClaimEnded(claim=ending.claim, error=ending.error), budget=CLAIM_BUDGET)
        except CallerError as error:
            _log.debug("a claim had ended", engine=self.engine_id, why=error.message)
        except MicroserveError:
            return False
        return True


def peer_name(engine_id: str, epoch: int) -> str:
    """What transports call an incarnation of an engine."""
    return f"{engine_id}:{epoch:x}"
