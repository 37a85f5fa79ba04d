"""Many requests over three engines while links break, pushes fail and callers leave, by seeded chance.

Whatever happens, a request ends once, with the right tokens or with one of our errors, within its deadline; and when
the trouble is over, every page of every engine is free or cached.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest
from tests.fleet_calls import PAGE, expected, prompt_of
from tests.fleet_rig import Fleet, run_fleet

from microserve.runtime.errors import InternalError, MicroserveError

if TYPE_CHECKING:
    from tests.fleet_rig import FleetEngine

REQUESTS = 60
DEADLINE = 40.0


class Chaos:
    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.random = random.Random(seed)
        self.outcomes: dict[str, int] = {}

    async def request(self, number: int) -> None:
        """One request: prepared, sent by one or two, generated; cancelled somewhere in one of five cases."""
        chance, fleet = self.random, self.fleet
        await asyncio.sleep(chance.random() * 8)
        prompt = prompt_of(chance.choice([1, 3, 4, 17, 50, 90]), seed=chance.randrange(6))
        receiver, *senders = chance.sample(fleet.engines, 3)
        work = asyncio.ensure_future(self._served(prompt, receiver, senders[: chance.choice([1, 1, 2])]))
        patience = chance.random() * 2 if chance.random() < 0.2 else DEADLINE
        began = fleet.clock()
        await asyncio.wait([work], timeout=patience)
        if not work.done():
            assert patience < DEADLINE, f"request {number} is not done after {DEADLINE} s"
            work.cancel()
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        assert not isinstance(outcome, InternalError), outcome
        assert not isinstance(outcome, BaseException) or isinstance(outcome, MicroserveError | asyncio.CancelledError)
        assert fleet.clock() - began <= DEADLINE
        name = type(outcome).__name__
        self.outcomes[name] = self.outcomes.get(name, 0) + 1

    async def _served(self, prompt: list[int], receiver: FleetEngine, senders: list[FleetEngine]) -> None:
        fleet, count = self.fleet, 4
        kv = await fleet.prep_recv(receiver, prompt, end=-1, expect_tokens=count, admit_by=5.0)
        cuts = [kv.matched, kv.end] if len(senders) == 1 else [kv.matched, self._cut(kv.matched, kv.end), kv.end]
        sends = [
            fleet.sending(sender, prompt, kv, begin=begin, end=end, budget=30.0)
            for sender, begin, end in zip(senders, cuts, cuts[1:], strict=False)
            if begin < end
        ]
        try:
            tokens, _ = await fleet.generate(receiver, prompt, count=count, kv=kv, kv_wait=5.0, budget=30.0)
            assert tokens == expected(prompt, count)
        finally:
            for send in sends:
                send.cancel()
            await asyncio.gather(*sends, return_exceptions=True)
            # As a dispatcher does it: by posting, whatever became of the rest.
            client = await fleet.client(receiver)
            releasing = asyncio.ensure_future(fleet.release(receiver, kv))
            await asyncio.wait([releasing], timeout=5.0)
            releasing.cancel()
            await asyncio.gather(releasing, return_exceptions=True)
            assert client is not None

    @staticmethod
    def _cut(begin: int, end: int) -> int:
        return max(begin, (begin + end) // 2 // PAGE * PAGE)

    async def trouble(self) -> None:
        """One fault after the other; none lasts."""
        chance, fleet = self.random, self.fleet
        while True:
            await asyncio.sleep(chance.random() * 0.7)
            a, b = chance.sample(fleet.engines, 2)
            way = (a.transport_name, b.transport_name)
            kind = chance.choice(["hold", "fail", "tear", "mute", "cut", "drop", "twice", "late", "freeze"])
            rules = {
                "hold": fleet.hub.held,
                "fail": fleet.hub.failing,
                "tear": fleet.hub.tearing,
                "mute": fleet.hub.mute,
            }
            if kind in rules:
                rules[kind].add(way)
                await asyncio.sleep(chance.random() * 0.5)
                rules[kind].discard(way)
            elif kind == "cut":
                fleet.network.partition(a.peer, b.peer)
                await asyncio.sleep(chance.random() * 5)
                fleet.network.heal(a.peer, b.peer)
            elif kind == "drop":
                fleet.network.drop(a.peer, b.peer)
            elif kind == "twice":
                fleet.network.duplicate(a.peer, b.peer)
            elif kind == "late":
                fleet.network.delay(a.peer, b.peer, 0.2)
                await asyncio.sleep(chance.random())
                fleet.network.delay(a.peer, b.peer, 0.0)
            else:
                a.frozen.clear()
                await asyncio.sleep(chance.random())
                a.frozen.set()


@pytest.mark.parametrize("seed", range(4))
def test_chaos_loses_nothing(seed: int) -> None:
    async def work(fleet: Fleet) -> None:
        chaos = Chaos(fleet, seed)
        trouble = asyncio.create_task(chaos.trouble())
        await asyncio.gather(*(chaos.request(number) for number in range(REQUESTS)))
        trouble.cancel()
        await asyncio.gather(trouble, return_exceptions=True)
        for rules in (fleet.hub.held, fleet.hub.failing, fleet.hub.tearing, fleet.hub.mute):
            rules.clear()
        for engine in fleet.engines:
            engine.frozen.set()
            for other in fleet.engines:
                fleet.network.heal(engine.peer, other.peer)
        # Sessions come back, and what is owed is told.
        await fleet.until(
            lambda: all(
                not engine.leased()
                and not engine.quarantined()
                and not engine.core.verbs.live
                and not engine.core.kv._grants
                for engine in fleet.engines
            )
        )
        assert sum(chaos.outcomes.values()) == REQUESTS
        assert chaos.outcomes.get("NoneType", 0) > REQUESTS / 2, chaos.outcomes

    run_fleet(work, "a", "b", "c", pages=64, depth=1 + seed % 2)
