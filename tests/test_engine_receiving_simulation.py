"""Two engines that send each other KV at random: whatever fails, dies, is late or given up, every caller sees the
model's tokens, and every page comes home.

A sender writes its claimed pages whenever it likes until its claim has ended, garbage included: whoever uses such a
page too early, or hands it to somebody else, fails the fake executor's check of every position.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from tests.engine_rig import PAGE, VOCABULARY, make_request
from tests.receiving_rig import KvRig

from microserve.engine.outputs import Opened, Prepare
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseNotFound,
    MicroserveError,
)
from microserve.runtime.messages import Generated

if TYPE_CHECKING:
    import numpy as np

    from microserve.engine.outputs import CommitTicket
    from microserve.engine.plan import Slice
    from microserve.engine.request import Request
    from microserve.kv.leases import Lease


class Transfer:
    """One send into one claim: what `engine.sending` does, step by step and at random."""

    def __init__(
        self, rng: random.Random, sender: KvRig, receiver: KvRig, lease: Lease, begin: int, end: int, name: str
    ) -> None:
        self._rng = rng
        self._sender = sender
        self._receiver = receiver
        self._lease = lease
        self.name = name
        self.claim = receiver.claim(lease, begin, end, name)
        self._skip = begin // PAGE
        self._targets = lease.pages[(begin - lease.matched) // PAGE : -(-(end - lease.matched) // PAGE)].copy()
        self._pushed = 0
        self.over = False
        try:
            self.request: Request | None = sender.send(lease.tokens[:end].tolist())
        except (Busy, ContextLengthExceeded):
            self.request = None
            self.end("no room")

    def move(self) -> str:
        """Whatever may happen next. Returns what did."""
        rng, request = self._rng, self.request
        if request is None or self.over:
            return "over"
        ready = self._sender.sent_pages(request)[self._skip :]
        left = self._targets[self._pushed :]
        if len(left) and rng.random() < 0.2:
            self._scribble(left)
        chance = rng.random()
        if request in self._sender.answers or chance < 0.03:
            self._sender.scheduler.stop_send(request)
            self.end("failed")
            return "failed"
        if chance < 0.05:
            # Killed: nobody finishes the send's bookkeeping at the receiver until the death is proven.
            self._sender.scheduler.stop_send(request)
            self._scribble(left)
            self._finish()
            self._receiver.receiving.sender_dead(self.name, 1, self._receiver.clock())
            self._receiver.read()
            return "dead"
        count = min(len(ready), len(self._targets)) - self._pushed
        if count > 0 and chance < 0.6:
            count = rng.randint(1, count)
            source = ready[self._pushed : self._pushed + count]
            for page, target in zip(source.tolist(), left.tolist(), strict=False):
                self._receiver.executor.pool[target] = self._sender.executor.pool[page]
            first = self._pushed
            self._pushed += count
            if rng.random() < 0.97:
                self._receiver.arrive(self._lease, self.claim, first, count)
                return "pushed"
            return "unnotified"
        if self._pushed == len(self._targets):
            self.end("")
            return "done"
        return "nothing"

    def end(self, error: str) -> None:
        """The last write has happened."""
        if not self.over:
            self._finish()
            self._receiver.end_claim(self.claim, error)

    def _finish(self) -> None:
        self.over = True
        if self.request is not None:
            self._sender.finish(self.request)

    def _scribble(self, targets: np.ndarray) -> None:
        """Part of a write, in pages that were not notified."""
        self._receiver.executor.pool[targets] = self._rng.getrandbits(63)


class World:
    def __init__(self, rng: random.Random, depth: int) -> None:
        self.rng = rng
        self.rigs = [
            KvRig(
                pages=rng.choice((16, 24, 40)),
                depth=depth,
                share=rng.choice((0.5, 0.8)),
                term=20.0,
                life=rng.choice((50.0, 300.0)),
                max_running=rng.choice((2, 5, 9)),
                max_waiting=15,
                step_tokens=rng.choice((10, 16, 40)),
                max_context=rng.choice((40, 60)),
                prefill_chunk=rng.choice((None, 1, 7)),
            )
            for _ in range(2)
        ]
        self.prefixes = [[rng.randrange(VOCABULARY) for _ in range(rng.choice((8, 16, 30)))] for _ in range(3)]
        self.prepared: list[tuple[KvRig, Prepare]] = []
        self.leases: list[tuple[KvRig, Lease]] = []
        self.commits: list[tuple[KvRig, CommitTicket]] = []
        self.transfers: list[Transfer] = []
        self.seen: Counter[str] = Counter()
        for rig in self.rigs:
            rig.meanwhile = self.meanwhile

    def other(self, rig: KvRig) -> KvRig:
        return self.rigs[1] if rig is self.rigs[0] else self.rigs[0]

    def prompt(self) -> list[int]:
        shared = self.rng.choice(self.prefixes)
        own = [self.rng.randrange(VOCABULARY) for _ in range(self.rng.choice((0, 1, 2, 5, 9, 17)))]
        return shared[: self.rng.randrange(len(shared) + 1)] + own or [1]

    def meanwhile(self) -> None:
        """As `tick`, while a step of one of them is waited for."""
        if self.rng.random() < 0.2:
            self.act(may_lose=False)
            for transfer in self.transfers:
                self.seen[transfer.move()] += 1
            self.rng.choice(self.rigs).turn()

    def act(self, *, may_lose: bool = True) -> None:
        rng, rig = self.rng, self.rng.choice(self.rigs)
        chance = rng.random()
        try:
            if chance < 0.1:
                rig.submit(self._request(self.prompt(), rig.clock()))
            elif chance < 0.28:
                prompt = self.prompt()
                ticket = rig.prepare(
                    prompt,
                    rng.choice((len(prompt), max(0, len(prompt) - 1), rng.randrange(len(prompt) + 1))),
                    expect=rng.choice((0, 0, 5)),
                    admit_by=rng.choice((None, rig.clock() + 10.0)),
                )
                self.prepared.append((rig, ticket))
            elif chance < 0.85 and self.leases:
                self._use(*rng.choice(self.leases))
            elif chance < 0.87 and (live := [request for request in rig.seen if not request.final]):
                self.seen["aborted"] += rig.abort(rng.choice(live))
            elif chance < 0.875:
                if may_lose:
                    _lose_step(rig)
            elif chance < 0.88:
                rig.cache.evict()
        except (Busy, Conflict, ContextLengthExceeded, InvalidRequest, LeaseNotFound) as error:
            self.seen[error.code] += 1

    def _request(self, prompt: list[int], now: float) -> Request:
        rng = self.rng
        return make_request(
            prompt,
            max_tokens=rng.choice((1, 2, 4, 9, 20)),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=tuple(rng.sample(range(VOCABULARY), rng.choice((0, 0, 3)))),
            deadline=now + rng.uniform(0, 60) if rng.random() < 0.1 else None,
            first_token_by=now + rng.uniform(0, 30) if rng.random() < 0.1 else None,
        )

    def _use(self, rig: KvRig, lease: Lease) -> None:
        """Something that a strategy might do with a lease, in any order."""
        rng, now = self.rng, rig.clock()
        chance = rng.random()
        if chance < 0.5:
            pages = -(-max(0, lease.end - lease.matched) // PAGE)
            if pages:
                first = rng.choice((0, rng.randrange(pages)))
                last = rng.choice((pages, rng.randint(first + 1, pages)))
                end = min(lease.end, lease.matched + last * PAGE)
                sender = rng.choice((self.other(rig), self.other(rig), rig))
                name = f"s{rng.getrandbits(32)}"
                begin = lease.matched + first * PAGE
                self.transfers.append(Transfer(rng, sender, rig, lease, begin, end, name))
        elif chance < 0.8:
            prompt = lease.tokens.tolist()
            begin = rng.choice((lease.end, lease.end, lease.matched, rng.randint(0, lease.end)))
            begin = min(begin, len(prompt))
            if rng.random() < 0.3:  # the rest of the prompt is another than was announced
                known = max(begin, min(lease.matched, len(prompt)))
                prompt = prompt[:known] + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(12))] or prompt
            request = self._request(prompt, now)
            rig.seen.pop(request, None)
            try:
                rig.start(request, lease, begin, kv_wait=rng.choice((0.0, 3.0, 30.0)))
            except MicroserveError:
                del rig.seen[request]
                raise
            self.seen["started"] += 1
        elif chance < 0.88:
            self.commits.append((rig, rig.commit(lease, wait=rng.choice((0.0, 5.0, 30.0)))))
        elif chance < 0.94:
            begin = lease.matched + rng.randrange(3) * PAGE
            self.seen["forgo " + rig.receiving.forgo(lease.id, begin, lease.end, now)] += 1
        else:
            self.seen["release " + rig.receiving.release(lease.id, now)] += 1
        rig.read()

    def tick(self) -> None:
        for _ in range(self.rng.choice((0, 1, 1, 3))):
            self.act()
        for rig, ticket in self.prepared[:]:
            if ticket in rig.answers:
                self.prepared.remove((rig, ticket))
                if isinstance(answer := rig.answers[ticket], Opened):
                    self.leases.append((rig, answer.lease))
        self.leases = [(rig, lease) for rig, lease in self.leases if lease in rig.leases.owned_by("router")]
        for transfer in self.transfers[:]:
            if self.rng.random() < 0.7:
                self.seen[transfer.move()] += 1
                if transfer.over:
                    self.transfers.remove(transfer)
        for rig in self.rigs:
            rig.turn(1.0)
            rig.step()

    def settle(self) -> None:
        """Everything ends, leases by their terms."""
        for rig in self.rigs:
            rig.meanwhile = None
        for transfer in self.transfers:
            transfer.end("the end")
        for _ in range(3):
            for rig in self.rigs:
                rig.run()
                rig.turn(400.0)


def _lose_step(rig: KvRig) -> None:
    """The executor fails in the oldest step; at depth 2, perhaps while the next one is launched on top of it."""
    if len(rig.launched) < rig.executor.depth:
        rig.launch()
    if not rig.launched:
        return
    rig.executor.collect()
    step = rig.launched.popleft()
    garbage = [
        (page, p) for part in rig.plans[-2:] if part.step == step for s in part.slices for page, p in _written(s)
    ]
    for page, position in garbage:
        rig.executor.pool[page, position] = 12345
    rig.scheduler.fail(step, InternalError("the device is on fire"))
    rig.read()
    rig.scheduler.check_integrity()


def _written(part: Slice) -> list[tuple[int, int]]:
    """Where a slice writes: (page, position in it)."""
    return [(int(part.pages[p // PAGE]), p % PAGE) for p in range(part.start, part.start + part.length)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_every_request_gets_the_models_tokens_and_every_page_comes_home(seed: int, depth: int) -> None:
    world = World(random.Random(f"{seed} {depth}"), depth)
    for _ in range(300):
        world.tick()
    world.settle()
    received = recomputed = finished = 0
    for rig in world.rigs:
        rig.assert_empty()
        assert all(ticket in rig.answers for owner, ticket in world.commits if owner is rig)
        for request, seen in rig.seen.items():
            assert request.final
            assert seen.tokens == rig.expected(request, len(seen.tokens))
            if isinstance(seen.end, Generated):
                finished += 1
                received += seen.end.received_tokens
                recomputed += seen.end.recomputed_tokens
            elif seen.end is not None:
                assert isinstance(seen.end, Busy | Cancelled | DeadlineExceeded | InternalError)
    assert finished > 5
    assert received + recomputed > 0
    assert world.seen["done"] > 0
