"""Random requests under strategies that change, and what must hold of each of them; over whichever bus."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tests.raw_calls import Recorder

from microserve.engine.fake_executor import fake_model, fake_tokens
from microserve.engine.plan import SequenceStart
from microserve.runtime.codec import pack_tokens
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import Cancelled, Unavailable
from microserve.runtime.messages import Finished, Generate, Reply, SamplingParams, SetStrategy, StrategySet

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent / "strategies"
"""What is mixed here."""

MIX: tuple[tuple[str, dict[str, Any]], ...] = (
    ("alone", {}),
    ("moved", {}),
    ("moved", {"ratio": 0.1}),
    ("moved", {"ratio": 0.37, "wait": True}),
    ("moved", {"ratio": 1.0}),
    ("shared", {}),
    ("migrated", {}),
    ("hedged", {}),
    ("wasteful", {}),
    ("data_parallel", {}),
    ("cache_aware", {}),
    ("prefill_decode", {}),
    ("prefill_decode", {"early_first": 0}),
    ("balanced", {"ratio": 0.37}),
    ("context_migration", {"min_tokens": 16}),
)
CHANGES_EVERY = 0.5
_ADMISSION = 0.1
"""Seconds until the router must have chosen the version of a request; a change may overtake it until then."""
_MODEL = fake_model(EngineConfig(model="tokens-only", executor="fake"))
_SET = 1_000_000
"""Ids of the calls that change the strategy begin here."""
LONG_AGO = 10
"""Tokens after which a request that is cancelled had been running for a while."""


class Asked(NamedTuple):
    prompt: list[int]
    tokens: int
    at: float
    confirmed: int
    """So many changes of the strategy had been confirmed when it was sent."""
    cancelled: list[bool]
    """Whether it has been, so far."""


def reference(prompt: Sequence[int], count: int) -> list[int]:
    """What a fake engine answers, wherever the KV comes from."""
    tokens = np.asarray(prompt, dtype=np.int32)
    start = SequenceStart(0, tokens, len(tokens), SamplingParams(), 0, _MODEL.eos_token_ids)
    return fake_tokens(tokens, start, _MODEL, count=count)


class Soak:
    """So many requests, at most `in_flight` at once, of which a third is cancelled at some moment: half of those within
    a fifth of `patience`, when KV still moves, the others within all of it.

    Make it, dial the router with `recorder`, `run`, then `check`.
    """

    def __init__(self, count: int, *, in_flight: int, seed: int, longest: int = 600, patience: float = 0.6) -> None:
        self.random = random.Random(seed)
        self.recorder = Recorder(self._ended)
        self.asked: dict[int, Asked] = {}
        self.changes: dict[int, SetStrategy] = {}
        self._changed_at: list[float] = []
        self._to_come: list[tuple[str, dict[str, Any]]] = []
        self._count = count
        self._in_flight = in_flight
        self._longest = longest
        self._patience = patience
        stems = np.random.default_rng(seed).integers(0, 30_000, (8, longest))
        self._stems: list[list[int]] = stems.tolist()

    async def run(self, limit: float) -> None:
        """Until every request has ended; fails after `limit` seconds."""
        self._set_next()
        await self.recorder.wait(lambda: not self.recorder.open, limit)
        changing = asyncio.create_task(self._change(), name="strategy changes")
        try:
            for _ in range(self._in_flight):
                self._next()
            await self.recorder.wait(
                lambda: len(self.asked) == self._count and not set(self.recorder.open) & set(self.asked), limit
            )
        finally:
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
        await self.recorder.wait(lambda: not self.recorder.open, limit)

    def _ended(self, id: int) -> None:
        if id < _SET:
            self._next()

    def _next(self) -> None:
        id = len(self.asked)
        if id >= self._count:
            return
        draw = self.random
        # Prompts have beginnings in common, so that there are hits, of every length.
        stem = draw.choice(self._stems)[: draw.choice((0, 16, 100, self._longest // 2))]
        length = draw.choice((1, 15, 16, 17, draw.randint(1, 100), draw.randint(1, self._longest)))
        prompt = (stem + [draw.randrange(30_000) for _ in range(length)])[:length]
        confirmed = sum(bool(self.recorder.terminals[change]) for change in self.changes)
        asked = self.asked[id] = Asked(prompt, draw.randint(1, 24), self._now(), confirmed, [])
        sampling = SamplingParams(max_tokens=asked.tokens, temperature=0, ignore_eos=True)
        self.recorder.call(id, Generate(prompt=pack_tokens(prompt), sampling=sampling))
        if draw.random() < 1 / 3:
            patience = self._patience * draw.choice((0.2, 1.0))
            asyncio.get_running_loop().call_later(draw.random() * patience, self._cancel, id)

    def _cancel(self, id: int) -> None:
        if not self.recorder.terminals[id]:
            self.asked[id].cancelled.append(True)
            self.recorder.cancel(id)

    def _set_next(self) -> None:
        """The mix in random order, again and again."""
        if not self._to_come:
            self._to_come = self.random.sample(MIX, len(MIX))
        name, settings = self._to_come.pop()
        id = _SET + len(self.changes)
        self.changes[id] = SetStrategy(name=name, settings=settings)
        self._changed_at.append(self._now())
        self.recorder.call(id, self.changes[id])

    async def _change(self) -> None:
        while True:
            await asyncio.sleep(CHANGES_EVERY)
            self._set_next()

    def check(self, *, most_refused: float = 0.02, fewest: int = 10) -> None:
        """Each ended once, with the tokens that it should have, served by a version that was there when it was sent.

        `fewest`: so many requests at least were served by each strategy of the mix: else this shows little.
        """
        recorder = self.recorder
        assert recorder.stray == []
        assert {len(ends) for ends in recorder.terminals.values()} == {1}
        versions = [self._version(id) for id in self.changes]
        refused: list[str] = []
        served: Counter[str] = Counter()
        for id, asked in self.asked.items():
            error, tokens = recorder.error(id), recorder.tokens[id]
            expected = reference(asked.prompt, asked.tokens)
            if error is None:
                finished = recorder.finished(id)
                assert isinstance(finished, Finished)
                assert tokens == expected, (id, asked)
                assert finished.usage.completion_tokens == asked.tokens
                begun = bisect(self._changed_at, asked.at + _ADMISSION)
                assert finished.strategy in versions[asked.confirmed - 1 : begun], (id, finished.strategy)
                served[finished.strategy] += 1
            elif isinstance(error, Cancelled) and asked.cancelled:
                assert tokens == expected[: len(tokens)], (id, asked)
            else:
                assert isinstance(error, Unavailable), (id, error)
                assert tokens == []
                refused.append(error.message)
        assert len(refused) <= most_refused * self._count, refused[:10]
        cancelled = [len(recorder.tokens[id]) for id, asked in self.asked.items() if asked.cancelled]
        assert len(cancelled) > self._count / 10
        # At the beginning, and long after it.
        assert sum(not tokens for tokens in cancelled) > self._count / 50
        assert sum(tokens > LONG_AGO for tokens in cancelled) > self._count / 100
        assert len(set(versions)) == len(MIX), "the run was over before every strategy had its turn"
        assert all(served[version] >= fewest for version in versions), served

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _version(self, change: int) -> str:
        """What served from that change on."""
        (end,) = self.recorder.terminals[change]
        assert isinstance(end, Reply), end
        assert isinstance(end.body, StrategySet)
        (active,) = end.body.active
        return active.version
