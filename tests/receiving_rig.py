"""Engines' step threads without threads, sockets or transport: what one has ready is copied into another's pool."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from tests.engine_rig import Rig, Seen, make_request

from microserve.engine.outputs import CommitTicket, Computed, Opened, Prepare, Ready
from microserve.engine.receiving import Receiving
from microserve.kv.leases import LeaseTable
from microserve.runtime.errors import MicroserveError
from microserve.runtime.messages import Committed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.engine.outputs import Output
    from microserve.engine.request import Request
    from microserve.kv.leases import Lease

EPOCH = 7


class KvRig(Rig):
    """A rig that receives, and sends. `events` is what operators would see."""

    def __init__(self, *, share: float = 0.5, term: float = 30.0, life: float = 300.0, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        ids = itertools.count(1000)
        self.leases = LeaseTable(self.cache, share=share, term=term, life=life, draw_id=lambda: next(ids))
        self.events: list[tuple[str, str]] = []
        self.receiving = Receiving(
            self.scheduler, self.leases, epoch=EPOCH, event=lambda kind, detail: self.events.append((kind, detail))
        )
        self.answers: dict[object, object] = {}
        """The terminal answers of preparations and commits."""
        self.ready: dict[Request, list[Ready]] = {}
        self.reused: dict[Request, int] = {}

    # --- receiving ---

    def prepare(
        self, prompt: Sequence[int], end: int | None = None, *, expect: int = 0, admit_by: float | None = None
    ) -> Prepare:
        tokens = np.array(prompt, dtype=np.int32)
        ticket = Prepare(
            request_id="r",
            sub_id="s",
            tokens=tokens,
            end=len(tokens) if end is None else end,
            expect_tokens=expect,
            admit_by=admit_by,
            owner="router",
        )
        self.receiving.prepare(ticket, self.clock())
        self.read()
        return ticket

    def lease(self, prompt: Sequence[int], end: int | None = None, *, expect: int = 0) -> Lease:
        answer = self.answers[self.prepare(prompt, end, expect=expect)]
        assert isinstance(answer, Opened), answer
        return answer.lease

    def start(self, request: Request, lease: Lease, begin: int, *, kv_wait: float = 10.0) -> Request:
        self.seen[request] = Seen()
        self.receiving.start(request, lease.id, begin, self.clock() + kv_wait, self.clock())
        self.read()
        return request

    def generate(
        self, prompt: Sequence[int], lease: Lease, begin: int, *, count: int = 5, wait: float = 10.0
    ) -> Request:
        return self.start(make_request(prompt, max_tokens=count, ignore_eos=True), lease, begin, kv_wait=wait)

    def commit(self, lease: Lease, *, wait: float = 10.0) -> CommitTicket:
        ticket = CommitTicket(request_id="r", sub_id="c", lease=lease.id)
        self.receiving.commit(ticket, self.clock() + wait, self.clock())
        self.read()
        return ticket

    def claim(self, lease: Lease, begin: int, end: int, sender: str = "a", epoch: int = 1) -> int:
        return self.receiving.claim(lease.id, EPOCH, begin, end, (sender, epoch), self.clock())

    def arrive(self, lease: Lease, claim: int, first: int, count: int) -> None:
        """Pages `[first, first + count)` of the claim."""
        self.receiving.arrived(EPOCH, lease.id, claim, first, count, self.clock())
        self.read()

    def end_claim(self, claim: int, error: str = "") -> None:
        self.receiving.claim_ended(claim, error, self.clock())
        self.read()

    def turn(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.receiving.turn(self.clock())
        self.read()
        if self.check:
            self.receiving.check_integrity()
            self.scheduler.check_integrity()

    # --- sending ---

    def send(self, prompt: Sequence[int]) -> Request:
        return self.submit_send(make_request(prompt, max_tokens=1))

    def submit_send(self, request: Request) -> Request:
        request.sends = True
        self.ready[request] = []
        self.scheduler.submit_send(request, self.clock())
        self.read()
        return request

    def sent_pages(self, request: Request) -> np.ndarray:
        """Our pages of everything that is ready, in order of position."""
        parts = self.ready[request]
        assert [part.first for part in parts] == [sum(len(p.pages) for p in parts[:i]) for i in range(len(parts))]
        return np.concatenate([np.empty(0, dtype=np.int32), *(part.pages for part in parts)])

    def finish(self, request: Request) -> None:
        self.scheduler.finish_send(request)
        self.read()

    # --- both ---

    def push(self, source: Rig, pages: np.ndarray, lease: Lease, claim: int, first: int) -> None:
        """Copies `pages` of another engine into the lease's pages from the `first` on, and notifies."""
        for offset, page in enumerate(pages.tolist()):
            target = int(lease.pages[first + offset])
            self.executor.pool[target] = source.executor.pool[page]
        begin = next(each.first for each in lease.claims if each.id == claim)
        self.arrive(lease, claim, first - begin, len(pages))

    def read(self) -> None:
        for output in self.scheduler.take_outputs():
            self._read_one(output)

    def _read_one(self, output: Output) -> None:
        who, body = output.request, output.body
        if isinstance(who, Prepare | CommitTicket):
            assert output.final
            assert who not in self.answers
            assert isinstance(body, Opened | Committed | MicroserveError)
            self.answers[who] = body
        elif isinstance(body, Ready):
            self.ready[who].append(body)
        elif isinstance(body, Computed):
            self.reused[who] = body.reused
        elif who.sends:
            assert isinstance(body, MicroserveError)
            self.answers[who] = body
        else:
            self.see(who, body, output.final)

    def assert_empty(self) -> None:
        self.receiving.check_integrity()
        assert len(self.leases) == 0
        super().assert_empty()


def sent(sender: KvRig, prompt: Sequence[int]) -> np.ndarray:
    """Computes a prompt's KV at `sender`; the pages. The send goes on holding them."""
    request = sender.send(prompt)
    sender.run()
    return sender.sent_pages(request)
