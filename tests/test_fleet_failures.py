"""What goes wrong between engines: nothing hangs beyond its deadline, no page is lost, no token is wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.fleet_rig import Fleet, expected, prompt_of, run_fleet

if TYPE_CHECKING:
    pass

PROMPT = prompt_of(50)


def test_kv_moves_and_the_answer_is_the_same() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT, end=-1)
        assert (kv.matched, kv.end) == (0, 49)
        report = await fleet.remote_send(a, PROMPT, kv)
        assert (report.computed, report.reused) == (49, 0)
        tokens, end = await fleet.generate(b, PROMPT, kv=kv)
        assert tokens == expected(PROMPT)
        assert (end.received_tokens, end.recomputed_tokens) == (49, 0)

    run_fleet(work)
