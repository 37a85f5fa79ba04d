"""Other engines: a session and a transfer connection to each, made and measured when they meet.

Lives on the asyncio thread. The side that dialled sends KV over its `Link`; the other side knows it by its hello.
That a claim has ended is told until it is heard, over as many sessions as it takes: the receiver's pages wait for it.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Protocol

from microserve.engine.link import Link
from microserve.engine.liveness import Incarnation, own_incarnation, proven_dead
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import (
    InvalidRequest,
    LayoutMismatch,
    MicroserveError,
    PeerLost,
    ProtocolError,
    StaleEpoch,
    TransferFailed,
)
from microserve.runtime.log import get_logger
from microserve.runtime.messages import PeerAddress, PeerHello, PeerLink, PeerWelcome
from microserve.runtime.rpc import RpcClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from microserve.kv.transfer.base import LinkReport
    from microserve.runtime.bus import Bus, Session
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import EngineInfo, Layout

HELLO_BUDGET = 5.0
REACH_LIMIT = 10.0
"""Seconds that a send waits for a way to its receiver."""
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0
FORGET = 300.0
"""Seconds after which a peer that cannot be reached is forgotten."""
FORGET_DEBT = 3600.0
"""The same for a peer that waits for our word on a claim."""
WATCH_INTERVAL = 1.0
"""Seconds between looks at whether peers that were lost are dead."""
_MOST_KNOWN = 4096
_ENDPOINT = re.compile(r"(tcp|ipc|memory)://[\x21-\x7e]{1,500}")

_log = get_logger(__name__)


class Transfers(Protocol):
    """What is needed of the transfer thread (`TransferThread`)."""

    def connect(self, peer: str, metadata: bytes, done: Callable[[LinkReport], None]) -> None: ...

    def disconnect(self, peer: str) -> None: ...


class Peers:
    """Every other engine that this one has met.

    `transfers` is None on an engine that cannot move KV; `transport` and `metadata` are what its hello says.
    `dead(engine_id, epoch)` is called when that incarnation, and every older one, is proven to be over; `suspicious`
    says whether pages wait for such a proof. `event(kind, detail)` publishes.
    """

    def __init__(
        self,
        bus: Bus,
        info: Callable[[], EngineInfo],
        *,
        transfers: Transfers | None,
        transport: str = "",
        metadata: bytes = b"",
        require_link: str | None = None,
        dead: Callable[[str, int], None],
        suspicious: Callable[[], bool] = lambda: False,
        event: Callable[[str, str], None] = lambda kind, detail: None,
        received: Callable[[str], int] = lambda name: 0,
        clock: Clock = monotonic,
        incarnation: Incarnation | None = None,
        is_dead: Callable[[Incarnation, str], bool] = proven_dead,
    ) -> None:
        self._bus = bus
        self._info = info
        self._transfers = transfers
        self._transport = transport
        self._metadata = metadata
        self._require = require_link
        self._dead = dead
        self._suspicious = suspicious
        self._event = event
        self._received = received
        self._clock = clock
        self._me = incarnation if incarnation is not None else own_incarnation()
        self._is_dead = is_dead
        self._links: dict[tuple[str, int], Link] = {}
        """By engine and epoch: what only says that it is a newer incarnation does not displace one that answers."""
        self._known: dict[str, tuple[int, Incarnation | None]] = {}
        """The newest incarnation of each engine that said hello to us; None once that is over."""
        self._lost: dict[tuple[str, int], float] = {}
        """Incarnations whose session to us broke, and when."""
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    # --- what is known ---------------------------------------------------------------------------------------------

    def links(self) -> list[PeerLink]:
        """Every peer, for people to look at."""
        return [link.describe(self._received(link.name)) for _, link in sorted(self._links.items())]

    def get(self, engine_id: str) -> Link | None:
        """The newest incarnation of an engine that is known."""
        found = [epoch for name, epoch in self._links if name == engine_id]
        return self._links[engine_id, max(found)] if found else None

    # --- meeting ---------------------------------------------------------------------------------------------------

    def meet(self, peers: Iterable[PeerAddress]) -> None:
        """Begins to connect to those that are not known yet. Does not wait. Raises `InvalidRequest`."""
        others = [peer for peer in peers if peer.engine_id != self._info().engine_id]
        for peer in others:
            _check_endpoint(peer.endpoint)
        if len(self._links) + len(others) > _MOST_KNOWN:
            raise InvalidRequest(f"more than {_MOST_KNOWN} engines are more than one can know", param="peers")
        for peer in others:
            self._link(peer)

    async def reach(self, peer: PeerAddress) -> Link:
        """A link that is ready.

        Raises `StaleEpoch`, `LayoutMismatch`, `TransferFailed` (this pair of engines cannot move KV) or `PeerLost`.
        """
        if self._transfers is None:
            raise TransferFailed("this engine has no transport for KV; its log says why")
        _check_endpoint(peer.endpoint)
        link = self._link(peer)
        if link is None:
            if self._is_over(peer):
                raise PeerLost(f"engine {peer.engine_id} of epoch {peer.epoch:x} has ended")
            raise StaleEpoch(f"epoch {peer.epoch:x} of engine {peer.engine_id} is over", param="address")
        if link.state in ("connecting", "lost"):
            link.hurry()
            try:
                async with asyncio.timeout(REACH_LIMIT):
                    await link.settled()
            except TimeoutError:
                raise PeerLost(f"engine {peer.engine_id} was not reached within {REACH_LIMIT:g} s") from None
        if link.state != "ready":
            raise link.why()
        return link

    def _is_over(self, peer: PeerAddress) -> bool:
        """Whether it is the newest incarnation that we know, and dead."""
        return self._known.get(peer.engine_id) == (peer.epoch, None)

    def _link(self, peer: PeerAddress) -> Link | None:
        """The link to this incarnation, begun now if need be; None when it is known to be over."""
        key = (peer.engine_id, peer.epoch)
        known = self._links.get(key)
        if known is not None:
            return known
        newest = self._known.get(peer.engine_id, (0, None))[0]
        opened = [link.epoch for link in self._links.values() if link.engine_id == peer.engine_id and link.proven]
        if self._closed or self._is_over(peer) or peer.epoch < max([newest, *opened]):
            return None
        link = Link(peer, reset=self._connect_again)
        self._links[key] = link
        link.task = asyncio.get_running_loop().create_task(self._keep(link), name=f"peer {peer.engine_id}")
        return link

    def _drop(self, link: Link, error: MicroserveError) -> None:
        if self._links.get((link.engine_id, link.epoch)) is link:
            del self._links[link.engine_id, link.epoch]
        if self._transfers is not None and link.connected:
            self._transfers.disconnect(link.name)
        link.end(error)

    def _connect_again(self, link: Link) -> None:
        """A push failed: the connection is made anew, with a new session."""
        if self._transfers is not None and link.connected:
            link.connected = False
            self._transfers.disconnect(link.name)
            if link.client is not None:
                link.client.close("a push failed; connecting again")

    # --- the dialling side -----------------------------------------------------------------------------------------

    async def _keep(self, link: Link) -> None:
        """Keeps a session with one incarnation of a peer, for as long as that can succeed."""
        delay, failing_since = _FIRST_RETRY, self._clock()
        while True:
            try:
                await self._open(link)
            except (StaleEpoch, LayoutMismatch, TransferFailed) as error:
                # Nothing that time could heal: a new incarnation would. But pages there wait for how our claims ended.
                if isinstance(error, StaleEpoch) or await link.settle_debts():
                    self._refused(link, error)
                    return
                link.lose(error)
            except MicroserveError as error:
                _log.warning(
                    "peer cannot be reached",
                    every=5.0,
                    engine=link.engine_id,
                    engine_epoch=link.epoch,
                    error=error.message,
                )
                link.lose(error)
            else:
                self._opened(link)
                delay, failing_since = _FIRST_RETRY, self._clock()
                why = await link.until_lost()
                _log.warning("peer lost", every=1.0, engine=link.engine_id, engine_epoch=link.epoch, error=why.message)
                self._event("peer", f"{link.engine_id}: lost: {why.message}")
                link.lose(why)
            if self._clock() - failing_since > (FORGET_DEBT if link.owes else FORGET):
                self._drop(link, PeerLost(f"engine {link.engine_id} was not reached for {FORGET:g} s"))
                return
            await link.pause(delay)
            delay = min(2 * delay, _LAST_RETRY)

    async def _open(self, link: Link) -> None:
        client = RpcClient()
        link.begin(client)
        await self._bus.dial(link.endpoint, client, timeout=HELLO_BUDGET)
        peer = client.session.peer
        if (peer.name, peer.epoch) != (link.engine_id, link.epoch):
            raise StaleEpoch(f"{link.endpoint} is {peer} now, not engine {link.engine_id} of epoch {link.epoch:x}")
        welcome = await client.call(self._hello(), budget=HELLO_BUDGET)
        if not isinstance(welcome, PeerWelcome):
            raise ProtocolError(f"{peer} answered a hello with {type(welcome).__name__}")
        self._check(welcome.layout, welcome.transport, link.engine_id)
        if not link.connected:
            report = await self._connect(link, welcome.metadata)
            if report.error:
                raise PeerLost(f"no connection for KV to engine {link.engine_id}: {report.error}")
            link.report = report
            if self._require is not None and report.transport != self._require:
                raise TransferFailed(f"KV would go over {report.transport or '?'}; {self._require} is required")
            link.connected = True
        if client.closed:
            raise PeerLost(f"the session with {peer} ended while it was opened")

    async def _connect(self, link: Link, metadata: bytes) -> LinkReport:
        if self._transfers is None:
            raise TransferFailed("this engine has no transport for KV")
        reported: asyncio.Future[LinkReport] = asyncio.get_running_loop().create_future()

        def done(report: LinkReport) -> None:
            if not reported.done():
                reported.set_result(report)

        self._transfers.connect(link.name, metadata, done)
        return await reported

    def _opened(self, link: Link) -> None:
        for older in [each for each in self._links.values() if each.engine_id == link.engine_id]:
            if older.epoch < link.epoch:
                self._drop(older, StaleEpoch(f"engine {link.engine_id} has started anew"))
        link.open()
        transport, speed = link.report.transport, link.report.gigabytes_per_second
        _log.info(
            "peer connected", engine=link.engine_id, engine_epoch=link.epoch, transport=transport, gb_per_second=speed
        )
        self._event("peer", f"{link.engine_id}: {transport}, {speed:.3g} GB/s")

    def _refused(self, link: Link, error: MicroserveError) -> None:
        if isinstance(error, StaleEpoch):
            self._drop(link, error)
            return
        _log.error("peer refused", engine=link.engine_id, engine_epoch=link.epoch, error=error.message)
        self._event("peer", f"{link.engine_id}: refused: {error.message}")
        if self._transfers is not None:
            self._transfers.disconnect(link.name)
        link.refuse(error)

    def _hello(self) -> PeerHello:
        info = self._info()
        return PeerHello(
            engine_id=info.engine_id,
            epoch=info.epoch,
            endpoint=info.endpoint,
            layout=info.layout,
            transport=self._transport,
            metadata=self._metadata,
            host=self._me.host,
            pid=self._me.pid,
            pid_started=self._me.started,
        )

    def _check(self, layout: Layout, transport: str, who: str) -> None:
        # By name: whoever is refused reads this in its own log.
        me, our_layout = self._info().engine_id, self._info().layout
        if difference := layout_difference(our_layout, layout, f"at {me}", f"at {who}"):
            raise LayoutMismatch(f"KV cannot move between {me} and {who}: {difference}")
        if not transport or transport != self._transport:
            ours, theirs = self._transport or "none", transport or "none"
            raise TransferFailed(f"KV cannot move between {me} and {who}: transport: {ours} at {me}, {theirs} at {who}")

    # --- the listening side ----------------------------------------------------------------------------------------

    def hello(self, session: Session, body: PeerHello) -> PeerWelcome:
        """Another engine introduces itself. Raises when its KV cannot be ours."""
        check_sender(session, body.engine_id, body.epoch)
        self._introduced(body)
        self._check(body.layout, body.transport, body.engine_id)
        # It will send here; we may have to send there, too, and then the way is open already.
        self.meet([PeerAddress(engine_id=body.engine_id, epoch=body.epoch, endpoint=body.endpoint)])
        info = self._info()
        return PeerWelcome(
            engine_id=info.engine_id,
            epoch=info.epoch,
            layout=info.layout,
            transport=self._transport,
            metadata=self._metadata,
            host=self._me.host,
            pid=self._me.pid,
            pid_started=self._me.started,
        )

    def _introduced(self, body: PeerHello) -> None:
        known = self._known.pop(body.engine_id, None)
        epoch, incarnation = body.epoch, Incarnation(body.host, body.pid, body.pid_started)
        if known is not None and known[0] > epoch:
            self._known[body.engine_id] = known
            raise StaleEpoch(f"engine {body.engine_id} has started anew since epoch {epoch:x}", param="epoch")
        self._known[body.engine_id] = (epoch, incarnation)
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._lost.pop((body.engine_id, epoch), None)
        if known is not None and known[0] < epoch and known[1] is not None:
            self._over(body.engine_id, known[0])

    def session_lost(self, session: Session) -> None:
        """An engine that had introduced itself has gone, or cannot be heard; whether it is dead is looked at now."""
        peer = session.peer
        known = self._known.get(peer.name)
        if peer.kind == "engine" and known is not None and known[0] == peer.epoch and not self._closed:
            self._lost[peer.name, peer.epoch] = self._clock()
            self._look()
            if self._lost and self._watch is None:
                self._watch = asyncio.get_running_loop().create_task(self._watching(), name="peer watch")

    async def _watching(self) -> None:
        while self._lost:
            await asyncio.sleep(WATCH_INTERVAL)
            self._look()
        self._watch = None

    def _look(self) -> None:
        for (engine_id, epoch), since in list(self._lost.items()):
            known = self._known.get(engine_id)
            if known is None or known[0] != epoch or known[1] is None:
                del self._lost[engine_id, epoch]
            elif self._is_dead(known[1], self._me.host):
                self._over(engine_id, epoch)
            elif self._clock() - since > FORGET and not self._suspicious():
                del self._lost[engine_id, epoch]

    def _over(self, engine_id: str, epoch: int) -> None:
        """This incarnation is dead: it writes no more. Called once."""
        self._lost.pop((engine_id, epoch), None)
        if self._known[engine_id][0] == epoch:
            self._known[engine_id] = (epoch, None)
        _log.info("peer is dead", engine=engine_id, engine_epoch=epoch)
        self._dead(engine_id, epoch)
        for link in [each for each in self._links.values() if each.engine_id == engine_id and each.epoch <= epoch]:
            # Whoever was told disconnects it, behind its last words.
            link.connected = False
            self._drop(link, PeerLost(f"engine {engine_id} of epoch {link.epoch:x} has ended"))

    # --- end -------------------------------------------------------------------------------------------------------

    async def close(self, patience: float = 1.0) -> None:
        """Lets go of every peer, once what is to be told has been told, or after `patience` seconds."""
        self._closed = True
        links = list(self._links.values())
        flushing = [asyncio.ensure_future(link.flushed()) for link in links]
        if flushing:
            await asyncio.wait(flushing, timeout=patience)
        tasks: list[asyncio.Future[None]] = list(flushing)
        for link in links:
            self._drop(link, PeerLost("this engine stops"))
            tasks += link.tasks()
        if self._watch is not None:
            tasks.append(self._watch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_endpoint(endpoint: str) -> None:
    if not _ENDPOINT.fullmatch(endpoint):
        raise InvalidRequest(f"{endpoint[:100]!r} is no endpoint", param="endpoint")


def check_sender(session: Session, engine_id: str, epoch: int) -> None:
    """Raises `InvalidRequest` unless `session` is with this incarnation of an engine: nobody speaks for another."""
    peer = session.peer
    if (peer.kind, peer.name, peer.epoch) != ("engine", engine_id, epoch):
        raise InvalidRequest(f"only engine {engine_id} of epoch {epoch:x} may say this, not {peer}", param="engine_id")


def layout_difference(ours: Layout, theirs: Layout, us: str = "here", them: str = "there") -> str:
    """What differs, field by field; empty when pages can be exchanged."""
    # Not `msgspec.structs.fields`, which evaluates annotations: this stands in the way of every send.
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in ours.__struct_fields__]
    return "; ".join(f"{name}: {mine} {us}, {other} {them}" for name, mine, other in pairs if mine != other)
