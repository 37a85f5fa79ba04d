"""The lease table in any history, against a model: what a sender may write is never in anybody else's hands.

The model knows what every page holds. Senders scribble over whatever they may still write, at any time; so a page that
is used too early, handed out twice, or entered into the prefix tree at the wrong place is found by what it holds.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.lease_rig import PAGE, Receive, Writer

from microserve.kv.cache import KvCache
from microserve.kv.leases import DEGRADED_AFTER, LeaseTable
from microserve.kv.pages import IntegrityError, PageState
from microserve.runtime.clock import ManualClock
from microserve.runtime.errors import Conflict, InvalidRequest, LeaseNotFound, MicroserveError

if TYPE_CHECKING:
    from microserve.kv.cache import PrefixLock
    from microserve.kv.leases import Sender
    from microserve.kv.pages import PageArray
    from microserve.kv.radix import TokenArray

TOTAL = 32
MOST = 20
TERM, LIFE = 10.0, 25.0

prompts = st.builds(
    lambda pages, tail: np.array([*np.repeat(pages, PAGE), *[9] * tail], dtype=np.int32),
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
    st.integers(0, PAGE - 1),
)
numbers = st.integers(0, 63)
"""Choose one of however many there are."""
senders = st.sampled_from([("a", 1), ("a", 2), ("b", 1)])
rarely = st.integers(0, 7).map(lambda number: number == 7)


class LeaseHistories(RuleBasedStateMachine):
    """Leases, claims, arrivals, deaths and time between ordinary requests and steps in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        ids = itertools.count(100)
        self.kv = KvCache(TOTAL, PAGE, clock=self.clock)
        self.table = LeaseTable(self.kv, share=MOST / TOTAL, term=TERM, life=LIFE, draw_id=lambda: next(ids))
        self.receives: list[Receive] = []
        """Every one that there was."""
        self.running: list[tuple[TokenArray, PrefixLock, PageArray]] = []
        self.steps: list[tuple[int, set[int]]] = []
        self.holds: dict[int, bytes] = {}
        """What each page holds: all tokens up to its end, or garbage."""

    # --- the model ---

    @property
    def now(self) -> float:
        return self.clock()

    def open_ones(self) -> list[Receive]:
        return [each for each in self.receives if each.open]

    def writers(self) -> list[tuple[Receive, Writer]]:
        return [(receive, writer) for receive in self.receives for writer in receive.writers]

    def any_receive(self, which: int, closed: bool) -> Receive:
        """One that is open, mostly: of those that have ended there are soon many."""
        return self.receives[which % len(self.receives)] if closed else self.an_open_one(which)

    def an_open_one(self, which: int) -> Receive:
        """One that is open, if there is any."""
        choice = self.open_ones() or self.receives
        return choice[which % len(choice)]

    def any_writer(self, which: int) -> tuple[Receive, Writer]:
        """Mostly one that may still write, or that an open lease knows."""
        alive = [(receive, writer) for receive, writer in self.writers() if writer.open or receive.open]
        choice = alive if alive and which % 8 else self.writers()
        return choice[which // 8 % len(choice)]

    def leased(self) -> set[int]:
        return {int(page) for each in self.open_ones() for page in (*each.lease.pages, *each.lease.reserve)}

    def quarantined(self) -> set[int]:
        return set().union(*(each.hot() for each in self.receives if not each.open))

    def used(self) -> set[int]:
        """Pages that must not be handed out: read or written by a request, or named by a step."""
        used = {int(page) for _, lock, own in self.running for page in (*lock.pages, *own)}
        return used.union(*(named for _, named in self.steps))

    def renewed(self, receive: Receive) -> None:
        receive.expires = self.now + TERM

    def ended(self, receive: Receive) -> str:
        """The lease ends now. "freed" or "quarantined"."""
        receive.open = False
        for writer in receive.writers:
            if writer.open and writer.unwritten:
                writer.quarantined_at = self.now
        return "quarantined" if receive.hot() else "freed"

    def fresh(self, pages: PageArray) -> None:
        """Pages that were just handed out: nobody else's, and never one that a sender may write."""
        new = {int(page) for page in pages}
        assert len(new) == len(pages)
        assert not new & self.used()
        assert not new & self.leased()
        assert not new & self.quarantined()
        self.holds |= dict.fromkeys(new, b"garbage")

    def runs(self, prompt: TokenArray, lock: PrefixLock, own: PageArray) -> None:
        """A request computes whatever its own whole pages do not hold yet."""
        for index, page in enumerate(own.tolist(), start=len(lock.pages)):
            if (index + 1) * PAGE <= len(prompt):
                self.holds[page] = prompt[: (index + 1) * PAGE].tobytes()
        self.running.append((prompt, lock, own))

    # --- leases ---

    @initialize(some=st.lists(prompts, min_size=1, max_size=3), sender=senders)
    def begin(self, some: list[TokenArray], sender: Sender) -> None:
        """Every history begins with leases, and with claims on them."""
        for which, prompt in enumerate(some):
            self.prepare(prompt, 0, 0, 0)
            self.claim(which, False, which, 3, 0, sender)

    @rule(prompt=prompts, cut=st.integers(0, 9), reserve=st.sampled_from([0, 0, 3, 6]), keep=st.sampled_from([0, 0, 4]))
    def prepare(self, prompt: TokenArray, cut: int, reserve: int, keep: int) -> None:
        end = max(0, len(prompt) - cut)
        lock = self.kv.acquire(prompt)
        available, matched = self.kv.available(), lock.length
        self.kv.release(lock)
        needed = -(-(len(prompt) + reserve) // PAGE) - matched // PAGE + (matched == len(prompt))
        room = len(self.leased()) + len(self.quarantined()) + needed <= MOST and needed + keep <= available
        lease = self.table.open(prompt, end, reserve, self.now, owner=self, keep=keep)
        assert (lease is not None) == room
        if lease is None:
            return
        assert lease.matched == matched
        assert len(lease.pages) == len(range(matched, end, PAGE))
        assert len(lease.pages) + len(lease.reserve) == needed
        self.fresh(np.concatenate((lease.pages, lease.reserve)))
        indexes = set(range(len(lease.pages)))
        self.receives.append(Receive(lease, self.now + TERM, self.now + LIFE, set(), indexes))

    @rule(which=numbers, closed=rarely)
    @precondition(lambda self: self.receives)
    def attach(self, which: int, closed: bool) -> None:
        receive = self.any_receive(which, closed)
        expected: type[MicroserveError] | None = None if receive.open else LeaseNotFound
        if receive.open and receive.attached:
            expected = Conflict
        if expected is not None:
            with pytest.raises(expected):
                self.table.attach(receive.lease.id, self, self.now)
            return
        assert self.table.attach(receive.lease.id, self, self.now) is receive.lease
        receive.attached = True
        self.renewed(receive)

    @rule(which=numbers)
    @precondition(lambda self: self.open_ones())
    def consume(self, which: int) -> None:
        receive = self.an_open_one(which)
        lease = receive.lease
        if receive.hot():
            with pytest.raises(IntegrityError, match="may write"):
                self.table.consume(lease, self.now)
            return
        lock, own = self.table.consume(lease, self.now)
        assert own.tolist() == [*lease.pages.tolist(), *lease.reserve.tolist()]
        assert {index: self.holds[int(lease.pages[index])] for index in receive.there} == {
            index: receive.text(index) for index in receive.there
        }
        receive.open = False
        self.runs(lease.tokens, lock, own)

    @rule(which=numbers)
    @precondition(lambda self: self.open_ones())
    def commit(self, which: int) -> None:
        receive = self.an_open_one(which)
        lease = receive.lease
        until = receive.received // PAGE * PAGE
        assert self.table.commit(lease, self.now) == until
        assert self.kv.match(lease.tokens[:until]).length == until
        self.ended(receive)

    @rule(which=numbers)
    @precondition(lambda self: self.open_ones())
    def close(self, which: int) -> None:
        receive = self.an_open_one(which)
        outcome = self.table.close(receive.lease, self.now)
        assert outcome == self.ended(receive)
        with pytest.raises(LeaseNotFound):
            self.table.get(receive.lease.id)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 4.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        over = [each for each in self.open_ones() if each.until <= self.now]
        deadline = self.table.next_deadline()
        assert (deadline is None) == (not self.open_ones())
        if over:
            assert deadline is not None
            assert deadline <= min(each.until for each in over)
        assert {lease.id for lease in self.table.sweep(self.now)} == {each.lease.id for each in over}
        for receive in over:
            if receive.attached:
                self.table.close(receive.lease, self.now)
            self.ended(receive)

    # --- senders ---

    @rule(
        which=numbers,
        closed=rarely,
        first=numbers,
        count=st.integers(1, 7),
        wrong=st.sampled_from([0] * 14 + [1, PAGE]),
        sender=senders,
    )
    @precondition(lambda self: self.receives)
    def claim(self, which: int, closed: bool, first: int, count: int, wrong: int, sender: Sender) -> None:
        receive = self.any_receive(which, closed)
        lease = receive.lease
        first %= receive.count + (wrong > 0 or receive.count == 0)
        last = min(first + count, receive.count)
        indexes = set(range(first, last))
        begin, end = lease.matched + first * PAGE, min(lease.end, lease.matched + last * PAGE)
        if wrong == 1:
            begin += 1
        elif wrong:
            end = lease.end + PAGE
        expected: type[MicroserveError] | None = None
        if not receive.open:
            expected = LeaseNotFound
        elif wrong or not indexes:
            expected = InvalidRequest
        elif not indexes <= receive.awaited - receive.claimed():
            expected = Conflict
        if expected is not None:
            with pytest.raises(expected):
                self.table.claim(lease.id, begin, end, sender, self.now)
            return
        number = self.table.claim(lease.id, begin, end, sender, self.now)
        assert number not in {writer.id for _, writer in self.writers()}
        receive.writers.append(Writer(number, sender, first, last, unwritten=indexes))
        self.renewed(receive)

    @rule(which=numbers)
    @precondition(lambda self: self.writers())
    def scribble(self, which: int) -> None:
        receive, writer = self.any_writer(which)
        if writer.open:
            for index in writer.unwritten:
                self.holds[int(receive.lease.pages[index])] = b"half a page"

    @rule(which=numbers, skip=numbers, count=st.integers(1, 7), stray=rarely)
    @precondition(lambda self: self.writers())
    def arrive(self, which: int, skip: int, count: int, stray: bool) -> None:
        """Also out of order, again, after its claim has ended, or after the lease has."""
        receive, writer = self.any_writer(which)
        first = writer.first + skip % (writer.last - writer.first)
        if not stray:
            count = min(count, writer.last - first)
        fits = first + count <= writer.last
        indexes = set(range(first, first + count))
        if fits and (writer.open or receive.open):
            # A sender finishes a page before its transport says so. After its claim has ended it writes nothing: what
            # is notified late had been written.
            for index in indexes & writer.unwritten:
                self.holds[int(receive.lease.pages[index])] = receive.text(index)
        known = self.table.arrived(receive.lease.id, writer.id, first - writer.first, count, self.now)
        assert known is (receive.lease if fits and receive.open else None)
        if known is not None:
            # Of a lease that has ended nothing is believed but the end of the claim.
            writer.unwritten -= indexes
            receive.there |= indexes
            receive.awaited -= indexes
            self.renewed(receive)

    @rule(which=numbers, error=st.sampled_from(["", "the link broke"]))
    @precondition(lambda self: self.writers())
    def end_claim(self, which: int, error: str) -> None:
        """Also twice."""
        receive, writer = self.any_writer(which)
        known = self.table.claim_ended(writer.id, error, self.now)
        assert known is (receive.lease if writer.open and receive.open else None)
        self.writer_ended(receive, writer, error)

    @rule(name=st.sampled_from(["a", "b"]), epoch=st.integers(0, 2))
    def die(self, name: str, epoch: int) -> None:
        dead = [
            (receive, writer)
            for receive, writer in self.writers()
            if writer.open and writer.sender[0] == name and writer.sender[1] <= epoch
        ]
        changed = self.table.sender_dead(name, epoch, self.now)
        assert len(changed) == len({lease.id for lease in changed})
        assert {lease.id for lease in changed} == {receive.lease.id for receive, _ in dead if receive.open}
        for receive, writer in dead:
            self.writer_ended(receive, writer, "dead")

    def writer_ended(self, receive: Receive, writer: Writer, error: str) -> None:
        if not writer.open:
            return
        writer.open = False
        writer.quarantined_at = None
        if receive.open:
            if error:
                receive.awaited -= set(range(writer.first, writer.last))
            self.renewed(receive)

    @rule(which=numbers, closed=rarely, first=numbers, count=st.integers(0, 3))
    @precondition(lambda self: self.receives)
    def forgo(self, which: int, closed: bool, first: int, count: int) -> None:
        receive = self.any_receive(which, closed)
        lease = receive.lease
        first %= receive.count or 1
        indexes = set(range(first, min(first + count, receive.count)))
        begin = lease.matched + first * PAGE
        end = max(begin, min(lease.end, begin + count * PAGE))
        outcome = self.table.forgo(lease.id, begin, end, self.now)
        if not receive.open:
            assert outcome == "unknown"
            return
        hot = receive.hot() & {int(lease.pages[index]) for index in indexes}
        assert outcome == ("quarantined" if hot else "freed")
        receive.awaited -= indexes
        if indexes:
            self.renewed(receive)

    # --- ordinary requests, and steps ---

    @rule(prompt=prompts)
    def start(self, prompt: TokenArray) -> None:
        lock = self.kv.acquire(prompt)
        own = self.kv.allocate(-(-len(prompt) // PAGE) - len(lock.pages))
        if own is None:
            self.kv.release(lock)
            return
        self.fresh(own)
        self.runs(prompt, lock, own)

    @rule(which=numbers, insert=st.booleans())
    @precondition(lambda self: self.running)
    def finish(self, which: int, insert: bool) -> None:
        prompt, lock, own = self.running.pop(which % len(self.running))
        whole = len(prompt) // PAGE
        if insert and whole > len(lock.pages):
            fresh = whole - len(lock.pages)
            lock = self.kv.insert(prompt[: whole * PAGE], np.concatenate((lock.pages, own[:fresh])), lock)
            own = own[fresh:]
        self.kv.free(own)
        self.kv.release(lock)

    @rule()
    @precondition(lambda self: len(self.steps) < 2)
    def launch(self) -> None:
        named = {int(page) for _, lock, own in self.running for page in (*lock.pages, *own)}
        self.steps.append((self.kv.begin_step(), named))

    @rule()
    @precondition(lambda self: self.steps)
    def retire(self) -> None:
        self.kv.retire_step(self.steps.pop(0)[0])

    @rule(prompt=prompts, ttl=st.sampled_from([1.0, 5.0]))
    def pin(self, prompt: TokenArray, ttl: float) -> None:
        self.kv.sweep()
        self.kv.pin(prompt, ttl)

    @rule()
    def evict(self) -> None:
        self.kv.evict()

    # --- what is always so ---

    @invariant()
    def whole(self) -> None:
        for deep in (True, False):
            self.kv.check_integrity(deep=deep)
            self.table.check_integrity(deep=deep)
        states = {state: set() for state in PageState}  # type: dict[PageState, set[int]]
        for page in range(TOTAL):
            states[self.kv.allocator.state_of(page)].add(page)
        assert states[PageState.LEASED] == self.leased()
        assert states[PageState.QUARANTINED] == self.quarantined()
        assert len(self.leased()) + len(self.quarantined()) <= MOST
        for receive in self.receives:
            assert receive.hot() <= states[PageState.LEASED] | states[PageState.QUARANTINED]

    @invariant()
    def said(self) -> None:
        for receive in self.open_ones():
            lease = receive.lease
            assert (lease.received, lease.waiting) == (receive.received, bool(receive.awaited))
            assert self.table.unsafe(lease) == len(receive.hot())
        writers = [writer for _, writer in self.writers() if writer.quarantined_at is not None]
        assert self.table.quarantined_senders() == {writer.sender for writer in writers}
        since = [writer.quarantined_at for writer in writers if writer.quarantined_at is not None]
        assert self.table.degraded_at() == (min(since) + DEGRADED_AFTER if since else None)
        assert len(self.table) == len(self.open_ones()) == len(self.table.owned_by(self))
        assert self.table.statistics()["open_claims"] == sum(writer.open for _, writer in self.writers())

    @invariant()
    def what_is_cached_is_what_it_says(self) -> None:
        for prefix in self.kv.largest_prefixes(100):
            pages = self.kv.match(prefix.tokens).pages.tolist()
            assert len(pages) * PAGE == len(prefix.tokens)
            for index, page in enumerate(pages):
                assert self.holds[page] == prefix.tokens[: (index + 1) * PAGE].tobytes()

    def teardown(self) -> None:
        for receive in self.open_ones():
            self.table.close(receive.lease, self.now)
            self.ended(receive)
        for receive, writer in self.writers():
            self.table.claim_ended(writer.id, "", self.now)
            self.writer_ended(receive, writer, "")
        for _, lock, own in self.running:
            self.kv.free(own)
            self.kv.release(lock)
        self.running.clear()
        while self.steps:
            self.retire()
        self.clock.advance(100.0)
        self.kv.sweep()
        self.whole()
        stats = self.kv.statistics()
        assert (stats.locks, stats.free + stats.cached) == (0, TOTAL)
        assert self.table.next_deadline() is None
        self.kv.evict()
        assert self.kv.statistics().free == TOTAL


LeaseHistories.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLeaseHistories = LeaseHistories.TestCase
