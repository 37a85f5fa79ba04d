"""Everything that one engine is made of, joined: all but its threads, its addresses and its life.

The daemon gives it threads and ZeroMQ; tests drive the same parts turn by turn, over a bus in memory.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from microserve.engine.calls import CallBook
from microserve.engine.kv_verbs import KvVerbs, LocalWay
from microserve.engine.limits import Limits, sizes
from microserve.engine.link import peer_name
from microserve.engine.liveness import own_incarnation, proven_dead
from microserve.engine.loop import StepLoop
from microserve.engine.metrics import EngineMetrics
from microserve.engine.peers import Peers
from microserve.engine.receiving import Receiving
from microserve.engine.scheduler import Scheduler
from microserve.engine.sending import Sends
from microserve.engine.transfers import Push, Pushed, TransferThread
from microserve.engine.verbs import EngineVerbs
from microserve.kv.cache import KvCache
from microserve.kv.leases import LeaseTable
from microserve.kv.pages import IntegrityError
from microserve.runtime.clock import monotonic
from microserve.runtime.log import get_logger
from microserve.runtime.messages import EngineInfo, StatsReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.executor import Executor
    from microserve.engine.liveness import Incarnation
    from microserve.engine.outputs import Output
    from microserve.engine.transfers import Arrival
    from microserve.kv.transfer.base import Transport
    from microserve.runtime.bus import Bus
    from microserve.runtime.clock import Clock
    from microserve.runtime.settings import EngineConfig

_DEEP_CHECK = 20_000
"""Pages of a pool up to which `Stats` looks at every one; of a larger pool it compares counts, as no step may wait."""

_log = get_logger(__name__)


_MOST_PEERS = 1024
"""Incarnations of peers of which it is known how much they sent."""


class EngineCore:
    """The parts of one engine. Made on the event loop; nothing runs until the loops are started, or turned by hand.

    `transport` is None on an engine that cannot move KV: it serves alone. `post` runs a function on the event loop,
    from any thread. `crashed` is called there when the step thread has died, and `event(kind, detail)` with what
    operators should see.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine_id: str,
        epoch: int,
        executor: Executor,
        transport: Transport | None,
        bus: Bus,
        *,
        post: Callable[..., object],
        crashed: Callable[[BaseException], None],
        event: Callable[[str, str], None] = lambda kind, detail: None,
        clock: Clock = monotonic,
        draw_lease: Callable[[], int] = lambda: secrets.randbits(53),
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
        incarnation: Incarnation | None = None,
        is_dead: Callable[[Incarnation, str], bool] = proven_dead,
    ) -> None:
        model = executor.model
        self._epoch = epoch
        self._clock = clock
        self._page_bytes = executor.memory.page_bytes
        self.metrics = EngineMetrics()
        self._received_bytes = 0
        self._received: Counter[str] = Counter()
        """Bytes by peer, the last of them. Both are written by the transfer thread."""
        limits = make_limits(config, model.max_context)
        self.info = EngineInfo(
            engine_id=engine_id,
            epoch=epoch,
            endpoint="",
            events_endpoint="",
            model=model,
            layout=executor.layout,
            executor=_kind(executor),
            max_running=limits.max_running,
            labels=config.labels,
            started_at=time.time(),
        )
        """What others are told. Whoever binds the addresses puts them here."""
        self.cache = KvCache(executor.total_pages, executor.layout.page_size, clock=clock)
        self.scheduler = Scheduler(self.cache, limits, eos_token_ids=model.eos_token_ids)
        self.scheduler.admitted = self.metrics.admitted
        leases = LeaseTable(
            self.cache,
            share=config.lease_share,
            term=config.lease_term,
            life=config.lease_life,
            draw_id=draw_lease,
        )

        def event_from_steps(kind: str, detail: str) -> None:
            post(event, kind, detail)

        self.receiving = Receiving(self.scheduler, leases, epoch=epoch, event=event_from_steps)
        self.steps = StepLoop(
            self.scheduler,
            executor,
            receiving=self.receiving,
            metrics=self.metrics,
            post=post,
            deliver=self._deliver,
            crashed=crashed,
            clock=clock,
        )
        self.transfers = (
            None if transport is None else TransferThread(transport, arrived=self._arrived, post=post, clock=clock)
        )
        book = CallBook(clock=clock)
        book.told = self.metrics.call_ended
        sinks: dict[object, Callable[[Output], None]] = {}
        self.peers = Peers(
            bus,
            self._info,
            transfers=self.transfers,
            transport=self.transfers.transport_name if self.transfers is not None else "",
            metadata=self.transfers.metadata if self.transfers is not None else b"",
            require_link=config.require_link,
            dead=self._sender_dead,
            suspicious=lambda: self.steps.load.quarantined_pages > 0,
            event=event,
            received=self._received.__getitem__,
            clock=clock,
            incarnation=incarnation if incarnation is not None else own_incarnation(),
            is_dead=is_dead,
        )
        self.kv = KvVerbs(
            info=self._info,
            book=book,
            sinks=sinks,
            steps=self.steps,
            scheduler=self.scheduler,
            receiving=self.receiving,
            limit=self.scheduler.check_prompt,
            expect=self._expect,
            kv_wait=config.kv_wait,
            clock=clock,
        )
        self.sends = Sends(
            info=self._info,
            book=book,
            sinks=sinks,
            steps=self.steps,
            scheduler=self.scheduler,
            peers=self.peers,
            local=LocalWay(peer_name(engine_id, epoch), self.steps, self.kv),
            push=self._push,
            warm=self._warm,
            limit=self.scheduler.check_prompt,
            event=event,
            clock=clock,
        )
        self.verbs = EngineVerbs(
            model,
            info=self._info,
            check_prompt=self.scheduler.check_prompt,
            statistics=self.statistics,
            max_live=limits.max_running + limits.max_waiting,
            steps=self.steps,
            book=book,
            sinks=sinks,
            kv=self.kv,
            sends=self.sends,
            peers=self.peers,
            moved=self._moved,
            metrics=self.metrics,
            clock=clock,
            draw_seed=draw_seed,
        )

    @property
    def busy(self) -> bool:
        """Whether something would be lost if the engine ended now: open sub-requests, leases, pages on the wire."""
        return self.verbs.live > 0 or len(self.receiving.leases) > 0

    def _info(self) -> EngineInfo:
        return self.info

    def _deliver(self, outputs: list[Output]) -> None:
        self.verbs.deliver(outputs)

    def _sender_dead(self, engine_id: str, epoch: int) -> None:
        def dead() -> None:
            self.steps.command(lambda: self.kv.sender_dead(engine_id, epoch))

        if self.transfers is None:
            dead()
        else:
            # Its pages are not safe before we have looked: what it wrote may lie in our own sockets.
            self.transfers.outlive(peer_name(engine_id, epoch), dead)

    def _expect(self, change: int) -> None:
        if self.transfers is not None:
            self.transfers.expect(change)

    def _warm(self, peer: str) -> None:
        if self.transfers is not None:
            self.transfers.warm(peer)

    def _push(self, order: Push) -> None:
        if self.transfers is None:
            order.done(Pushed("this engine has no transport for KV; its log says why", 0, 0.0))
        else:
            self.transfers.push(order)

    def _moved(self) -> dict[str, int]:
        """What was sent and received since the start: fields of `Load`."""
        if self.transfers is None:
            return {}
        counts = self.transfers.statistics()
        return {
            "sent_bytes": int(counts["transfer_pushed_bytes"]),
            "received_bytes": self._received_bytes,
            "push_failures": int(counts["transfer_push_failures"]),
        }

    def _arrived(self, arrivals: list[Arrival]) -> None:
        """In the transfer thread."""
        for each in arrivals:
            nbytes = each.count * self._page_bytes
            self._received_bytes += nbytes
            self._received[each.peer] += nbytes
        while len(self._received) > _MOST_PEERS:
            # Every incarnation of an engine is a peer of its own: over months they would be many.
            del self._received[next(iter(self._received))]
        self.steps.command(lambda: self._take_arrivals(arrivals))

    def _take_arrivals(self, arrivals: list[Arrival]) -> None:
        now = self._clock()
        for each in arrivals:
            self.receiving.arrived(each.epoch, each.lease, each.claim, each.first_page, each.count, now)

    def statistics(self, *, deep: bool = True) -> StatsReply:
        """Runs in the step thread."""
        values = self.scheduler.statistics() | self.receiving.statistics()
        values |= {f"cache_{name}": float(value) for name, value in asdict(self.cache.statistics()).items()}
        since = self.receiving.leases.quarantined_since()
        # By the clock: an idle step thread has not looked at it for a while.
        values["lease_quarantine_seconds"] = 0.0 if since is None else max(0.0, self._clock() - since)
        if self.transfers is not None:
            values |= self.transfers.statistics()
        deep = deep and self.cache.total_pages <= _DEEP_CHECK
        try:
            self.scheduler.check_integrity(deep=deep)
            self.receiving.check_integrity(deep=deep)
        except IntegrityError as error:
            _log.error("integrity is broken", error=error)
            return StatsReply(values=values, integrity=str(error))
        return StatsReply(values=values)


def make_limits(config: EngineConfig, model_context: int) -> Limits:
    """What an engine takes on. Raises `ConfigError` for limits that do not fit."""
    context = min(config.max_context or model_context, model_context)
    running, tokens = sizes(config)
    return Limits(running, config.max_waiting, tokens, context)


def _kind(executor: Executor) -> str:
    # By name: an engine without a GPU must not import what a GPU needs.
    return type(executor).__name__.removesuffix("Executor").lower()
